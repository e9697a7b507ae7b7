"""Sums on the device are those of the losses seen."""

import shutil
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from adapters import progress
from finetune.run import tracking
from finetune.run.tracking import Meter, Tracker, flatten
from finetune.step.inputs import Batch
from finetune.step.losses import Losses
from tests.builders.disks import small_disk


def batch_of(weight: list[float], timesteps: list[int], preserved: Tensor | None = None) -> Batch:
    """A batch of which only what the meter reads is filled in."""
    nothing = torch.empty(0)
    return Batch(
        pixels=nothing,
        prompt_embeds=nothing,
        weight=torch.tensor(weight),
        noise=nothing,
        timesteps=torch.tensor(timesteps),
        preserved=preserved,
    )


def test_the_loss_of_preserved_pictures_is_apart() -> None:
    meter = Meter(1000, torch.device("cpu"), preserves_output=True)
    mse, bound = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.25, 0.5])
    rows = torch.tensor([0, 2])
    hybrid = Losses(total=mse + bound, mse=mse, bound=bound)
    losses = hybrid.with_preserved(rows, torch.tensor([8.0, 16.0]))
    meter.add(losses, batch_of([0.5, 1.0, 0.25], [0, 10, 999], rows))
    meter.add(hybrid, batch_of([0.0, 1.0, 0.0], [0, 10, 999]))  # a batch without any
    meter.add_step(torch.tensor(1.0))
    points = meter.read(Accelerator(cpu=True))
    assert points["loss/preservation"] == pytest.approx((0.5 * 8 + 0.25 * 16) / 2)
    assert points["loss/mse"] == pytest.approx(2.0)
    assert points["loss/bound_bits"] == pytest.approx(0.25)
    parts = [points[f"loss/{part}"] for part in ("mse", "bound_bits", "preservation")]
    assert points["loss"] == pytest.approx(sum(parts))
    assert points["loss_by_noise/quarter_1"] == pytest.approx((2.25 + 1.5 + 2.25) / 3)
    assert points["loss_by_noise/quarter_4"] == pytest.approx(4.5)


def test_the_meter_reads_means_and_starts_again() -> None:
    meter = Meter(1000, torch.device("cpu"))
    for scale in (1.0, 3.0):
        mse = scale * torch.tensor([1.0, 2.0, 4.0])
        bound = torch.tensor([0.5, 0.5, 0.5])
        losses = Losses(total=mse + bound, mse=mse, bound=bound)
        meter.add(losses, batch_of([0.5, 0.5, 0.1], [0, 249, 999]))
        meter.add_step(torch.tensor(scale))
    points = meter.read(Accelerator(cpu=True))
    assert points["loss/mse"] == pytest.approx(2 * (0.5 + 1.0 + 0.4))
    assert points["loss/bound_bits"] == pytest.approx(0.55)
    assert points["loss"] == pytest.approx(points["loss/mse"] + points["loss/bound_bits"])
    assert points["optimizer/gradient_norm"] == pytest.approx(2.0)
    assert points["loss_by_noise/quarter_1"] == pytest.approx(2 * 1.5 + 0.5)
    assert points["loss_by_noise/quarter_4"] == pytest.approx(2 * 4.0 + 0.5)
    assert "loss_by_noise/quarter_2" not in points
    meter.add(losses, batch_of([1.0, 0.0, 0.0], [500, 500, 500]))
    meter.add_step(torch.tensor(7.0))
    points = meter.read(Accelerator(cpu=True))
    assert points["loss/mse"] == pytest.approx(3.0)
    assert "loss/preservation" not in points
    assert points["optimizer/gradient_norm"] == pytest.approx(7.0)


def later(file: Path, seconds: int) -> None:
    """Name a file of events as if it had been begun later."""
    *start, second, rest = file.name.split(".", 4)
    file.rename(file.with_name(".".join([*start, f"{int(second) + seconds:010d}", rest])))


@pytest.mark.parametrize("seconds", [0, 3600])
def test_a_continued_run_replaces_only_the_points_after_it(tmp_path: Path, seconds: int) -> None:
    """In the same second, and after the clock was set back, too."""

    def track(first: int, values: dict[int, float]) -> None:
        tracker = Tracker(Accelerator(cpu=True), tmp_path, "run", first, 10)
        for step, value in values.items():
            tracker.points({"loss": value}, step)
        tracker.close()
        later(max(tmp_path.iterdir()), seconds)

    track(0, {2: 1.0, 4: 1.0, 6: 1.0})
    track(2, {4: 3.0, 6: 3.0})
    track(4, {6: 2.0})
    events = EventAccumulator(str(tmp_path), purge_orphaned_data=True)
    events.Reload()
    assert [(p.step, p.value) for p in events.Scalars("loss")] == [(2, 1.0), (4, 3.0), (6, 2.0)]


def test_the_bars_rate_leaves_skipped_time_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "is_watched", lambda: True)
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    tracker = Tracker(Accelerator(cpu=True), tmp_path, "run", 0, 10)
    before = tracker.bar.start_t, tracker.bar.last_print_t
    tracker.skip_time(1000)
    assert (tracker.bar.start_t, tracker.bar.last_print_t) == (before[0] + 1000, before[1] + 1000)
    tracker.close()


def test_settings_become_columns_by_dotted_name() -> None:
    settings = {"seed": 0, "adapter": {"rank": 4, "alpha": None}, "betas": [0.9, 0.99], "on": True}
    expected = {"seed": 0, "adapter.rank": 4, "betas": "[0.9, 0.99]", "on": "True"}
    assert flatten(settings) == expected


def steps_of(folder: Path, tag: str) -> list[int]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [point.step for point in events.Scalars(tag)]


def test_the_recipe_is_shown_once_whatever_the_number_of_starts(tmp_path: Path) -> None:
    for first in (0, 2, 4):
        tracker = Tracker(Accelerator(cpu=True), tmp_path, "run", first, 10)
        tracker.about({"recipe": f"from: {first}"})
        tracker.points({"loss": 1.0}, first + 2)
        tracker.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (text,) = events.Tensors("recipe/text_summary")
    assert b"from: 4" in text.tensor_proto.string_val[0]
    assert len(events.Tensors("custom_scalars__config__")) == 1
    assert steps_of(tmp_path, "loss") == [2, 4, 6]


def test_what_belongs_together_is_shown_together_or_not_at_all(tmp_path: Path) -> None:
    tracker = Tracker(Accelerator(cpu=True), tmp_path, "run", 0, 10)
    with suppress(KeyboardInterrupt), tracker.together():
        tracker.curves({"loss": 1.0}, 1)
        raise KeyboardInterrupt
    with tracker.together():
        tracker.curves({"loss": 1.0}, 2)
    tracker.close()
    assert steps_of(tmp_path, "loss") == [2]


@pytest.mark.parametrize("trouble", ["full", "gone", "file"])
def test_without_a_place_for_its_events_training_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], trouble: str
) -> None:
    """A full disk, a folder that has gone, or one that cannot be made."""
    folder = tmp_path / "logs"
    if trouble == "file":
        folder.write_text("")
    else:
        folder.mkdir()
    with ExitStack() as mounted:
        if trouble == "full":
            mounted.enter_context(small_disk(folder, "64k"))
        tracker = Tracker(Accelerator(cpu=True), folder, "run", 0, 10)
        tracker.about({"recipe": "seed: 0"})
        if trouble == "gone":
            shutil.rmtree(folder)
        noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        for step in range(4):
            tracker.picture("drawn/samples", Image.fromarray(noise), step)
            with tracker.together():
                tracker.points({"loss": 1.0}, step)
        tracker.hparams({"seed": 0}, ["loss"])
        tracker.close()
    said = "".join(capfd.readouterr())
    assert said.count("TensorBoard's events can no longer be written") == 1
    assert "Traceback" not in said
