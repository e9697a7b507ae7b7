"""Whole runs, launched as a user launches them."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adapters.files.info import read_info
from adapters.pictures.contact_sheet import CELL_PX
from finetune.compare import main as compare
from finetune.data.pictures import load_pictures
from finetune.recipe.file import load_recipe
from finetune.run import stage_run
from finetune.step.inputs import Batch
from finetune.train import gather, main
from tests.builders import ROOT
from tests.builders.processes import train_on_several
from tests.builders.random_cascade import RandomCascade
from tests.builders.small_runs import batches_for

pytestmark = pytest.mark.usefixtures("no_plan")

NAMES = ("stage_1", "stage_2")
FEW_STEPS = {"stage_1": {"steps": 2}, "stage_2": {"steps": 2}}
NO_LOSSES = {"loss_pictures": 0}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(3):
        pixels = rng.integers(0, 256, (80, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def recipe_of(cascade: RandomCascade, pictures: Path, **changes: Any) -> dict[str, Any]:
    stage: dict[str, Any] = {
        "steps": 4,
        "batch_size": 2,
        "adapter": {"rank": 4, "alpha": 8.0},
        "optimizer": {"learning_rate": 0.01, "schedule": "cosine"},
        "checkpoint_every": 2,
    }
    return {
        "name": "run",
        "base": {"stage_1": str(cascade.stage_1), "stage_2": str(cascade.stage_2)},
        "data": {"source": str(pictures), "prompt": "a photo of a sks dog"},
        "prior": {"prompts": ["a photo of a dog"], "count": 2, "sampling": FEW_STEPS},
        "stage_1": stage,
        "stage_2": stage,
        "validation": {
            "prompts": ["a sks dog on blue", "a cat"],
            "every": 2,
            "loss_pictures": 1,
            "sampling": FEW_STEPS,
        },
        "evaluation": {
            "prompts": ["a sks dog on blue"],
            "other_prompts": ["a cat"],
            "identifier": "sks dog",
            "subject": "dog",
            "clip": str(ROOT / "models/if-tiny/clip"),
        },
        "log_every": 2,
        **changes,
    }


def save_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"runs_dir": str(folder / "runs")}))
    return path


def arguments(recipe: Path, *overrides: str) -> list[str]:
    """Arguments of a run whose cache is beside its recipe."""
    return [str(recipe), f"cache_dir={recipe.parent}/cache", *overrides]


def run(recipe: Path, *overrides: str) -> None:
    """Run a recipe in this process."""
    main(arguments(recipe, *overrides))


def launch(recipe: Path) -> subprocess.CompletedProcess[str]:
    """Run a recipe through accelerate's launcher, as the README says."""
    launcher = ["accelerate.commands.launch", "--quiet", "--config_file", "accelerate_config.yaml"]
    return subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "finetune.train", *arguments(recipe)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "ACCELERATE_USE_CPU": "true"},
    )


def adapter_file(run_folder: Path, stage: str) -> Path:
    return run_folder / "adapters" / stage / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def finished_run(
    random_cascade: RandomCascade, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    done = launch(save_recipe(folder, recipe_of(random_cascade, pictures)))
    assert done.returncode == 0, done.stderr
    assert "Adapters:" in done.stdout
    assert "Stage 1: 100%" in done.stderr
    assert "Stage 2: 100%" in done.stderr
    assert "\r" not in done.stderr, "a log has lines in place of bars"
    assert re.search(r"^pictures  +\d+ of ", done.stdout, re.MULTILINE)
    return folder / "runs" / "run"


def test_plain_diffusers_loads_what_a_launch_exports(
    random_cascade: RandomCascade, finished_run: Path
) -> None:
    pipelines = {
        "stage_1": IFPipeline.from_pretrained(random_cascade.stage_1),
        "stage_2": IFSuperResolutionPipeline.from_pretrained(random_cascade.stage_2),
    }
    for stage, pipeline in pipelines.items():
        pipeline.load_lora_weights(adapter_file(finished_run, stage).parent)
        loaded = {n for n, _ in pipeline.unet.named_parameters() if ".lora_" in n}
        written = load_file(adapter_file(finished_run, stage))
        assert len(loaded) == len(written) > 0
        assert any(tensor.abs().max() > 0 for name, tensor in written.items() if "lora_B" in name)


def test_tensorboard_shows_the_run(finished_run: Path) -> None:
    for stage in NAMES:
        events = EventAccumulator(str(finished_run / "logs" / stage))
        events.Reload()
        tags = events.Tags()
        assert {
            "loss",
            "loss/mse",
            "loss/bound_bits",
            "loss/fixed_noise",
            "optimizer/learning_rate",
            "optimizer/gradient_norm",
            "speed/pictures_per_second",
            "speed/peak_memory_gib",
        } <= set(tags["scalars"])
        assert any(tag.startswith("loss_by_noise/quarter_") for tag in tags["scalars"])
        assert [point.step for point in events.Scalars("loss")] == [2, 4]
        assert all(np.isfinite(point.value) for point in events.Scalars("loss"))
        rows = {
            "stage_1": {"samples": [0, 2, 4], "through_stage_2": [4]},
            "stage_2": {"from_stage_1": [0, 2, 4], "shrunk_photos": [0, 2, 4]},
        }[stage]
        shown = {tag: [image.step for image in events.Images(tag)] for tag in tags["images"]}
        assert shown == {f"drawn/{title}": steps for title, steps in rows.items()}
        text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "caption_dropout: 0.1" in text


def test_the_run_keeps_its_recipe_and_its_checkpoints(finished_run: Path) -> None:
    recipe = load_recipe(finished_run / "recipe.yaml")
    assert recipe.name == "run"
    for stage in NAMES:
        names = sorted(p.name for p in (finished_run / "checkpoints" / stage).iterdir())
        assert names == ["step-000002", "step-000004"]


def test_the_adapter_describes_itself(finished_run: Path, random_cascade: RandomCascade) -> None:
    with safe_open(adapter_file(finished_run, "stage_1"), "pt") as file:
        metadata = file.metadata()
    text = json.dumps(metadata)
    for part in (str(random_cascade.stage_1), "caption_dropout", "a sks dog on blue"):
        assert part in text
    card = (finished_run / "adapters" / "README.md").read_text()
    assert "load_cascade" in card


def test_the_comparison_is_drawn_and_scored(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished_run.parent.parent
    compare([str(folder / "recipe.yaml"), f"cache_dir={folder / 'cache'}"])
    shown = capsys.readouterr().out
    assert str(finished_run / "before_after.png") in shown
    assert "tensorboard --logdir" in shown
    sheet = Image.open(finished_run / "before_after.png")
    assert sheet.height > 3 * CELL_PX
    assert re.search(
        r"CLIP-I, generated vs\. real pictures +-?0\.\d{3} +-?0\.\d{3} +0\.\d{3}\n", shown
    )
    report = json.loads((finished_run / "evaluation/scores.json").read_text())
    base, fine_tuned = (report["variants"][name] for name in ("base", "fine_tuned"))
    assert base["clip_i"] != fine_tuned["clip_i"]
    assert base["clip_t_others"]["count"] == 1


def test_the_same_command_again_has_nothing_to_do(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, threads = adapter_file(finished_run, "stage_1").stat().st_mtime_ns, []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    run(finished_run.parent.parent / "recipe.yaml")
    assert threads == [len(os.sched_getaffinity(0))]  # all that this process may use
    assert "Already trained" in capsys.readouterr().out
    assert adapter_file(finished_run, "stage_1").stat().st_mtime_ns == before


def test_a_killed_run_continues_to_the_same_adapter(
    random_cascade: RandomCascade,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_of(random_cascade, pictures, stage_2=None, validation=NO_LOSSES)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder in (straight, killed):
        folder.mkdir()
        save_recipe(folder, recipe)
    run(straight / "recipe.yaml")

    from finetune.run.trainee import Trainee

    update = Trainee.update

    def kill_in_the_last_step(self: Trainee) -> torch.Tensor:
        if self.step == 3:
            raise KeyboardInterrupt
        return update(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainee, "update", kill_in_the_last_step)
        with pytest.raises(SystemExit):
            run(killed / "recipe.yaml")
    assert not (killed / "runs" / "run" / "adapters").exists()
    run(killed / "recipe.yaml")
    ours, theirs = (
        load_file(adapter_file(folder / "runs" / "run", "stage_1")) for folder in (killed, straight)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_longer_run_continues_and_another_recipe_does_not(
    random_cascade: RandomCascade,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = recipe_of(random_cascade, pictures, stage_2=None, validation=NO_LOSSES, prior=None)
    path = save_recipe(tmp_path, recipe)
    run(path, "stage_1.steps=2")
    first = load_file(adapter_file(tmp_path / "runs" / "run", "stage_1"))
    with pytest.raises(SystemExit):
        run(path, "stage_1.steps=3")  # the cosine would have fallen otherwise
    assert "--force continues nonetheless" in capsys.readouterr().err
    run(path, "stage_1.steps=3", "--force")
    second = load_file(adapter_file(tmp_path / "runs" / "run", "stage_1"))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(SystemExit):
        run(path, "stage_1.steps=4", "stage_1.adapter.rank=2")
    error = capsys.readouterr().err
    assert "another recipe (stage_1.adapter.rank is 2, was 4)" in error
    assert "give the recipe a new name" in error


@pytest.mark.parametrize(
    ("launched", "alone", "prior"),
    [
        ((1, 2), [(1, 4), (2, 2), (4, 1)], {"kind": "pictures"}),
        ((2, 2), [(4, 2)], {"kind": "output", "prompts": ["a photo of a dog", "a cat"]}),
    ],
    ids=["pictures", "output"],
)
def test_a_global_batch_trains_the_same_however_it_is_divided(
    random_cascade: RandomCascade,
    pictures: Path,
    tmp_path: Path,
    launched: tuple[int, int],
    alone: list[tuple[int, int]],
    prior: dict[str, Any],
) -> None:
    """Over two processes and over accumulated batches: with prior preservation, of whose pictures
    not all have one, with flips, dropped captions and dropout in the adapter."""
    few = {"loss_pictures": 1}  # which one process measures while the other waits
    tree = recipe_of(random_cascade, pictures, stage_2=None, validation=few, log_every=1)
    tree["data"] |= {"horizontal_flip": True, "caption_dropout": 0.3}
    if prior["kind"] == "pictures":
        prior = tree["prior"] | {"folder": str(pictures)}
    tree["prior"] = prior | {"share": 0.25, "weight": 0.7}
    tree["stage_1"]["adapter"] = {"rank": 4, "targets": "attention+conv", "dropout": 0.2}
    # in full precision, as 8-bit states would magnify what the order of a sum rounds
    tree["stage_1"]["optimizer"] = {"name": "adamw", "learning_rate": 1e-3, "max_grad_norm": 0.1}
    path = save_recipe(tmp_path, tree)

    def sizes(accumulation: int, each: int) -> tuple[str, str]:
        return f"stage_1.accumulation={accumulation}", f"stage_1.batch_size={each}"

    log = tmp_path / "log"
    statuses = train_on_several(log, *arguments(path, "name=launched", *sizes(*launched)))
    assert statuses == [0, 0], log.with_suffix(".err").read_text()
    assert log.read_text().count("Adapters:") == 1
    folder = tmp_path / "runs" / "launched"
    weights, losses = load_file(adapter_file(folder, "stage_1")), points(folder, "loss")
    norms = points(folder, "optimizer/gradient_norm")
    assert min(norms) > 0.1  # that is, clipped
    for divided in alone:
        run(path, f"name=alone-{divided[0]}", *sizes(*divided))
        own = tmp_path / "runs" / f"alone-{divided[0]}"
        assert points(own, "loss") == pytest.approx(losses, rel=1e-5)
        assert points(own, "optimizer/gradient_norm") == pytest.approx(norms, rel=1e-4)
        ours = load_file(adapter_file(own, "stage_1"))
        for name, tensor in weights.items():
            assert torch.allclose(ours[name], tensor, rtol=1e-3, atol=1e-5), name


def test_all_processes_stop_early_together_and_nothing_goes_on_from_there(
    random_cascade: RandomCascade,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only the first of them knows that patience has run out; the others would wait for it."""
    validation = {"every": 1, "loss_pictures": 0, "held_out": 1}
    validation["best"] = {"figure": "held_out", "keep_others": None, "patience": 1}
    tree = recipe_of(random_cascade, pictures, stage_2=None, validation=validation, log_every=1)
    tree |= {"prior": None, "evaluation": None}
    tree["stage_1"]["optimizer"]["learning_rate"] = 1e-30  # too low to change a loss
    path = save_recipe(tmp_path, tree)
    log = tmp_path / "log"
    statuses = train_on_several(log, *arguments(path))
    said = log.read_text() + log.with_suffix(".err").read_text()
    assert statuses == [0, 0], said
    assert said.count("that of step 1 (the run stopped early at step 2)") == 1
    assert len(points(tmp_path / "runs" / "run", "loss")) == 2
    adapter = tmp_path / "runs" / "run" / "adapters" / "stage_1"
    info = read_info(adapter)
    assert (info.step, info.last_step, info.stopped_early) == (2, None, True)  # not worse
    run(path)
    (already,) = capsys.readouterr().out.splitlines()
    assert already.startswith("Already trained")
    run(path, "validation.loss_pictures=1")
    warning, again = capsys.readouterr().out.splitlines()
    ignored = "as it was exported, with other settings (validation.loss_pictures differ): to train"
    assert warning.startswith(f"warning: {adapter} stays {ignored}")
    assert again == already


def test_what_a_recipe_says_of_draws_reaches_the_batches(
    random_cascade: RandomCascade, pictures: Path, tmp_path: Path
) -> None:
    tree = recipe_of(random_cascade, pictures, stage_1=None, validation={}, prior=None)
    tree["stage_2"] |= {"timesteps": {"low": 990}, "noise_level": [7, 8]}
    path = save_recipe(tmp_path, tree)

    def batch(*overrides: str) -> Batch:
        recipe = load_recipe(path, [f"cache_dir={tmp_path / 'cache'}", *overrides])
        loaded = load_pictures(recipe.data, recipe.cache, *recipe.crops_px)
        material = gather(recipe, loaded, Accelerator(cpu=True))
        return batches_for(recipe, material, 2)(0)

    drawn, other = batch("stage_2.batch_size=20"), batch("stage_2.batch_size=20", "seed=1")
    assert (drawn.timesteps >= 990).all()
    assert len(set(drawn.timesteps.tolist())) > 3
    assert drawn.noise_level is not None
    assert set(drawn.noise_level.tolist()) == {7, 8}
    assert not torch.equal(drawn.noise, other.noise)
    assert not torch.equal(drawn.timesteps, other.timesteps)
    accumulated = batch("stage_2.batch_size=5", "stage_2.accumulation=4")
    assert torch.equal(accumulated.noise, drawn.noise[::4])


def points(run_folder: Path, tag: str) -> list[float]:
    """The values of a curve of Stage I."""
    events = EventAccumulator(str(run_folder / "logs" / "stage_1"))
    events.Reload()
    return [point.value for point in events.Scalars(tag)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage_1.stpes=3", "stage_1.stpes: unknown key; did you mean steps?"),
        ("base.stage_1=/nowhere", "/nowhere"),
        ("data.source=/nowhere", "/nowhere"),
        ("stage_1.adapter.targets=[to_x]", "'to_x' matches no"),
        ("stage_1.optimizer.name=paged_adamw_8bit", "paged_adamw_8bit needs a GPU"),
    ],
)
def test_a_mistake_is_one_sentence(
    random_cascade: RandomCascade,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    changes = {"stage_2": None, "validation": NO_LOSSES, "prior": None}
    with pytest.raises(SystemExit) as exit_:
        run(save_recipe(tmp_path, recipe_of(random_cascade, pictures, **changes)), override)
    assert exit_.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "runs" / "run" / "adapters").exists()


def unets_in_memory() -> set[int]:
    found = [each for each in gc.get_objects() if isinstance(each, UNet2DConditionModel)]
    return {id(unet) for unet in found if unet.device.type != "meta"}


def test_a_stage_is_loaded_once_the_one_before_is_out_of_memory(
    random_cascade: RandomCascade,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others, load, found = unets_in_memory(), stage_run.load_trainee, []
    monkeypatch.setattr(
        stage_run, "load_trainee", lambda *a: found.append(unets_in_memory() - others) or load(*a)
    )
    tree = recipe_of(random_cascade, pictures, prior=None)
    tree["validation"] |= {"prompts": ["a cat"], "every": 4}
    run(save_recipe(tmp_path, tree))
    assert found == [set(), set()]


def test_stage_2s_mistakes_are_found_before_stage_1_trains(
    random_cascade: RandomCascade,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = save_recipe(tmp_path, recipe_of(random_cascade, pictures, validation={}, prior=None))
    for override, message in (
        ("stage_2.adapter.targets=[to_x]", "'to_x' matches no"),
        ("stage_1.timesteps.high=1000", "stage_1.timesteps.high must be between 0 and 999"),
        ("stage_2.timesteps.low=1000", "stage_2.timesteps.low must be between 0 and 999"),
        ("stage_2.noise_level=[0, 5000]", "stage_2.noise_level must be between 0 and 999"),
        (f"base.stage_2={random_cascade.stage_1}", "IFSuperResolutionPipeline"),
        (f"base.stage_1={random_cascade.stage_2}", "IFPipeline"),
        ("data.source=./nowhere", "there is no such folder"),
        (
            "prior={prompts: [a dog], folder: nowhere}",
            "prior.folder 'nowhere' is neither a folder nor a zip",
        ),
        ("evaluation.clip=./nowhere", "evaluation.clip must name a CLIP model"),
        ("evaluation.dino=./nowhere", "evaluation.dino must name a DINO or DINOv2 model"),
        (f"evaluation.dino={ROOT / 'models/if-tiny/clip'}", "clip' is of the type 'clip'"),
    ):
        with pytest.raises(SystemExit):
            run(path, override)
        said = capsys.readouterr()
        assert message in said.err.strip().splitlines()[-1]
        assert "memory in training" not in said.out
        assert not (tmp_path / "runs").exists()


def test_a_finished_run_of_another_recipe_is_left_alone(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished_run / "recipe.yaml").read_text()
    with pytest.raises(SystemExit):
        run(finished_run.parent.parent / "recipe.yaml", "stage_1.adapter.rank=2")
    assert "another recipe (stage_1.adapter.rank is 2, was 4)" in capsys.readouterr().err
    assert (finished_run / "recipe.yaml").read_text() == before


def test_an_adapter_whose_checkpoints_are_gone_is_not_overwritten(
    random_cascade: RandomCascade,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {"stage_2": None, "validation": NO_LOSSES, "prior": None}
    path = save_recipe(tmp_path, recipe_of(random_cascade, pictures, **changes))
    run(path, "stage_1.steps=1")
    shutil.rmtree(tmp_path / "runs" / "run" / "checkpoints")
    run(path, "stage_1.steps=1")
    assert "Already trained" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(path, "stage_1.steps=2")
    assert "its checkpoints are gone" in capsys.readouterr().err


def test_a_launched_mistake_ends_without_a_traceback(tmp_path: Path) -> None:
    done = launch(tmp_path / "missing.yaml")
    assert done.returncode != 0
    assert "cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_dry_run_prints_the_resolved_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(ROOT / "recipes" / "quickstart.yaml"), "--dry-run", "seed=5"])
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["seed"] == 5
    assert resolved["stage_1"]["optimizer"]["name"] == "adamw_8bit"
