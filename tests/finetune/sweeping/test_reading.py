"""Axes as they are written: in a file and on the command line, and mistakes in them."""

import math

import pytest

from adapters.errors import UserError
from finetune.sweeping.axes import Bundles, Choices
from finetune.sweeping.reading import read_axis, read_values


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("seed", [1, 2], "seed cannot be varied: name the seeds of training in seeds"),
        ("name", ["a"], "name cannot be varied"),
        ("stage_1.steps", [], "must be a list of values, a range as in"),
        ("stage_1.steps", 8, "must be a list of values, a range as in"),
        ("stage_1.steps", {}, "must be a list of values, a range as in"),
        ("stage_1.steps", {"low": 1, "hihg": 2}, "unknown key 'hihg'; did you mean high"),
        ("stage_1.steps", {"low": 1}, r"high must be a number \(got None\)"),
        ("stage_1.steps", {"low": 3, "high": 1}, "low must be less than high"),
        ("stage_1.steps", {"low": 0, "high": 1, "log": True}, "low must be above 0"),
        ("stage_1.steps", {"low": 1, "high": 2, "log": "yes"}, "log must be true or false"),
        ("stage_1.steps", {"low": 1, "high": 10**20}, "high must be a number from -9.22e"),
        ("stage_1.steps", {"low": 1, "high": 10**400}, "high must be a number from -9.22e"),
        ("stage_1.steps", {"low": -1e308, "high": 1e308}, "low must be a number from -3.4e"),
        ("stage_1.steps", {"low": 1.0, "high": math.inf}, "high must be a number from -3.4e"),
        ("stage_1.steps", {"low": 1.0, "high": math.nan}, "high must be a number from -3.4e"),
        ("stage_1.steps", {"low": True, "high": 2}, r"low must be a number \(got True\)"),
        ("data.source", {"dog": {}}, "data.source has named values, so it must have a name of its"),
        ("a,b", {"dog": {}}, "a,b has named values, so it must have a name of its own"),
        ("seed", {"one": {"seed": 1}}, "seed cannot be varied"),
        ("subject", {"dog": {"seed": 1}}, "seed cannot be varied: name the seeds"),
        ("subject", {"dog": {}, "cat": 3}, r"subject.cat must be a section of overrides, .*got 3"),
        ("subject", {"dog": {}, "": {}}, "subject has a value without a name"),
        ("subject", {"dog": {}, " ": {}}, "subject has a value without a name"),
        ("subject", {"dog": {}, None: {}}, "subject has a value without a name"),
        ("subject", {1: {}, "1": {}}, "subject has two values named 1"),
        ("subject", {"dog": {"a.b": 1, "a": {"b": 2}}}, "subject.dog sets a.b twice"),
        ("subject", {"dog": {"a.b": 1, "a": None}}, "subject.dog sets a twice"),
    ],
)
def test_mistaken_axes_are_named(key: str, values: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_axis(key, values)


def test_values_are_taken_from_the_command_line_letter_for_letter() -> None:
    assert read_values("over", "a.b=1e-3,0.003") == ("a.b", ["1e-3", "0.003"])
    assert read_values("over", "a=a sks dog on blue,null, [1, 2]") == (
        "a",
        ["a sks dog on blue", "null", "[1, 2]"],
    )
    assert read_values("over", "a='one, two',three") == ("a", ["one, two", "three"])
    assert read_values("over", "a={low: 1, high: 2}") == ("a", {"low": 1, "high": 2})
    for text in ("a", "a=", "=1", "a=[1", "a={low: 1"):
        with pytest.raises(UserError):
            read_values("over", text)


def test_values_of_a_file_are_written_as_overrides() -> None:
    axis = read_axis("a", [1, 2.5, True, None, "x", [1, 2], {"low": 1}, 1])
    assert isinstance(axis, Choices)
    assert axis.values == ("1", "2.5", "true", "null", "x", "[1, 2]", '{"low": 1}')


def test_named_values_set_several_fields_by_dotted_keys_or_sections() -> None:
    dotted = {"data.source": "dog", "evaluation.prompts": ["a {}", "b"], "evaluation.subject": "a"}
    nested = {"data": {"source": "dog"}, "evaluation": {"prompts": ["a {}", "b"], "subject": "a"}}
    axis = read_axis("subject", {"dog": dotted, "as given": {}})
    assert axis == read_axis("subject", {"dog": nested, "as given": {}})
    assert isinstance(axis, Bundles)
    assert axis.values == ("dog", "as given")
    assert axis.keys == ("data.source", "evaluation.prompts", "evaluation.subject")
    assert axis.list_overrides("dog") == [
        "data.source=dog",
        'evaluation.prompts=["a {}", "b"]',
        "evaluation.subject=a",
    ]
    assert axis.list_overrides("as given") == []


def test_a_section_can_be_emptied_before_it_is_filled() -> None:
    axis = read_axis("prior", {"pictures": {"prior": None, "prior.kind": "pictures"}})
    assert axis.list_overrides("pictures") == ["prior=null", "prior.kind=pictures"]


def test_names_of_a_range_can_be_those_of_values() -> None:
    axis = read_axis("size", {"low": {"a": 1}, "high": {"a": 2}})
    assert isinstance(axis, Bundles)
    assert axis.values == ("low", "high")


def test_named_values_are_typed_as_they_are_filed() -> None:
    typed = "subject={dog: {data.source: my dog}, cat: {data: {source: cat}}}"
    filed = {"dog": {"data.source": "my dog"}, "cat": {"data": {"source": "cat"}}}
    assert read_values("across", typed) == ("subject", filed)
    with pytest.raises(UserError, match="--across must be key=value"):
        read_values("across", "subject")
