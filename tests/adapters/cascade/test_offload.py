"""Parts that rest: they work as if they were always there, and rest as they were.

Without a GPU the device is another name of the CPU, to which PyTorch copies likewise.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adapters import Cascade, Sampling, StageSampling, load_cascade
from adapters.cascade.memory_budget import ALL, TEXT
from adapters.cascade.offload import Placement
from adapters.errors import UserError
from adapters.weights.kinds import AdapterSpec
from tests.builders.adapters import export, trained_unet
from tests.builders.random_cascade import RandomCascade

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu", 0)
FEW = Sampling(
    stage_1=StageSampling(steps=2), stage_2=StageSampling(steps=2), stage_3=StageSampling(steps=2)
)


def rested(cascade: RandomCascade, dtype: str = "auto") -> Cascade:
    loaded = load_cascade(cascade.stage_1, cascade.stage_2, cascade.stage_3, dtype=dtype)
    return put_to_rest(loaded, ALL)


def put_to_rest(cascade: Cascade, parts: Collection[str]) -> Cascade:
    cascade.placing = Placement(DEVICE, parts)
    stages = {f"stage_{number}": pipe for number, pipe in cascade.stages.items()}
    for part, pipe in {TEXT: cascade.text, **stages, "stage_3": cascade.upscaler}.items():
        if pipe is not None:
            cascade.placing.settle(part, pipe)
    return cascade


def weights(cascade: Cascade) -> Iterator[tuple[str, Tensor]]:
    for number, pipe in {0: cascade.text, **cascade.stages, 3: cascade.upscaler}.items():
        for part, model in pipe.components.items():
            if isinstance(model, nn.Module):
                for name, weight in model.state_dict().items():
                    yield f"{number} {part} {name}", weight


def test_pictures_are_the_same_and_weights_rest_where_they_were(
    guarded_cascade: RandomCascade, random_cascade: RandomCascade
) -> None:
    for folders in (random_cascade, guarded_cascade):
        plain = load_cascade(folders.stage_1, folders.stage_2, folders.stage_3)
        resting = rested(folders)
        places = {name: weight.data_ptr() for name, weight in weights(resting)}
        at_work = places_at_work(resting)
        expected = plain("a cat", sampling=FEW, progress=False)[0].pictures
        found = resting("a cat", sampling=FEW, progress=False)[0].pictures
        assert set(found) == {1, 2, 3}
        for stage, picture in expected.items():
            assert picture.tobytes() == found[stage].tobytes()
        assert places == {name: weight.data_ptr() for name, weight in weights(resting)}
        assert at_work
        assert at_work.isdisjoint(places.values())  # a copy worked, and is gone


def places_at_work(cascade: Cascade) -> set[int]:
    """Where a weight of Stage II is whenever it works; filled while the cascade draws."""
    seen: set[int] = set()
    cascade.stages[2].unet.conv_in.register_forward_pre_hook(
        lambda module, _: seen.add(module.weight.data_ptr())
    )
    return seen


@pytest.mark.gpu
def test_a_safety_checker_visits_the_pictures_device(guarded_cascade: RandomCascade) -> None:
    checker = load_cascade(guarded_cascade.stage_1).stages[1].safety_checker
    size = checker.config.vision_config.image_size
    shown = torch.rand(2, 3, size, size, dtype=checker.dtype)
    places = {weight.data_ptr() for weight in checker.state_dict().values()}
    seen = set()
    checker.vision_model.register_forward_pre_hook(
        lambda module, _: seen.update(weight.data_ptr() for weight in module.parameters())
    )
    checker(shown.to(DEVICE), np.zeros((2, 8, 8, 3)))
    assert seen
    assert seen.isdisjoint(places)
    assert places == {weight.data_ptr() for weight in checker.state_dict().values()}
    assert checker.device == torch.device("cpu")


@pytest.mark.parametrize("dtype", ["fp32", "nf4"])
def test_adapters_are_merged_into_what_rests(
    random_cascade: RandomCascade, tmp_path: Path, dtype: str
) -> None:
    spec = AdapterSpec(targets="attention+conv")
    base = random_cascade.stage_1
    export(trained_unet(base, spec), tmp_path, base, 1, spec)
    pictures = []
    for resting in (False, True):
        cascade = load_cascade(base, dtype=dtype)
        if resting:
            put_to_rest(cascade, ("stage_1",))
        before = cascade("a cat", sampling=FEW, progress=False)[0].final.tobytes()
        name = cascade.add_adapter(tmp_path)
        after = cascade("a cat", sampling=FEW, progress=False)[0].final.tobytes()
        cascade.remove_adapter(name)
        again = cascade("a cat", sampling=FEW, progress=False)[0].final.tobytes()
        assert before == again != after
        pictures.append((before, after))
    assert pictures[0] == pictures[1]


def test_a_part_rests_again_after_an_error(random_cascade: RandomCascade) -> None:
    cascade = rested(random_cascade)
    places = {name: weight.data_ptr() for name, weight in weights(cascade)}

    def work() -> None:
        with cascade.placing.at_work("stage_1", cascade.stages[1]):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert places == {name: weight.data_ptr() for name, weight in weights(cascade)}


def test_a_part_rests_again_where_there_is_no_room_for_all_of_it(
    random_cascade: RandomCascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    cascade = rested(random_cascade)
    places = {name: weight.data_ptr() for name, weight in weights(cascade)}
    last = list(cascade.stages[1].unet.parameters())[-1].detach()
    copy = Tensor.to

    def full(weight: Tensor, *args: object, **options: object) -> Tensor:
        if args == (DEVICE,) and weight.data_ptr() == last.data_ptr():
            raise torch.OutOfMemoryError("no room")
        return copy(weight, *args, **options)

    monkeypatch.setattr(Tensor, "to", full)
    with pytest.raises(UserError, match="ran out of memory while Stage I drew 1 picture at once"):
        cascade("a cat", sampling=FEW, progress=False)
    assert places == {name: weight.data_ptr() for name, weight in weights(cascade)}


def test_no_more_pictures_are_drawn_at_once_than_there_is_room_for() -> None:
    assert Placement(DEVICE, (), 2).limit(Sampling()).batch_size == 2
    assert Placement(DEVICE, (), 16).limit(Sampling(batch_size=3)).batch_size == 3
    assert Placement(DEVICE).limit(Sampling()) == Sampling()


def test_a_memory_is_a_gpus_and_chooses_precisions(
    random_cascade: RandomCascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="memory='6GB' is for a GPU"):
        load_cascade(random_cascade.stage_1, device="cpu", memory="6GB")
    for odd in ("lots", "0.1GB", ""):
        with pytest.raises(UserError, match="memory must be the memory of a card, such as 6GB"):
            load_cascade(random_cascade.stage_1, device="cpu", memory=odd)


def test_resting_parts_are_loaded_to_rest(random_cascade: RandomCascade) -> None:
    cascade = load_cascade(random_cascade.stage_1)
    placing = replace(cascade.placing, resting=(TEXT,))
    placing.settle(TEXT, cascade.text)
    assert cascade.text.text_encoder.device == torch.device("cpu")
