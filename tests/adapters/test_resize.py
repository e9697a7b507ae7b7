"""A resized or extracted LoRA is the best of its rank, says what it lost, and loads everywhere."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from torch import Tensor

from adapters import Parts, load_cascade
from adapters.extract import main as extract_main
from adapters.files.info import read_info
from adapters.files.reading import read_adapter
from adapters.files.stage_adapter import StageAdapter
from adapters.resize import main as resize_main
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import PIPELINES, base_of, export, trained_unet, updates
from tests.builders.adapters import name_of as spec_name
from tests.builders.commands import refusal
from tests.builders.other_tools import kohya
from tests.builders.random_cascade import RandomCascade
from tests.builders.unets import load_unet, output, unet_inputs


def resize(*arguments: object) -> None:
    resize_main([str(argument) for argument in arguments])


def extract(*arguments: object) -> None:
    extract_main([str(argument) for argument in arguments])


def truncated(update: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank, by the singular value decomposition of the whole matrix."""
    u, values, vh = torch.linalg.svd(update.double(), full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ vh[:rank]


def relative(lost: list[Tensor], whole: list[Tensor]) -> float:
    squares = [sum(float(t.double().square().sum()) for t in tensors) for tensors in (lost, whole)]
    return (squares[0] / squares[1]) ** 0.5


def loaded_updates(base: Path, stage: int, folder: Path) -> dict[str, Tensor]:
    """What a folder's adapter adds in plain diffusers, held equal in PEFT and in our cascade."""
    pipe = PIPELINES[stage].from_pretrained(base, text_encoder=None)
    pipe.load_lora_weights(folder)
    inputs = unet_inputs(pipe.unet)
    expected = output(pipe.unet.eval().requires_grad_(False), inputs)
    peft_model = PeftModel.from_pretrained(load_unet(base), str(folder)).eval()
    assert torch.equal(output(peft_model, inputs), expected)
    cascade = load_cascade(
        **{f"stage_{stage}": base}, adapters=[folder], parts=Parts(text_encoder=False)
    )
    merged = output(cascade.stages[stage].unet, inputs)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
    return updates(pipe.unet)


SPECS = [
    (1, AdapterSpec(rank=6, alpha=3.0, targets="attention+conv")),
    (2, AdapterSpec(kind="rslora", rank=6, alpha=6.0, targets="attention+conv")),
    (1, AdapterSpec(kind="dora", rank=4, targets="attention+conv")),
    (2, AdapterSpec(kind="loha", rank=2, targets="attention+conv")),
    (1, AdapterSpec(kind="lokr", rank=2)),
    (2, AdapterSpec(kind="oft", rank=4)),
]


@pytest.mark.parametrize(("stage", "spec"), SPECS, ids=spec_name)
def test_a_lower_rank_is_the_best_of_its_rank(
    random_cascade: RandomCascade,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: int,
    spec: AdapterSpec,
) -> None:
    base = base_of(random_cascade, stage)
    unet = trained_unet(base, spec)
    folder = export(unet, tmp_path / "old", base, stage, spec).folder
    needed = [] if spec.kind in ("lora", "rslora") else ["--base", base]
    resize(folder, "--rank", 2, *needed, "--out", tmp_path / "new")
    whole = updates(unet)
    best = {name: truncated(update, 2) for name, update in whole.items()}
    loaded = loaded_updates(base, stage, tmp_path / "new" / f"stage_{stage}")
    assert loaded.keys() == best.keys()
    for name, update in best.items():
        torch.testing.assert_close(loaded[name].double(), update, rtol=0, atol=2e-5)
    error = relative([whole[n] - best[n] for n in whole], list(whole.values()))
    info = read_info(tmp_path / "new" / f"stage_{stage}")
    assert info.approximation_error == pytest.approx(error, rel=1e-3)
    assert (info.spec.kind, info.spec.rank, info.spec.alpha) == ("lora", 2, None)
    assert (info.prompts, info.step) == (("a sks cat",), 7)
    assert f"{error:.2g}" in capsys.readouterr().out
    assert "approximat" not in (tmp_path / "new" / "README.md").read_text()


def test_the_error_decides_on_each_modules_rank(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    base, spec = random_cascade.stage_1, AdapterSpec(rank=6, targets="attention+conv")
    unet = trained_unet(base, spec)
    for number, layer in enumerate(m for n, m in unet.named_modules() if n.endswith("to_q")):
        layer.lora_B["default"].weight.data[:, number + 1 :] *= 1e-3
    folder = export(unet, tmp_path / "old", base, 1, spec).folder
    resize(folder, "--error", 0.5, "--out", tmp_path / "new")
    resize(folder, "--error", 0.5, "--rank", 2, "--out", tmp_path / "both")
    whole, ranks = updates(unet), {}
    for name, tensors in StageAdapter.load(tmp_path / "new" / "stage_1").modules.items():
        rank = ranks[name] = len(tensors["lora_A.weight"])
        lost = whole[name] - truncated(whole[name], rank)
        assert relative([lost], [whole[name]]) <= 0.5
        one_less = whole[name] - truncated(whole[name], rank - 1)
        assert relative([one_less], [whole[name]]) > 0.5
    assert len(set(ranks.values())) > 2
    loaded = loaded_updates(base, 1, tmp_path / "new" / "stage_1")
    off = [loaded[name] - whole[name] for name in whole]
    info = read_info(tmp_path / "new" / "stage_1")
    assert relative(off, list(whole.values())) == pytest.approx(info.approximation_error, rel=1e-3)
    assert info.spec.rank == max(ranks.values())
    both = StageAdapter.load(tmp_path / "both" / "stage_1")
    assert {n: len(both.state[f"{n}.lora_A.weight"]) for n in ranks} == {
        name: min(rank, 2) for name, rank in ranks.items()
    }


def test_a_folder_is_resized_with_both_stages_and_its_licences(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    spec = AdapterSpec(rank=4)
    for stage in (1, 2):
        base = base_of(random_cascade, stage)
        export(trained_unet(base, spec), tmp_path / "old", base, stage, spec)
    (tmp_path / "old" / "stage_2-LICENSE.md").write_text("of the base")
    resize(tmp_path / "old", "--rank", 3, "--out", tmp_path / "new")
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"stage_1", "stage_2", "README.md", "stage_2-LICENSE.md"}
    load_cascade(
        random_cascade.stage_1,
        random_cascade.stage_2,
        adapters=[tmp_path / "new"],
        parts=Parts(text_encoder=False),
    )
    resize(tmp_path / "new", "--rank", 1, "--out", tmp_path / "twice")
    resize(tmp_path / "old", "--rank", 1, "--out", tmp_path / "once")
    twice, once = (read_info(tmp_path / name / "stage_1") for name in ("twice", "once"))
    assert twice.approximation_error == pytest.approx(once.approximation_error, rel=1e-4)


def test_another_tools_file_becomes_a_folder_of_peft(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    base, spec = random_cascade.stage_1, AdapterSpec(rank=4, alpha=3.0, targets="attention+conv")
    unet = trained_unet(base, spec)
    resize(kohya(unet, tmp_path), "--rank", 3, "--out", tmp_path / "new")
    loaded = loaded_updates(base, 1, tmp_path / "new")
    for name, update in updates(unet).items():
        best = truncated(update, 3)
        torch.testing.assert_close(loaded[name].double(), best, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "give --rank, --error or both"),
        ("--rank 0", "--rank must be at least 1 (got 0)"),
        ("--error 1.5", "--error must be at least 0 and less than 1 (got 1.5)"),
        ("--rank 2 --out {taken}", "already exists; name a new folder"),
        ("--rank 2", "of kind loha, whose updates depend on its base"),
        ("--rank 2 --base {stage_2}", "of kind loha, whose updates depend"),
        ("--rank 2 --base {other}", "was trained on Stage 1 of"),
    ],
)
def test_what_cannot_be_resized(
    random_cascade: RandomCascade,
    guarded_cascade: RandomCascade,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    sentence: str,
) -> None:
    base, spec = random_cascade.stage_1, AdapterSpec(kind="loha", targets=("to_q",))
    folder = export(trained_unet(base, spec), tmp_path / "old", base, 1, spec).folder
    places = {"stage_2": random_cascade.stage_2, "other": guarded_cascade.stage_1}
    filled = arguments.format(taken=folder, **places).split()
    assert sentence in refusal(capsys, resize_main, folder, "--out", tmp_path / "new", *filled)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def tuned_model(cascade: RandomCascade, folder: Path, stage: int = 1) -> UNet2DConditionModel:
    """Tunes weights of the attention by rank 3 and a convolution wholly, a bias and a norm."""
    shutil.copytree(base_of(cascade, stage), folder)
    unet = load_unet(base_of(cascade, stage))
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for name, module in unet.named_modules():
        if name.endswith(("to_q", "add_v_proj")):
            rows, columns = module.weight.shape
            module.weight.data += 0.1 * noise(rows, 3) @ noise(3, columns)
    conv = unet.mid_block.resnets[0].conv1
    conv.weight.data += 0.02 * noise(*conv.weight.shape)
    conv.bias.data += 0.01 * noise(*conv.bias.shape)
    unet.conv_norm_out.weight.data += 0.01
    unet.save_pretrained(folder / "unet")
    return unet


CONV = "mid_block.resnets.0.conv1"
OUTSIDE = {f"{CONV}.bias", "conv_norm_out.weight"}


@pytest.mark.parametrize("stage", [1, 2])
def test_the_difference_of_two_unets_becomes_a_lora(
    random_cascade: RandomCascade, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: int
) -> None:
    base = base_of(random_cascade, stage)
    tuned = tuned_model(random_cascade, tmp_path / "tuned", stage).state_dict()
    arguments = [tmp_path / "tuned", "--base", base, "--rank", 3, "--prompt", "a sks cat"]
    extract(*arguments, "--out", tmp_path / "new")
    before = load_unet(base).state_dict()
    changes = {n: tuned[n] - before[n] for n in tuned if not torch.equal(tuned[n], before[n])}
    matrices = {
        name.removesuffix(".weight"): change.flatten(1)
        for name, change in changes.items()
        if name not in OUTSIDE
    }
    loaded = loaded_updates(base, stage, tmp_path / "new" / f"stage_{stage}")
    assert loaded.keys() == matrices.keys()
    for name, change in matrices.items():
        best = truncated(change, 3)
        torch.testing.assert_close(loaded[name].double(), best, rtol=0, atol=1e-5)
        assert torch.allclose(best.float(), change, atol=1e-5) == (name != CONV)
    lost = [matrices[CONV] - truncated(matrices[CONV], 3), *(changes[name] for name in OUTSIDE)]
    error = relative(lost, list(changes.values()))
    info = read_info(tmp_path / "new" / f"stage_{stage}")
    assert info.approximation_error == pytest.approx(error, rel=1e-3)
    assert (info.stage, info.base_model, info.prompts) == (stage, str(base), ("a sks cat",))
    told = capsys.readouterr().out
    share = relative([changes[name] for name in OUTSIDE], list(changes.values()))
    assert f"2 weights outside of its modules differ too, {share:.1%} of the norm" in told
    assert all(name in told for name in OUTSIDE)
    card = (tmp_path / "new" / "README.md").read_text()
    assert "| lora | 3 | 3 | `all` |" in card


def test_what_the_targets_leave_out_is_told(
    random_cascade: RandomCascade, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned_model(random_cascade, tmp_path / "tuned")
    base = ("--base", random_cascade.stage_1, "--targets", "to_q", "mid_block.*.add_v_proj")
    extract(tmp_path / "tuned" / "unet", *base, "--error", 0.01, "--out", tmp_path / "new")
    config, state, _ = read_adapter(tmp_path / "new" / "stage_1")
    assert all(n.endswith("to_q") or n.startswith("mid_block.") for n in config.target_modules)
    assert {len(t) for name, t in state.items() if "lora_A" in name} == {3}
    assert f"{CONV}.weight" in capsys.readouterr().out


def test_rounding_is_not_taken_for_tuning(random_cascade: RandomCascade, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    unet = tuned_model(random_cascade, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.half().save_pretrained(folder / "unet", variant="fp16")
    base = ("--base", random_cascade.stage_1, "--tuned-variant", "fp16", "--rank", 4)
    extract(folder, *base, "--out", tmp_path / "new")
    config, _, _ = read_adapter(tmp_path / "new" / "stage_1")
    assert {name.rpartition(".")[2] for name in config.target_modules} == {
        *("to_q", "add_v_proj", "conv1")
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("{stage_2} --base {stage_1}", "are UNets of different architectures ("),
        ("{stage_1} --base {stage_1}", "does not differ from"),
        ("{stage_1} --base {stage_3}", "is a StableDiffusionUpscalePipeline"),
        ("{stage_1} --base {stage_1} --targets to_qq", "'to_qq' matches no Linear or Conv2d"),
        ("nowhere --base {stage_1}", "'nowhere' is neither a folder that exists nor"),
        ("{stage_1} --base {stage_1} --device cuda:99", "device 'cuda:99' cannot be used"),
        (
            "{stage_1}/text_encoder --base {stage_1}",
            "config.json is not that of a UNet",
        ),
    ],
)
def test_what_cannot_be_extracted(
    random_cascade: RandomCascade,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    sentence: str,
) -> None:
    filled = arguments.format(**vars(random_cascade)).split()
    assert sentence in refusal(
        capsys, extract_main, *filled, "--rank", 2, "--out", tmp_path / "new"
    )
    assert list(tmp_path.iterdir()) == []
