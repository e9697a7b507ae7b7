"""One LoRA of several: what PEFT itself computes, and a folder that travels."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import IFPipeline
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.lora import LoraModel
from safetensors.torch import save_file
from torch import Tensor

from adapters import Cascade
from adapters.combine import main as combine_folders
from adapters.errors import UserError
from adapters.files.info import read_info
from adapters.files.places import PEFT_WEIGHTS
from adapters.files.stage_adapter import StageAdapter
from adapters.merging.combination import Part, combine
from adapters.merging.methods import METHODS, Combination
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import cascade_of, export, same, trained_unet, weights
from tests.builders.commands import refusal
from tests.builders.random_cascade import RandomCascade, save_random_cascade
from tests.builders.unets import load_unet, output, unet_inputs

CPU = torch.device("cpu")

SPECS = {
    "dog": AdapterSpec(rank=4, alpha=6.0, targets="attention+conv"),
    "style": AdapterSpec(rank=4, targets=("to_q", "to_out.0", "conv1", "conv_shortcut")),
    "wide": AdapterSpec(kind="rslora", rank=6, alpha=3.0, targets="attention"),
    "thin": AdapterSpec(kind="rslora", rank=4, alpha=4.0, targets="attention"),
    "dora": AdapterSpec(kind="dora", rank=4),
    "loha": AdapterSpec(kind="loha", rank=4),
    "all": AdapterSpec(rank=16, targets="all"),
    "one": AdapterSpec(rank=4, targets=("mid_block.attentions.0.to_q",)),
    "same": AdapterSpec(rank=4, alpha=2.0, targets=("mid_block.attentions.0.to_q",)),
}
SETTINGS = {name: {"density": 0.4} if method.prunes else {} for name, method in METHODS.items()}
DRAWS = [name for name in METHODS if name.startswith("dare")]


@pytest.fixture(scope="module")
def folders(
    random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    places = {name: tmp_path_factory.mktemp("adapters") / name for name in SPECS}
    for seed, (name, spec) in enumerate(SPECS.items()):
        for stage, base in ((1, random_cascade.stage_1), (2, random_cascade.stage_2)):
            if stage == 1 or name in ("dog", "style"):
                export(trained_unet(base, spec, seed), places[name], base, stage, spec)
    return places


def part(folders: dict[str, Path], name: str, scale: float) -> Part:
    return Part(name, StageAdapter.load(folders[name] / "stage_1"), scale)


def by_peft(base: Path, parts: list[Part], method: str, **settings: object) -> dict[str, Tensor]:
    """A and B of PEFT's own combination of LoRAs, in a whole UNet."""
    unet = load_unet(base)
    model = None
    for each in parts:
        own = each.adapter.config
        config = LoraConfig(
            r=own.r, lora_alpha=own.lora_alpha, target_modules=set(own.target_modules)
        )
        if model is None:
            model = LoraModel(unet, config, each.name)
        else:
            model.peft_config[each.name] = config
            model.inject_adapter(unet, each.name)
        set_peft_model_state_dict(unet, each.adapter.state, each.name)
    torch.manual_seed(3)
    model.add_weighted_adapter(
        [each.name for each in parts], [each.scale for each in parts], "new", method, **settings
    )
    return {
        name.replace(".new", ""): tensor
        for name, tensor in unet.state_dict().items()
        if ".new." in name
    }


def products(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """B A by module; singular vectors are defined but for their sign."""
    modules = [name.removesuffix(".lora_A.weight") for name in state if ".lora_A." in name]
    return {
        module: state[f"{module}.lora_B.weight"].flatten(1)
        @ state[f"{module}.lora_A.weight"].flatten(1)
        for module in modules
    }


@pytest.mark.parametrize("method", [name for name in METHODS if name not in DRAWS])
def test_a_method_gives_what_peft_gives_in_a_whole_unet(
    random_cascade: RandomCascade, folders: dict[str, Path], method: str
) -> None:
    parts = [part(folders, "dog", 0.7), part(folders, "style", -0.5)]
    ours = combine(parts, Combination(method, **SETTINGS[method]), "new", CPU).state
    theirs = by_peft(random_cascade.stage_1, parts, method, **SETTINGS[method])
    assert ours.keys() == theirs.keys()
    if not METHODS[method].cuts:
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    expected = products(theirs)
    for module, product in products(ours).items():
        torch.testing.assert_close(product, expected[module], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", DRAWS)
def test_what_dare_drops_follows_from_the_seed(
    random_cascade: RandomCascade, folders: dict[str, Path], method: str
) -> None:
    parts = [part(folders, "one", 0.7), part(folders, "same", 0.5)]
    before = torch.get_rng_state()
    first, again, other = (
        combine(parts, Combination(method, density=0.4, seed=seed), "new", CPU).state
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, again)
    assert not same(first, other)
    expected = products(by_peft(random_cascade.stage_1, parts, method, density=0.4))
    for module, product in products(first).items():
        torch.testing.assert_close(product, expected[module], rtol=0, atol=1e-6)


def loaded(cascade: RandomCascade, folders: dict[str, Path], *names: str) -> Cascade:
    result = cascade_of(cascade, stages=(1, 2))
    for name in names:
        result.add_adapter(folders[name], 0.0, name)
    return result


@pytest.mark.parametrize(
    "scales", [{"dog": 0.7, "style": {1: -0.5, 2: 2}}, {"wide": 0.7, "thin": 1}]
)
def test_cat_is_the_mix_of_merging_all(
    random_cascade: RandomCascade, folders: dict[str, Path], scales: dict[str, float]
) -> None:
    cascade = loaded(random_cascade, folders, *scales)
    base = weights(cascade)
    assert cascade.combine(scales, "cat") == "+".join(scales)
    assert same(weights(cascade), base)
    cascade.set_adapters(scales)
    mixed = weights(cascade)
    cascade.set_adapters({"+".join(scales): 1.0})
    for name, weight in weights(cascade).items():
        torch.testing.assert_close(weight, mixed[name], rtol=0, atol=1e-6)
    assert not same(mixed, base)


def test_alphas_by_module_are_combined_in_silence(folders: dict[str, Path]) -> None:
    dog, style = part(folders, "dog", 0.7), part(folders, "style", 0.5)
    dog.adapter.config.alpha_pattern = {"mid_block.attentions.0.to_q": 2.0}
    with warnings.catch_warnings(action="error"):
        state = combine([dog, style], Combination("cat"), "new", CPU).state
    module = "mid_block.attentions.0.to_q"
    own = dog.adapter.state[f"{module}.lora_A.weight"]
    torch.testing.assert_close(state[f"{module}.lora_A.weight"][:4], own * 0.7 * 2.0 / 4)


def test_a_combination_travels(
    random_cascade: RandomCascade, folders: dict[str, Path], tmp_path: Path
) -> None:
    cascade = loaded(random_cascade, folders, "dog", "style")
    both = cascade.combine({"dog": 0.7, "style": 0.5}, "ties", density=0.5, name="both")
    cascade.save_adapter(both, tmp_path / "both")
    names = sorted(path.name for path in (tmp_path / "both").iterdir())
    assert names == ["README.md", "stage_1", "stage_2"]
    info = read_info(tmp_path / "both" / "stage_1")
    assert (info.spec.kind, info.spec.rank, info.stage) == ("lora", 4, 1)
    assert "method: ties" in info.recipe
    assert f"adapter: {folders['dog'] / 'stage_1'}" in info.recipe
    assert "name: test" in info.recipe
    cascade.set_adapters({both: 1.0})
    other = cascade_of(random_cascade, stages=(1, 2), adapters=[tmp_path / "both"])
    assert same(weights(other), weights(cascade))
    pipe = IFPipeline.from_pretrained(random_cascade.stage_1, text_encoder=None)
    pipe.load_lora_weights(tmp_path / "both" / "stage_1")
    inputs = unet_inputs(pipe.unet)
    merged = output(cascade.stages[1].unet, inputs)
    torch.testing.assert_close(output(pipe.unet.eval(), inputs), merged, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="already exists; name a new folder"):
        cascade.save_adapter(both, tmp_path / "both")


def test_the_command_line_combines_as_a_cascade_does(
    random_cascade: RandomCascade,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cascade = loaded(random_cascade, folders, "dog", "style")
    cascade.combine({"dog": {1: 0.7, 2: 1}, "style": 1}, "svd", rank=3, name="both")
    cascade.set_adapters({"both": 1.0})
    flags = ["--method", "svd", "--rank", "3", "--out", str(tmp_path / "new")]
    combine_folders([f"{folders['dog']}=1:0.7,2:1", str(folders["style"]), *flags])
    assert capsys.readouterr().out == f"{tmp_path / 'new'}\n"
    other = cascade_of(random_cascade, stages=(1, 2), adapters=[tmp_path / "new"])
    assert same(weights(other), weights(cascade))


def test_files_of_other_tools_are_combined_where_their_stage_is_said(
    random_cascade: RandomCascade, folders: dict[str, Path], tmp_path: Path
) -> None:
    foreign = []
    for name in ("dog", "style"):
        adapter = StageAdapter.load(folders[name] / "stage_1")
        foreign.append(tmp_path / name)
        adapter.config.save_pretrained(foreign[-1])
        state = {f"base_model.model.{name}": tensor for name, tensor in adapter.state.items()}
        save_file(state, foreign[-1] / PEFT_WEIGHTS)
    arguments = [*map(str, foreign), "--method", "cat", "--out", str(tmp_path / "new")]
    with pytest.raises(SystemExit):
        combine_folders(arguments)
    combine_folders([*arguments, "--stage", "1"])
    cascade = loaded(random_cascade, folders, "dog", "style")
    cascade.set_adapters({"dog": {1: 1.0}, "style": {1: 1.0}})
    other = cascade_of(random_cascade, stages=(1, 2), adapters=[tmp_path / "new"])
    for name, weight in weights(other).items():
        torch.testing.assert_close(weight, weights(cascade)[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("other", "how", "sentence"),
    [
        ("dora", {"method": "cat"}, r"'dora' \(dora\) cannot be combined"),
        ("loha", {"method": "linear"}, "merge it with the others by set_adapters"),
        ("wide", {"method": "linear"}, "overall they are 4 in 'dog', 6 in 'wide'; cat, svd, ties_"),
        (
            "all",
            {"method": "svd"},
            "'svd' cuts off at rank 16, but .* has at most .*; give a rank",
        ),
        ("style", {"method": "tie"}, r"one of linear, cat, .* \(got 'tie'\)"),
        ("style", {"method": "ties"}, r"'ties' needs a density above 0 and up to 1 \(got None\)"),
        ("style", {"method": "ties", "density": math.nan}, r"density above 0 .* \(got nan\)"),
        ("style", {"method": "cat", "density": 0.5}, "'cat' takes no density"),
        ("style", {"method": "linear", "rank": 4}, "'linear' takes no rank"),
        ("style", {"method": "svd", "rank": 0}, r"rank from 1 to 10000 \(got 0\)"),
        ("style", {"method": "svd", "majority_sign": "total"}, "takes no majority_sign"),
        ("style", {"method": "linear", "name": "dog"}, "'dog' is loaded already"),
    ],
)
def test_what_cannot_be_combined_is_said_and_nothing_is_loaded(
    random_cascade: RandomCascade,
    folders: dict[str, Path],
    other: str,
    how: dict[str, object],
    sentence: str,
) -> None:
    cascade = loaded(random_cascade, folders, "dog", other)
    with pytest.raises(UserError, match=sentence) as caught:
        cascade.combine({"dog": 1.0, other: 1.0}, **how)
    assert "\n" not in str(caught.value)
    assert list(cascade.adapters) == ["dog", other]


def test_a_scale_of_zero_takes_no_part(
    random_cascade: RandomCascade, folders: dict[str, Path]
) -> None:
    cascade = loaded(random_cascade, folders, "dog", "loha")
    cascade.combine({"dog": 1.0, "loha": 0.0}, name="alone")
    with pytest.raises(UserError, match="nothing to combine"):
        cascade.combine({"dog": 0.0, "loha": 0.0})
    with pytest.raises(UserError, match="did you mean 'dog'"):
        cascade.combine({"dof": 1.0})
    with pytest.raises(UserError, match="of kind loha, but only LoRAs can be written"):
        cascade.save_adapter("loha", "anywhere")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "--out", "new"], "nowhere has no exported adapter"),
        (["{dog}=x", "--out", "new"], "which is not a scale"),
        (["{dog}=3:1", "--out", "new"], "names Stage 3, but it has only Stage 1 and 2"),
        (["{dog}=0", "--out", "new"], "nothing to combine"),
        (["{dog}", "{dora}", "--out", "new"], "cannot be combined"),
        (["{dog}", "{other}", "--out", "new"], "were trained on different bases"),
        (["{dog}", "{style}", "--out", "{dog}"], "already exists; name a new folder"),
        (["nowhere", "--out", "{dog}"], "already exists; name a new folder"),
        (["{dog}", "--seed", "-1", "--out", "new"], "A seed must be a whole number from 0"),
        (["{dog}", "{style}", "--out", "/proc/x"], "/proc/x cannot be written"),
        (["{dog}", "{style}", "--out", "new", "--device", "cuda:99"], "'cuda:99' cannot be used"),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "{other}" in arguments:
        base = save_random_cascade(tmp_path / "base", seed=1).stage_1
        export(trained_unet(base, SPECS["dog"]), tmp_path / "other", base, 1, SPECS["dog"])
    places = {name: str(place) for name, place in folders.items()} | {"other": "other"}
    before = sorted(tmp_path.iterdir())
    assert sentence in refusal(
        capsys, combine_folders, *[argument.format(**places) for argument in arguments]
    )
    assert sorted(tmp_path.iterdir()) == before
