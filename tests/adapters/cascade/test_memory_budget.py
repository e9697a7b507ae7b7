"""What a cascade is made of within a memory: the best that fits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import Parts, load_cascade
from adapters.base.estimates import drawing_inputs
from adapters.base.source import Source
from adapters.cascade import memory_budget
from adapters.cascade.memory_budget import (
    ARRANGEMENTS,
    AT_ONCE,
    choose_arrangement,
    lay_over,
    parse_memory,
)
from adapters.errors import UserError
from adapters.files.stage_adapter import StageAdapter
from adapters.weights.kinds import AdapterSpec
from adapters.weights.updates import LowRank
from tests.builders.adapters import export, trained_unet
from tests.builders.random_cascade import RandomCascade
from unets import tally
from unets.frozen import Quantised
from unets.loading import blank_unet
from unets.tally import DRIVER_BYTES, GIB, Tally, forward_bytes, total_bytes


@pytest.fixture(scope="module")
def random_cascade(wide_cascade: RandomCascade) -> RandomCascade:
    return wide_cascade


@pytest.fixture(autouse=True)
def no_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's libraries keep is far more than all of these tiny models."""
    monkeypatch.setattr(tally, "WORKSPACE_BYTES", 0)
    monkeypatch.setattr(memory_budget, "DRIVER_BYTES", 0)


@pytest.fixture(scope="module")
def sources(random_cascade: RandomCascade) -> dict[int, Source]:
    folders = (random_cascade.stage_1, random_cascade.stage_2, random_cascade.stage_3)
    return {number: Source(str(folder), number) for number, folder in enumerate(folders, 1)}


def gigabytes(size: float) -> str:
    return f"{size / GIB:.9f}GB"


def test_the_best_row_that_fits_is_taken_and_as_many_pictures_as_fit(
    sources: dict[int, Source],
) -> None:
    whole = choose_arrangement(sources, "100GB")
    assert (whole.arrangement, whole.at_once) == (ARRANGEMENTS[0], max(AT_ONCE))
    assert set(whole.weights) == {"text encoder", "stage_1", "stage_2", "stage_3"}
    seen = [whole]

    def less_and_less() -> None:
        while True:
            seen.append(choose_arrangement(sources, gigabytes(seen[-1].peak - 16)))
            assert seen[-1].peak < seen[-2].peak

    with pytest.raises(UserError, match=r"GiB; leave out a stage"):
        less_and_less()
    ranks = [(ARRANGEMENTS.index(each.arrangement), -each.at_once) for each in seen]
    assert ranks == sorted(ranks)
    assert seen[-1].at_once == 1
    assert sum(seen[-1].weights.values()) < sum(whole.weights.values())


def test_only_what_is_asked_for_is_counted(sources: dict[int, Source]) -> None:
    one = choose_arrangement({1: sources[1]}, "100GB", text_encoder=False)
    assert set(one.weights) == {"stage_1"}
    assert one.peak < choose_arrangement(sources, "100GB").peak
    assert "stage_1       bf16" in str(one)
    assert "8 at a time" in str(one)


@pytest.mark.parametrize("stage", [1, 2])
def test_what_drawing_holds_is_what_a_real_forward_pass_holds(
    sources: dict[int, Source], stage: int
) -> None:
    pictures, cpu = 4, torch.device("cpu")
    blank = blank_unet(sources[stage].unet_config, "fp32", cpu)
    inputs = drawing_inputs(blank, pictures)
    foreseen = forward_bytes(blank, inputs, blank.state_dict().values())
    unet = sources[stage].unet("fp32", cpu)
    given = {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in inputs.items()}
    with torch.no_grad(), Tally([*unet.state_dict().values(), *given.values()]) as taken:
        unet(**given)
    assert foreseen == pytest.approx(taken.peak_bytes, rel=0.05)


@pytest.mark.parametrize("memory", ["6GB", "6 gb", "6GiB", "6"])
def test_a_memory_is_the_cards_less_the_drivers(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_budget, "DRIVER_BYTES", DRIVER_BYTES)
    assert parse_memory(memory) == 6 * GIB - DRIVER_BYTES


@pytest.mark.parametrize("memory", ["", "much", "6TB", "-6GB", "0GB"])
def test_what_is_no_memory_is_said_to_be_none(memory: str) -> None:
    with pytest.raises(UserError, match="memory must be the memory of a card, such as 6GB"):
        parse_memory(memory)


def test_a_safety_checker_takes_room_too(
    random_cascade: RandomCascade, guarded_cascade: RandomCascade
) -> None:
    def peak(cascade: RandomCascade, *stages: int) -> int:
        named = dict(enumerate(folders(cascade), 1))
        return choose_arrangement({n: Source(str(named[n]), n) for n in stages}, "100GB").peak

    checker = load_cascade(guarded_cascade.stage_1).stages[1].safety_checker
    size = sum(weight.numel() for weight in checker.parameters()) * 2
    for stages in ((2,), (2, 3)):  # it visits one stage at a time
        more = peak(guarded_cascade, *stages) - peak(random_cascade, *stages)
        assert more == pytest.approx(size, rel=0.1)


def test_what_adapters_keep_on_the_device_is_counted(
    random_cascade: RandomCascade, tmp_path: Path
) -> None:
    base, places = random_cascade.stage_1, []
    for kind in ("lora", "dora", "loha"):
        spec = AdapterSpec(kind=kind, rank=3, targets=("to_q", "mid_block.*.to_v"))
        places.append(export(trained_unet(base, spec), tmp_path / kind, base, 1, spec).folder)
    options = {"device": "cpu", "parts": Parts(text_encoder=False)}
    cascade = load_cascade(base, adapters=places, dtype="nf4", **options)
    updates = [u for own in cascade.merged[1]._updates.values() for u in own.values()]
    overlays = [m.overlay for m in cascade.stages[1].unet.modules() if isinstance(m, Quantised)]
    objects = [u for u in updates if isinstance(u, LowRank)] + [o for o in overlays if o]
    kept = [t for each in objects for t in vars(each).values() if isinstance(t, torch.Tensor)]
    adapters = [StageAdapter.load(place) for place in places]
    unet = blank_unet(Source(str(base), 1).unet_config, "nf4", torch.device("cpu"))
    assert total_bytes(lay_over(unet, adapters)) == total_bytes(kept)


def test_a_cascade_counts_the_adapters_that_it_is_loaded_with(
    random_cascade: RandomCascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, spec = random_cascade.stage_2, AdapterSpec(kind="loha", targets=("to_q",))
    place = export(trained_unet(base, spec), tmp_path, base, 2, spec).folder
    more = []

    def count(sources: dict[int, Source], memory: str, **given: Any) -> None:
        with_them = choose_arrangement(sources, memory, **given).weights
        without = choose_arrangement(sources, memory, **given | {"adapters": {}}).weights
        more.extend(part for part, size in with_them.items() if size > without[part])
        raise UserError("counted")

    monkeypatch.setattr("adapters.cascade.load.choose_arrangement", count)
    monkeypatch.setattr("adapters.cascade.load.find_device", torch.device)
    monkeypatch.setattr(memory_budget, "ARRANGEMENTS", ARRANGEMENTS[-1:])
    with pytest.raises(UserError, match="counted"):
        load_cascade(
            stage_2=base,
            adapters=[(place, 0.5)],
            device="cuda",
            memory="6GB",
            parts=Parts(text_encoder=False),
        )
    assert more == ["stage_2"]


def folders(cascade: RandomCascade) -> tuple[Path, Path, Path]:
    return cascade.stage_1, cascade.stage_2, cascade.stage_3
