"""Keys are found where they are, and under the names that other trainers have for them."""

import pytest

from adapters.errors import UserError
from finetune import train
from finetune.recipe.key_search import NOT_HERE, OTHER_NAMES, explain_key, locate
from finetune.recipe.reference import list_paths
from tests.builders import ROOT
from tests.builders.commands import refusal

QUICKSTART = str(ROOT / "recipes/quickstart.yaml")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("stage_1.lr", "it is stage_1.optimizer.learning_rate"),
        ("stage_1.learning_rate", "it is stage_1.optimizer.learning_rate"),
        ("stage_1.optimizer.lr", "it is stage_1.optimizer.learning_rate"),
        ("stage_2.lora_rank", "it is stage_2.adapter.rank"),
        ("rank", "it is stage_1.adapter.rank or stage_2.adapter.rank"),
        ("max_train_steps", "it is stage_1.steps or stage_2.steps"),
        ("optimizer", "it is stage_1.optimizer or stage_2.optimizer"),
        ("validation.num_inference_steps", "it is validation.sampling.stage_1.steps"),
        ("data.prompts", "did you mean prompt?"),
        ("sed", "did you mean seed?"),
        ("stage_1.learning_rat", "did you mean stage_1.optimizer.learning_rate?"),
        ("stage_1.epochs", NOT_HERE["epochs"]),
        ("resolution", NOT_HERE["resolution"]),
        ("qqqqqq", ""),
    ],
)
def test_what_a_key_should_have_been(path: str, meant: str) -> None:
    assert locate(path.split(".")) == meant


def test_every_other_name_leads_to_a_key_and_hides_none() -> None:
    paths = list_paths()
    names = {path.rpartition(".")[2] for path in paths}
    for end in OTHER_NAMES.values():
        assert any(path == end or path.endswith(f".{end}") for path in paths), end
    assert not names & (OTHER_NAMES.keys() | NOT_HERE.keys())


def test_a_mistake_says_where_the_key_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main([QUICKSTART, "stage_1.lr=1", "batch=2", "--dry-run"])
    said = capsys.readouterr().err
    assert "stage_1.lr: unknown key; it is stage_1.optimizer.learning_rate\n" in said
    assert "batch: unknown key; it is stage_1.batch_size or stage_2.batch_size\n" in said


def test_every_key_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(["--explain"])
    table = capsys.readouterr().out
    assert ended.value.code == 0
    assert "stage_1, stage_2: The training of one stage" in table
    for path in list_paths():
        assert path.rpartition(".")[2] in table
    for line in table.splitlines():
        assert "``" not in line


def test_a_key_is_explained_with_its_range_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--explain", "stage_1.min_snr_gamma"])
    path, kind, *text = capsys.readouterr().out.splitlines()
    assert path == "stage_1.min_snr_gamma"
    assert kind == "    number (above 0) or null; default: null"
    assert "Min-SNR" in text[0]
    assert explain_key("lr").startswith("stage_1.optimizer.learning_rate, stage_2.optimizer")
    both = explain_key("prior")
    assert "pictures; default: pictures" in both
    assert "captions to preserve" in both
    assert "must be given" in explain_key("name")


def test_an_unknown_key_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no key 'nmae' in a recipe; did you mean name" in refusal(
        capsys, train.main, "--explain", "nmae"
    )
    with pytest.raises(UserError, match="alone lists all keys"):
        explain_key("stage_1.qqqqqq")
