"""What validation measures, and that the best of the validations is exported."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import IFSuperResolutionPipeline
from PIL import Image
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from adapters.errors import UserError
from adapters.files.info import read_info
from finetune.data.batches import Batches
from finetune.data.pictures import Picture
from finetune.recipe.schema import Recipe, Timesteps
from finetune.run import stage_run
from finetune.run.checkpoints import list_checkpoints, load_checkpoint
from finetune.run.figures import CLIP_I, FIXED_NOISE, HELD_OUT, OTHERS_CLIP_T, floor_of
from finetune.run.fixed_losses import FixedLosses, check_held_out, hold_out, spread_timesteps
from finetune.run.folders import (
    Folders,
    explain_ignored,
    is_finished,
    list_unfinished,
    select_identity,
)
from finetune.run.measures import Measures, Score, read_history
from finetune.run.picture_losses import tabulate_losses
from finetune.run.trainee import Trainee
from finetune.run.validation import DrawnRow
from finetune.step.stages import STAGES
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import (
    batches_for,
    events_of,
    exported,
    flat,
    logged,
    material_of,
    recipe_of,
    saved_weights,
    train,
    trainee_of,
)

FAST = {"stage_1": {"steps": 1}, "stage_2": {"steps": 1}}
DRAWN = {"prompts": ["a sks dog"], "other_prompts": ["a cat"], "every": 1, "sampling": FAST}
QUIET = {"through_stage_2": "never", "loss_pictures": 0}
EVALUATION = {
    "identifier": "sks dog",
    "subject": "dog",
    "prompts": ["a sks dog"],
    "clip": "not loaded",
}

Make = Callable[..., Recipe]


@pytest.fixture
def make(random_cascade: RandomCascade, tmp_path: Path) -> Make:
    def build(folder: str = "run", **options: Any) -> Recipe:
        return recipe_of(random_cascade, tmp_path / folder, **options)

    return build


def judged(make: Make, best: dict[str, Any], **options: Any) -> Recipe:
    validation = {**DRAWN, **QUIET, "best": best}
    return make(validation=validation, evaluation=EVALUATION, **options)


def scoring(likeness: Sequence[float], others: Sequence[float] | None = None) -> Score:
    """A score that follows given curves, validation by validation; it ends in an interruption.

    Four pictures rise and fall as one, so that no change is chance.
    """
    points = iter(zip(likeness, others or [1.0] * len(likeness), strict=True))

    def score(drawn: Sequence[DrawnRow]) -> dict[str, list[float]]:
        found = next(points, None)
        if found is None:
            raise InterruptedError
        return {tag: [value] * 4 for tag, value in zip((CLIP_I, OTHERS_CLIP_T), found, strict=True)}

    return score


def assert_exported(recipe: Recipe, step: int) -> None:
    """The export is the weights of a step, and the adapter says so."""
    assert torch.equal(flat(exported(recipe)), saved_weights(recipe)[step])
    assert read_info(Folders(recipe.folder).adapters / "stage_1").step == step


@pytest.mark.parametrize(
    ("stage", "optimizer"),
    [({"adapter": {"rank": 2, "dropout": 0.5}, "ema_decay": 0.9}, {}), ({}, "schedule_free")],
    ids=["dropout and average", "schedule-free"],
)
def test_measuring_does_not_change_training(
    make: Make, stage: dict[str, Any], optimizer: object
) -> None:
    options: dict[str, Any] = {"stage": stage}
    if optimizer == "schedule_free":
        options["optimizer"] = {"name": "schedule_free", "betas": None, "learning_rate": 0.03}
    settings = {**DRAWN, "every": 2, "through_stage_2": "never"}
    measured = make("measured", validation=settings, **options)
    plain = make("plain", validation={"loss_pictures": 0}, **options)
    exports = [train(recipe, 1) for recipe in (measured, plain)]
    assert torch.equal(saved_weights(measured), saved_weights(plain))
    assert torch.equal(flat(exports[0]), flat(exports[1]))
    assert logged(measured, "loss") == logged(plain, "loss")
    assert len(logged(measured, FIXED_NOISE)) == 3


@pytest.mark.parametrize("number", [1, 2])
def test_losses_at_fixed_noise_depend_on_the_weights_alone(make: Make, number: int) -> None:
    measured, trainee = [], trainee_of(make(stages=(number,)), number)
    for size, seed in ((2, 0), (3, 1)):
        recipe = make(stage={"batch_size": size}, stages=(number,), seed=seed)
        material = material_of(recipe, count=2)
        measured.append(FixedLosses(batches_for(recipe, material, number), material.pictures))
    one, other = measured
    with trainee.final_weights():
        losses = one(trainee)
        assert one(trainee) == losses
        assert other(trainee) == pytest.approx(losses, rel=1e-5)
    assert losses[0] != losses[1]


def test_stage_2s_held_out_loss_is_what_plain_diffusers_computes(make: Make) -> None:
    """Before the first step and after the last, from the pictures' files and the exported adapter.

    Only the draws are the run's own: the noises and the augmentation levels.
    """
    optimizer = {"learning_rate": 0.05}
    validation = {"held_out": 1, "loss_pictures": 0, "every": 4}
    recipe = make(stages=(2,), optimizer=optimizer, validation=validation)
    train(recipe, 2)
    material = material_of(recipe)
    _, (picture,) = hold_out(material.pictures, 1, recipe.seed)
    square = Image.fromarray(np.load(picture.file)).crop((8, 0, 88, 80))  # of 96 x 80 pixels
    taught = square.resize((64, 64), Image.Resampling.BICUBIC)
    below = taught.resize((16, 16), Image.Resampling.BICUBIC)
    pixels, small = (
        torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
        for image in (taught, below)
    )
    draws = [row.example(at, 0) for at, row in enumerate(held_out_rows(recipe, picture))]
    base = recipe.base.stage_2
    pipeline = IFSuperResolutionPipeline.from_pretrained(base)
    found = []
    for adapter in (None, Folders(recipe.folder).adapters / "stage_2"):
        if adapter is not None:
            pipeline.load_lora_weights(adapter)
        unet, errors = pipeline.unet.double(), []
        for timestep, drawn in zip(TIMESTEPS_OF_1000, draws, strict=True):
            at, level = torch.tensor([timestep]), drawn["noise_level"][None]
            noisy = pipeline.scheduler.add_noise(pixels, drawn["noise"][None], at)
            large = F.interpolate(small, (64, 64), mode="bilinear", align_corners=True)
            low_res = drawn["low_res_noise"][None]
            low_res = pipeline.image_noising_scheduler.add_noise(large, low_res, level)
            with torch.no_grad():
                predicted = unet(
                    torch.cat([noisy, low_res], dim=1).double(),
                    at,
                    material.prompt_embeds[picture.caption][None].double(),
                    class_labels=level,
                ).sample
            errors.append((predicted[:, :3] - drawn["noise"]).square().mean().item())
        found.append(sum(errors) / len(errors))
    assert logged(recipe, HELD_OUT, 2) == pytest.approx(found, rel=1e-5)
    assert abs(found[1] - found[0]) > 1e-3 * found[0]


def held_out_rows(recipe: Recipe, picture: Picture) -> list[Batches]:
    """The rows of a run's held-out picture in Stage II, each of which has draws of its own."""
    return FixedLosses(batches_for(recipe, material_of(recipe), 2), [picture]).rows


TIMESTEPS_OF_1000 = (62, 187, 312, 437, 562, 687, 812, 937)


def test_fixed_losses_are_of_evenly_spread_timesteps() -> None:
    assert spread_timesteps(Timesteps(), 1000) == list(TIMESTEPS_OF_1000)
    assert spread_timesteps(Timesteps(low=500, high=507), 1000) == list(range(500, 508))


def test_held_out_pictures_are_not_trained_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, original = [], stage_run.build_batches

    def build(*arguments: Any) -> Batches:
        trained.append(original(*arguments))
        return trained[-1]

    monkeypatch.setattr(stage_run, "build_batches", build)
    recipe = make(validation={"held_out": 1, "every": 2})
    pictures = material_of(recipe).pictures
    kept, held_out = hold_out(pictures, 1, recipe.seed)
    assert sorted(p.source for p in [*kept, *held_out]) == sorted(p.source for p in pictures)
    train(recipe)
    tags = events_of(recipe).Tags()["scalars"]
    own = {tag.partition("/")[2] for tag in tags if tag.startswith("loss_by_picture/")}
    assert own == {picture.source for picture in kept}
    assert [list(batches.pictures) for batches in trained] == [kept]
    assert [point.step for point in events_of(recipe).Scalars(HELD_OUT)] == [0, 2, 4]
    with pytest.raises(UserError, match="must be less than the number of pictures, 3"):
        check_held_out(3, len(pictures))
    stage = STAGES[1]
    identities = [select_identity(each.model_dump(mode="json"), stage) for each in (recipe, make())]
    assert identities[0] != identities[1]


def test_the_first_view_has_the_base_a_layout_and_a_row_to_compare(make: Make) -> None:
    recipe = judged(make, {"keep_others": None})
    train(recipe, score=scoring([0.1, 0.3, 0.5, 0.2, 0.2]))
    events = events_of(recipe)
    tags = events.Tags()
    for row in ("drawn/samples", "drawn/samples_of_others"):
        assert [image.step for image in events.Images(row)] == [0, 1, 2, 3, 4]
    assert logged(recipe, CLIP_I) == pytest.approx([0.1, 0.3, 0.5, 0.2, 0.2])
    assert logged(recipe, floor_of(CLIP_I)) == pytest.approx([0.1] * 5)
    layout = Layout.FromString(
        events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    )
    assert [category.title[:2] for category in layout.category] == ["1.", "2.", "3."]
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(events.summary_metadata)
    assert "exported/text_summary" in tags["tensors"]
    assert logged(recipe, "exported/step") == [2]


def test_the_best_validation_is_exported(make: Make) -> None:
    recipe = judged(make, {"figure": "clip_i"}, stage={"keep_checkpoints": 1})
    train(recipe, score=scoring([0.1, 0.5, 0.9, 0.7, 0.6], [1.0, 1.0, 0.8, 0.98, 0.99]))
    kept = list_checkpoints(Folders(recipe.folder).checkpoints(STAGES[1]))
    assert [folder.name for folder in kept] == ["step-000004"]  # the best has been pruned
    again = judged(make, {"figure": "clip_i"}, name="again")
    train(again, score=scoring([0.1, 0.5, 0.9, 0.7, 0.6], [1.0, 1.0, 0.8, 0.98, 0.99]))
    assert_exported(again, 3)
    assert torch.equal(flat(exported(recipe)), flat(exported(again)))
    info = read_info(Folders(recipe.folder).adapters / "stage_1")
    assert (info.step, info.last_step) == (3, 4)
    assert info.choice is not None
    assert "98.0% of the base's" in info.choice
    assert info.choice in (Folders(recipe.folder).adapters / "README.md").read_text()
    tree = recipe.model_dump(mode="json")
    assert is_finished(
        STAGES[1], 4, select_identity(tree, STAGES[1]), Folders(recipe.folder), patience=None
    )


def test_without_a_choice_the_last_is_exported(make: Make) -> None:
    recipe = make(validation={**DRAWN, **QUIET})
    train(recipe, score=scoring([0.1, 0.9, 0.5, 0.4, 0.3]))
    assert_exported(recipe, 4)


def test_the_average_of_the_best_validation_is_exported(make: Make) -> None:
    recipe = judged(make, {"figure": "clip_i", "keep_others": None}, stage={"ema_decay": 0.9})
    train(recipe, score=scoring([0.1, 0.2, 0.3, 0.2, 0.2]))
    folder = Folders(recipe.folder).checkpoints(STAGES[1]) / "step-000002"
    assert torch.equal(flat(exported(recipe)), flat(load_checkpoint(folder)["average"]))


def test_patience_ends_a_run_early_and_for_good(make: Make) -> None:
    recipe = judged(make, {"keep_others": None, "patience": 2})
    train(recipe, score=scoring([0.1, 0.5, 0.4, 0.3]))
    assert_exported(recipe, 1)
    info = read_info(Folders(recipe.folder).adapters / "stage_1")
    assert info.stopped_early
    assert info.last_step == 3
    train(recipe, score=scoring([]))  # neither trains nor validates, but exports again
    assert_exported(recipe, 1)
    identity = select_identity(recipe.model_dump(mode="json"), STAGES[1])
    for patience, finished in ((1, True), (2, True), (3, False), (None, False)):
        found = is_finished(STAGES[1], 4, identity, Folders(recipe.folder), patience=patience)
        assert found == finished
    more = judged(make, {"keep_others": None, "patience": 3})
    train(more, score=scoring([0.2]))  # goes on
    assert_exported(more, 1)
    info = read_info(Folders(recipe.folder).adapters / "stage_1")
    assert (info.last_step, info.stopped_early) == (4, False)  # the last step ends it anyway


@pytest.mark.parametrize(
    ("before", "now", "scored", "changed"),
    [
        ({}, {}, EVALUATION, "validation.best.figure"),
        ({"best": {"keep_others": 0.5}}, {}, EVALUATION, "validation.best.keep_others"),
        (
            {"best": {"keep_others": None}},
            {"seed": 5},
            {**EVALUATION, "subject": "animal"},
            "(validation.seed, evaluation.subject)",
        ),
    ],
    ids=["no best", "bound", "seed and subject"],
)
def test_other_settings_begin_the_history_again(
    make: Make,
    before: dict[str, Any],
    now: dict[str, Any],
    scored: dict[str, Any],
    changed: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Figures that do not compare are not compared, and the weights are those of the step named."""
    first = make(validation={**DRAWN, **QUIET, **before}, evaluation=EVALUATION)
    train(first, score=scoring([0.1, 0.5, 0.9, 0.4, 0.3]))  # the best is that of step 2
    validation = {**DRAWN, **QUIET, "best": {"keep_others": None}, **now}
    recipe = make(validation=validation, evaluation=scored, stage={"steps": 6})
    train(recipe, score=scoring([0.1, 0.4, 0.7, 0.6]))  # of the base and of steps 4 to 6
    assert_exported(recipe, 5)
    output = capfd.readouterr()
    assert changed in output.out + output.err
    assert "history begins again at step 4" in output.out + output.err
    assert logged(recipe, floor_of(CLIP_I))[-3:] == pytest.approx([0.1] * 3)


def test_a_history_that_begins_again_begins_with_the_base(make: Make) -> None:
    drawn_first = []

    def score(drawn: Sequence[DrawnRow]) -> dict[str, float]:
        drawn_first.append([picture.tobytes() for each in drawn for picture in each.pictures])
        return {CLIP_I: 0.5}

    settings = {**DRAWN, **QUIET, "loss_pictures": 2, "every": 4}
    train(make(validation=settings, evaluation=EVALUATION), score=score)
    best = {**settings, "best": {"keep_others": None}}
    recipe = make(validation=best, evaluation=EVALUATION)
    train(recipe, score=score)
    base, trained, base_again, trained_again = drawn_first
    assert base == base_again != trained
    assert trained == trained_again
    measured = logged(recipe, FIXED_NOISE)
    assert measured[1] == measured[2]


def test_the_weights_of_another_step_are_never_exported(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainee, "copy_weights", lambda trainee: {})
    monkeypatch.setattr(Measures, "best_step", 3)
    with pytest.raises(RuntimeError, match="are those of step 1, not 3"):
        train(judged(make, {"keep_others": None}), score=scoring([0.1, 0.5, 0.4, 0.3, 0.2]))


def test_a_finished_run_says_which_settings_it_ignores(make: Make) -> None:
    recipe = judged(make, {"keep_others": None, "patience": 2})
    train(recipe, score=scoring([0.1, 0.2, 0.3, 0.4, 0.5]))
    assert explain_ignored(recipe, STAGES[1]) == []
    for best, changed in (
        ({"keep_others": None, "patience": 3}, r"\(validation.best.patience differ\)"),
        ({"keep_others": 0.5, "patience": 2}, r"\(validation.best.keep_others differ\)"),
    ):
        other = judged(make, best)
        assert not list_unfinished(other)
        assert re.search(changed, "".join(explain_ignored(other, STAGES[1])))


def test_without_a_measured_figure_the_last_is_exported_and_said(make: Make) -> None:
    recipe = judged(make, {})
    train(recipe, score=scoring([math.nan] * 5))
    assert_exported(recipe, 4)
    choice = read_info(Folders(recipe.folder).adapters / "stage_1").choice or ""
    assert "so the last step is exported" in choice
    assert "nan" not in choice


def test_the_row_of_a_run_has_the_figures_of_the_exported_step(make: Make) -> None:
    recipe = judged(make, {"keep_others": None})
    train(recipe, score=scoring([0.1, 0.2, 0.9, 0.4, 0.3]))
    assert logged(recipe, "exported/clip_i") == pytest.approx([0.9])
    data = events_of(recipe).summary_metadata["_hparams_/experiment"].plugin_data.content
    assert b"exported/clip_i" in data
    assert CLIP_I.encode() not in data


@pytest.mark.parametrize("interrupted", [2, 4])
def test_an_interrupted_run_chooses_as_an_uninterrupted_one(make: Make, interrupted: int) -> None:
    likeness = [0.1, 0.5, 0.9, 0.7, 0.6]
    whole = judged(make, {"keep_others": None}, name="whole")
    train(whole, score=scoring(likeness))
    recipe = judged(make, {"keep_others": None})
    with pytest.raises(InterruptedError):
        train(recipe, score=scoring(likeness[:interrupted]))
    train(recipe, score=scoring(likeness[interrupted:]))
    assert_exported(recipe, 2)
    assert torch.equal(flat(exported(recipe)), flat(exported(whole)))
    assert logged(recipe, CLIP_I) == logged(whole, CLIP_I)


def test_trouble_is_reported_once(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = make(validation={**DRAWN, **QUIET})

    def score(drawn: Sequence[DrawnRow]) -> dict[str, float | list[float]]:
        return {CLIP_I: 0.2, OTHERS_CLIP_T: [0.25, 0.5]}

    train(recipe, score=score)
    output = capfd.readouterr()
    assert (output.out + output.err).count("warning: Step 2: Nothing is learnt so far") == 1
    assert "warnings/learns_nothing/text_summary" in events_of(recipe).Tags()["tensors"]
    assert logged(recipe, OTHERS_CLIP_T) == [0.375] * 5
    saved = list_checkpoints(Folders(recipe.folder).checkpoints(STAGES[1]))[-1]
    history = read_history(load_checkpoint(saved)["measures"])
    assert [each.by_picture for each in history] == [{OTHERS_CLIP_T: [0.25, 0.5]}] * len(history)


def test_the_picture_that_is_learnt_least_is_named() -> None:
    table = tabulate_losses(
        ["busy.png", "odd.png", "plain.png"], [0.4, 0.1, 0.1], [0.2, 0.09, 0.05]
    )
    rows = [line.split(" | ")[0] for line in table.splitlines()[2:5]]
    assert rows == ["| odd.png", "| busy.png", "| plain.png"]
    said = "Learnt least: odd.png, with 90% of its loss left; the others have 50% (median)."
    assert said in table


def test_a_picture_without_a_loss_at_first_is_listed() -> None:
    table = tabulate_losses(
        ["none.png", "some.png", "plain.png"], [0.0, 0.0, 0.1], [0.0, 0.1, 0.05]
    )
    rows = table.splitlines()[2:5]
    assert rows[0] == "| some.png | 0.1000 | 0.0000 | ∞ |"
    assert rows[2] == "| none.png | 0.0000 | 0.0000 | 0% |"
