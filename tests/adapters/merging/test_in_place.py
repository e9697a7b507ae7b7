"""Several adapters at once: exact, in any order, in place, and gone without a trace."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import Cascade, Parts, load_cascade
from adapters.arguments import parse_scaled
from adapters.errors import UserError
from adapters.files.places import PEFT_WEIGHTS
from adapters.files.stage_adapter import StageAdapter
from adapters.generate import main as generate
from adapters.merging import in_place
from adapters.merging.in_place import FullPrecisionLayer
from adapters.weights.kinds import AdapterSpec
from benchmarks import switching
from tests.builders.adapters import cascade_of, export, layers, same, trained_unet, weights
from tests.builders.random_cascade import RandomCascade
from tests.builders.unets import inputs_of, load_unet
from unets.frozen import Quantised

SPECS = {
    "dog": AdapterSpec(kind="lora", rank=4, alpha=6.0, targets="attention+conv"),
    "style": AdapterSpec(kind="dora", rank=3, targets="attention+conv"),
    "pose": AdapterSpec(kind="rslora", rank=4, alpha=6.0),
    "ink": AdapterSpec(kind="loha", rank=2, targets=("to_q", "conv1")),
    "tilt": AdapterSpec(kind="oft", rank=2),
    "glow": AdapterSpec(kind="lokr", rank=2, targets=("add_k_proj", "conv2")),
}
"""Adapters of both stages, by name."""

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "nf4")

FULL = ("fp32", "bf16", "fp16")

MIX = {"dog": 0.8, "style": {1: 0.5, 2: 1.25}, "ink": -0.75, "tilt": 0.3}


@pytest.fixture(scope="module")
def folders(
    random_cascade: RandomCascade, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """An exported adapter of each of :data:`SPECS`."""
    places = {name: tmp_path_factory.mktemp("adapters") / name for name in SPECS}
    for seed, (name, spec) in enumerate(SPECS.items()):
        for stage, base in ((1, random_cascade.stage_1), (2, random_cascade.stage_2)):
            export(trained_unet(base, spec, seed), places[name], base, stage, spec)
    return places


def bits(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as integers: of zeros, the sign is told apart."""
    views = {2: torch.int16, 4: torch.int32}
    return {name: weight.view(views[weight.element_size()]) for name, weight in weights.items()}


def merged_by_peft(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The weights of an attached adapter's modules, after PEFT's own merge."""
    adapted = {n: m for n, m in unet.named_modules() if isinstance(m, BaseTunerLayer)}
    unet.fuse_lora()
    return {name: layer.get_base_layer().weight.detach() for name, layer in adapted.items()}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("stage", [1, 2])
def test_one_adapter_is_merged_as_peft_merges_it(
    random_cascade: RandomCascade, folders: dict[str, Path], name: str, stage: int
) -> None:
    base = {1: random_cascade.stage_1, 2: random_cascade.stage_2}[stage]
    theirs = merged_by_peft(trained_unet(base, SPECS[name], list(SPECS).index(name)))
    cascade = cascade_of(random_cascade, stages=(stage,))
    before = weights(cascade)
    cascade.add_adapter(folders[name])
    ours = weights(cascade)
    for module, weight in theirs.items():
        close = {"rtol": 2**-22, "atol": 2**-22}  # a few times what float32 resolves
        torch.testing.assert_close(ours[f"{stage}.{module}"], weight, **close)
    untouched = before.keys() - {f"{stage}.{module}" for module in theirs}
    assert all(torch.equal(ours[module], before[module]) for module in untouched)


@pytest.mark.parametrize("alpha", [4, 8])
def test_linears_with_a_scaling_that_needs_no_rounding_are_pefts_to_the_bit(
    random_cascade: RandomCascade, tmp_path: Path, alpha: int
) -> None:
    base, spec = random_cascade.stage_1, AdapterSpec(rank=4, alpha=alpha)
    unet = trained_unet(base, spec)
    export(unet, tmp_path, base, 1, spec)
    cascade = cascade_of(random_cascade)
    cascade.add_adapter(tmp_path)
    ours = weights(cascade)
    assert all(torch.equal(ours[f"1.{n}"], w) for n, w in merged_by_peft(unet).items())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_mix_is_the_bases_own_weight_and_the_weighted_sum_rounded_once(
    random_cascade: RandomCascade, folders: dict[str, Path], precision: str
) -> None:
    cascade = cascade_of(random_cascade, precision)
    before = weights(cascade)
    for name in MIX:
        cascade.add_adapter(folders[name], 0, name)
    cascade.set_adapters(list(MIX))
    assert all(set(stages.values()) == {1.0} for stages in cascade.adapters.values())
    cascade.set_adapters(MIX)
    after = weights(cascade)
    sums = {name: weight.double() for name, weight in before.items()}
    for name, stages in cascade.adapters.items():
        adapter = StageAdapter.load(folders[name] / "stage_1")
        for module in adapter.modules:
            key = f"1.{module}"
            delta = adapter.delta(module, before[key])
            sums[key] = sums[key] + stages[1] * delta.double()
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert len(changed) > 20
    half_step = torch.finfo(after[changed[0]].dtype).eps / 2
    for name, exact in sums.items():
        off = (after[name].double() - exact).abs()
        assert bool((off <= half_step * exact.abs() * 1.001 + 3e-7).all()), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_adapters_and_scales_give_the_same_bits_whatever_came_before(
    random_cascade: RandomCascade, folders: dict[str, Path], precision: str
) -> None:
    results = []
    for index, order in enumerate(
        (list(MIX), list(reversed(MIX)), ["ink", "dog", "tilt", "style"])
    ):
        cascade = cascade_of(random_cascade, precision)
        names = {name: f"{index}-{position}" for position, name in enumerate(order)}
        if index:
            cascade.add_adapter(folders["glow"], 2.0, "glow")
        for name in order:
            cascade.add_adapter(folders[name], index / 2, names[name])
        if index:
            cascade.set_adapters({"glow": 1.0, names["dog"]: 3.0})
            cascade.remove_adapter("glow")
        cascade.set_adapters({names[name]: scale for name, scale in MIX.items()})
        results.append(weights(cascade))
    assert same(bits(results[0]), bits(results[1]))
    assert same(bits(results[0]), bits(results[2]))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_removing_one_leaves_the_others_and_removing_all_leaves_the_base(
    random_cascade: RandomCascade, folders: dict[str, Path], precision: str
) -> None:
    cascade = cascade_of(random_cascade, precision)
    before = weights(cascade)
    cascade.add_adapter(folders["dog"], 0.7, "dog")
    alone = weights(cascade)
    for name in ("style", "ink", "tilt"):
        cascade.add_adapter(folders[name], 0.5, name)
    assert not same(weights(cascade), alone)
    for name in ("ink", "tilt", "style"):
        cascade.remove_adapter(name)
    assert same(weights(cascade), alone)
    cascade.set_adapters({})
    assert same(weights(cascade), before)
    cascade.set_adapters({"dog": 0.7})
    assert same(weights(cascade), alone)
    cascade.remove_adapters()
    assert same(bits(weights(cascade)), bits(before))
    assert cascade.adapters == {}
    merged = cascade.merged[1]
    for kept in (merged.adapters, merged._layers, merged._updates):
        assert not kept


def test_originals_in_main_memory_give_the_same_bits(
    random_cascade: RandomCascade, folders: dict[str, Path]
) -> None:
    results = []
    for originals in ("device", "cpu"):
        cascade = cascade_of(random_cascade, "bf16", parts=Parts(False, originals=originals))
        before = weights(cascade)
        cascade.add_adapter(folders["dog"])
        results.append(weights(cascade))
        cascade.remove_adapters()
        assert same(weights(cascade), before)
    assert same(*results)


def test_weights_in_another_order_of_memory_are_merged_alike(
    random_cascade: RandomCascade, folders: dict[str, Path]
) -> None:
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        unet = load_unet(random_cascade.stage_1).to(memory_format=layout)
        cascade = cascade_of(random_cascade, parts=Parts(False, {1: unet}))
        before = weights(cascade)
        for name in ("dog", "style", "ink"):
            cascade.add_adapter(folders[name], 0.5)
        results.append(weights(cascade))
        cascade.remove_adapters()
        assert same(bits(weights(cascade)), bits(before))
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", FULL)
def test_weights_stay_where_recordings_read_them_and_only_those_that_change_are_written(
    random_cascade: RandomCascade, folders: dict[str, Path], precision: str
) -> None:
    cascade = cascade_of(random_cascade, precision)
    recording = cascade.recorded[1]._graphs[()] = object()
    addresses = {name: layer.weight.data_ptr() for name, layer in layers(cascade).items()}
    for name in ("dog", "pose", "ink"):
        cascade.add_adapter(folders[name], 0.5, name)
    versions = {name: layer.weight._version for name, layer in layers(cascade).items()}
    cascade.set_adapters(cascade.adapters | {"ink": 1.0})
    written = {n for n, layer in layers(cascade).items() if layer.weight._version != versions[n]}
    assert written == {f"1.{module}" for module in cascade.merged[1].adapters["ink"].modules}
    cascade.set_adapters({"pose": 1.0})
    cascade.remove_adapters()
    assert {n: layer.weight.data_ptr() for n, layer in layers(cascade).items()} == addresses
    assert cascade.recorded[1]._graphs == {(): recording}


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantised_layers_keep_their_codes_and_are_recorded_anew_only_for_more_room(
    random_cascade: RandomCascade, folders: dict[str, Path], precision: str
) -> None:
    cascade = cascade_of(random_cascade, precision)
    recorded = cascade.recorded[1]
    quantised = {n: m for n, m in layers(cascade).items() if isinstance(m, Quantised)}
    codes = {name: (layer, layer.codes.data_ptr()) for name, layer in quantised.items()}

    def renewed(change: Callable[[], object]) -> bool:
        recorded._graphs[()] = object()
        recorded._seen.add(())
        change()
        assert bool(recorded._graphs) == bool(recorded._seen)
        return not recorded._graphs

    def overlays() -> dict[str, int]:
        return {n: m.overlay.a.data_ptr() for n, m in quantised.items() if m.overlay is not None}

    assert renewed(lambda: cascade.add_adapter(folders["dog"], 1.0, "dog"))
    places = overlays()
    assert len(places) > 10
    assert not renewed(lambda: cascade.add_adapter(folders["pose"], 0.0, "pose"))
    for scales in ({"pose": 1.0}, {"dog": 0.3}, {}, {"dog": 0.5, "pose": 0.5}):  # 4 + 4 ranks fit
        assert not renewed(lambda scales=scales: cascade.set_adapters(scales))
    assert overlays() == places
    assert renewed(lambda: cascade.add_adapter(folders["style"], 1.0, "style"))  # magnitudes
    assert not renewed(lambda: cascade.set_adapters({"style": 1.0}))
    assert not renewed(lambda: cascade.set_adapters({"dog": 1.0}))
    assert renewed(lambda: cascade.add_adapter(folders["tilt"], 1.0, "tilt"))  # no factors
    assert renewed(cascade.remove_adapters)
    assert overlays() == {}
    assert {name: (m, m.codes.data_ptr()) for name, m in quantised.items()} == codes


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_a_recorded_pass_reads_what_was_switched_to(
    random_cascade: RandomCascade, folders: dict[str, Path], precision: str
) -> None:
    cascade = load_cascade(random_cascade.stage_1, dtype=precision, device="cuda")
    before = weights(cascade)
    recorded, unet = cascade.recorded[1], cascade.stages[1].unet
    inputs = {name: tensor.cuda() for name, tensor in inputs_of(unet).items()}
    inputs |= {n: t.to(unet.dtype) for n, t in inputs.items() if t.is_floating_point()}
    for name in ("dog", "style", "ink"):
        cascade.add_adapter(folders[name], 0.5, name)
    mix = {"dog": 0.8, "style": 0.5, "ink": -0.75}
    with torch.no_grad():
        for scales in ({"dog": 1.0}, {"style": 1.0}, mix, {}, {"ink": 2.0}):
            cascade.set_adapters(scales)
            for _ in range(3):
                replayed = recorded(**inputs).float()
            assert recorded._graphs
            exact = recorded.function(**inputs).float()
            assert (replayed - exact).abs().max() <= 1e-2 * exact.abs().max()
    cascade.remove_adapters()
    assert same(bits(weights(cascade)), bits(before))


def test_scales_are_by_stage_and_those_not_named_are_switched_off(
    random_cascade: RandomCascade, folders: dict[str, Path]
) -> None:
    cascade = cascade_of(random_cascade, stages=(1, 2))
    before = weights(cascade)
    cascade.add_adapter(folders["dog"], {2: 0.5}, "dog")
    cascade.add_adapter(folders["ink"] / "stage_1", 2, "ink")
    assert cascade.adapters == {"dog": {1: 0.0, 2: 0.5}, "ink": {1: 2.0}}
    mixed, listing = weights(cascade), cascade.adapters
    cascade.set_adapters({"dog": {1: 1.0}})
    assert cascade.adapters == {"dog": {1: 1.0, 2: 0.0}, "ink": {1: 0.0}}
    after = weights(cascade)
    changed = {name[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1"}
    cascade.set_adapters(listing)
    assert same(weights(cascade), mixed)


def test_the_listing_reads_as_a_table(
    random_cascade: RandomCascade, folders: dict[str, Path]
) -> None:
    adapters = {folders["dog"]: {1: 0.8}, folders["ink"]: 0.5}
    cascade = cascade_of(random_cascade, stages=(1, 2), adapters=adapters)
    assert [line.split() for line in str(cascade.adapters).splitlines()] == [
        ["adapter", "stage", "scale", "kind", "from"],
        ["dog", "1", "0.8", "lora", str(folders["dog"] / "stage_1")],
        ["dog", "2", "0", "lora", str(folders["dog"] / "stage_2")],
        ["ink", "1", "0.5", "loha", str(folders["ink"] / "stage_1")],
        ["ink", "2", "0.5", "loha", str(folders["ink"] / "stage_2")],
    ]


def test_names_come_from_what_a_path_says(
    random_cascade: RandomCascade, folders: dict[str, Path], tmp_path: Path
) -> None:
    cascade = cascade_of(random_cascade)
    run = tmp_path / "runs" / "quick.start" / "adapters"
    run.parent.mkdir(parents=True)
    run.symlink_to(folders["dog"])
    add = cascade.add_adapter
    assert add(run) == "quick.start"
    assert add(run / "stage_1" / PEFT_WEIGHTS) == "quick.start-2"
    assert add(folders["ink"]) == "ink"
    assert add(folders["ink"], name="mine") == "mine"
    assert list(cascade.adapters) == ["quick.start", "quick.start-2", "ink", "mine"]


def reshaped(folder: Path, target: Path) -> Path:
    """An adapter of both stages, of which the second does not fit."""
    shutil.copytree(folder, target)
    file = target / "stage_2" / PEFT_WEIGHTS
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_A" in key or "hada_w1_b" in key)
    tensors[key] = tensors[key][:, :-1].contiguous()
    save_file(tensors, file, metadata=header)
    return target


Mistake = Callable[[Cascade, dict[str, Path], Path], object]

MISTAKES: dict[str, tuple[Mistake, str]] = {
    "unknown": (lambda c, f, _: c.set_adapters({"dog": 1, "stile": 1}), "did you mean 'style'"),
    "unknown to remove": (lambda c, f, _: c.remove_adapter("dig"), "did you mean 'dog'"),
    "taken": (lambda c, f, _: c.add_adapter(f["ink"], name="dog"), "'dog' is loaded already"),
    "nan": (
        lambda c, f, _: c.set_adapters({"style": 1, "dog": math.nan}),
        r"from -1000 to 1000 \(got nan",
    ),
    "inf": (
        lambda c, f, _: c.add_adapter(f["ink"], {1: 1.0, 2: math.inf}),
        r"from -1000 to 1000 \(got inf",
    ),
    "text": (lambda c, f, _: c.set_adapters({"dog": "1"}), r"number .*\(got '1'"),
    "no such stage": (
        lambda c, f, _: c.set_adapters({"dog": {3: 1.0}}),
        "names Stage 3, but it has",
    ),
    "not its stage": (
        lambda c, f, _: c.set_adapters({"style": {2: 1}}),
        "Stage 2, but it has only",
    ),
    "misfit": (lambda c, f, t: c.add_adapter(reshaped(f["pose"], t / "x")), "does not fit .*_proj"),
    "PEFT's": (lambda c, f, t: c.add_adapter(reshaped(f["ink"], t / "x")), "does not fit"),
    "twice": (lambda c, f, t: c.add_adapter(twice(f["dog"], t / "x")), "two adapters of Stage 1"),
}


def twice(folder: Path, target: Path) -> Path:
    for stage in ("stage_1", "stage_2"):
        shutil.copytree(folder / "stage_1", target / stage)
    return target


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_changes_nothing(
    random_cascade: RandomCascade, folders: dict[str, Path], tmp_path: Path, mistake: str
) -> None:
    cascade = cascade_of(random_cascade, stages=(1, 2))
    cascade.add_adapter(folders["dog"], 0.5, "dog")
    cascade.add_adapter(folders["style"] / "stage_1", 0.25, "style")
    before, listing = weights(cascade), cascade.adapters
    kept = {stage: set(merged._layers) for stage, merged in cascade.merged.items()}
    make, sentence = MISTAKES[mistake]
    with pytest.raises(UserError, match=sentence) as caught:
        make(cascade, folders, tmp_path)
    assert "\n" not in str(caught.value)
    assert same(weights(cascade), before)
    assert cascade.adapters == listing
    assert {stage: set(merged._layers) for stage, merged in cascade.merged.items()} == kept


def test_with_nothing_loaded_no_name_is_close(random_cascade: RandomCascade) -> None:
    with pytest.raises(UserError, match="'dog', as none are loaded"):
        cascade_of(random_cascade).set_adapters({"dog": 1.0})


def full_at_the_fifth(function: Callable[..., None]) -> Callable[..., None]:
    calls: list[int] = []

    def wrapped(*arguments: object, **options: object) -> None:
        calls.append(0)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("full")
        function(*arguments, **options)

    return wrapped


def test_a_device_without_room_is_said_and_nothing_is_half_applied(
    random_cascade: RandomCascade, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cascade = cascade_of(random_cascade)
    cascade.add_adapter(folders["ink"], 0.5, "ink")
    before, listing = weights(cascade), cascade.adapters
    kept = set(cascade.merged[1]._layers)
    with monkeypatch.context() as patch:
        patch.setattr(in_place, "merge", full_at_the_fifth(in_place.merge))
        with pytest.raises(torch.OutOfMemoryError):
            cascade.set_adapters({"ink": 1.0})
    assert same(weights(cascade), before)
    with monkeypatch.context() as patch:
        patch.setattr(
            FullPrecisionLayer, "__post_init__", full_at_the_fifth(FullPrecisionLayer.__post_init__)
        )
        with pytest.raises(UserError, match=r"cpu has no room .* originals='cpu'"):
            cascade.add_adapter(folders["dog"])
    assert same(weights(cascade), before)
    assert cascade.adapters == listing
    assert set(cascade.merged[1]._layers) == kept


def peft_adapter(base: Path, folder: Path, **settings: object) -> UNet2DConditionModel:
    """A UNet with an adapter of PEFT's own making, written as PEFT writes."""
    model = get_peft_model(load_unet(base), LoraConfig(target_modules=["to_q"], **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            draw = torch.Generator().manual_seed(len(name))
            parameter.data += torch.randn(parameter.shape, generator=draw) * 0.05
    model.save_pretrained(folder)
    return model


def test_settings_that_change_more_than_factors_are_merged_by_peft(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    peft_adapter(random_cascade.stage_1, tmp_path, init_lora_weights="pissa", r=2)
    adapter = StageAdapter.load(tmp_path)
    assert not adapter.has_factors
    theirs = PeftModel.from_pretrained(load_unet(random_cascade.stage_1), str(tmp_path))
    expected = theirs.merge_and_unload()
    cascade = cascade_of(random_cascade)
    cascade.add_adapter(tmp_path)
    unet = cascade.stages[1].unet
    for name in adapter.modules:
        weight, own = expected.get_submodule(name).weight, unet.get_submodule(name).weight
        torch.testing.assert_close(own, weight, rtol=0, atol=1e-6)


def test_biases_are_not_passed_over(random_cascade: RandomCascade, tmp_path: Path) -> None:
    peft_adapter(random_cascade.stage_1, tmp_path, lora_bias=True)
    with pytest.raises(UserError, match=r"also changes biases .*to_q\.lora_B\.bias"):
        cascade_of(random_cascade).add_adapter(tmp_path)


@pytest.mark.parametrize(
    ("argument", "parsed"),
    [
        ("runs/dog", ("runs/dog", None)),
        ("runs/dog=0.7", ("runs/dog", 0.7)),
        ("a=b/dog=-1e-1", ("a=b/dog", -0.1)),
        ("dog=1:0.5,2:1", ("dog", {1: 0.5, 2: 1.0})),
    ],
)
def test_a_scale_is_written_behind_its_folder(
    argument: str, parsed: tuple[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_scaled(argument) == parsed
    Path(argument).mkdir(parents=True)
    assert parse_scaled(argument) == (argument, None)


@pytest.mark.parametrize("argument", ["dog=", "dog=x", "dog=1:x", "dog=1:2:3", "dog=:"])
def test_what_is_no_scale_is_said(argument: str) -> None:
    with pytest.raises(UserError, match="which is not a scale; give FOLDER"):
        parse_scaled(argument)


def test_the_command_line_mixes(
    random_cascade: RandomCascade, folders: dict[str, Path], tmp_path: Path
) -> None:
    dog, ink = (str(folders[name] / "stage_1") for name in ("dog", "ink"))
    runs = {
        "mixed": ["--adapter", f"{dog}=0.5", "--adapter", f"{ink}=1:2,2:1"],
        "reordered": ["--adapter", f"{ink}=1:2", "--adapter", dog, "--scale", "0.5"],
        "other": ["--adapter", f"{dog}=0.5", "--adapter", ink],
    }
    pictures = {}
    for name, flags in runs.items():
        out = tmp_path / name
        few = "--stage-1-steps 2 --prompt a --device cpu --stage-1"
        generate([*flags, *few.split(), str(random_cascade.stage_1), "--out", str(out)])
        pictures[name] = np.asarray(Image.open(out / "000-a-seed0-stage_1.png"))
    assert np.array_equal(pictures["mixed"], pictures["reordered"])
    assert not np.array_equal(pictures["mixed"], pictures["other"])


def test_the_benchmark_of_switching_runs(random_cascade: RandomCascade) -> None:
    table = switching.main(["--model", str(random_cascade.stage_1), "--repeats", "1"])
    assert "\nswitch  " in table
    assert "\nthen the weights are the base's, to the bit  yes\n" in table
