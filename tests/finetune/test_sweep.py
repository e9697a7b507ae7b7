"""Sweeps of tiny runs on the embedded cascade, interrupted and continued."""

import json
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from finetune.sweep import main
from finetune.sweeping.points import Point
from tests.builders import ROOT
from tests.builders.commands import heed_interrupts, refusal

PATIENCE_S = 600

RATE = "stage_1.optimizer.learning_rate"


def save_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe of two steps of Stage I, scored by one prompt of the subject and one other."""
    recipe = {
        "name": "tiny",
        "base": {"stage_1": str(ROOT / "models/if-tiny/stage_1")},
        "data": {"source": str(ROOT / "datasets/octopus")},
        "stage_1": {"steps": 2, "batch_size": 1, "adapter": {"rank": 2}},
        "evaluation": {
            "prompts": ["a sks octopus on a teal background"],
            "other_prompts": ["a pizza on a green background"],
            "identifier": "sks octopus",
            "subject": "octopus",
            "clip": str(ROOT / "models/if-tiny/clip"),
            "sampling": {"stage_1": {"steps": 2}},
        },
        "log_every": 1,
        "runs_dir": str(folder / "runs"),
        "cache_dir": str(folder / "cache"),
        **changes,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def times(folder: Path, pattern: str) -> dict[str, int]:
    """When each file was written."""
    return {str(file): file.stat().st_mtime_ns for file in sorted(folder.glob(pattern))}


def interrupt_in_the_second_run(recipe: Path, sweep: Path) -> None:
    """Start a sweep of two runs, and press Ctrl-C when the second one has begun."""
    command = [sys.executable, "-m", "finetune.sweep", str(recipe), "--over", f"{RATE}=1e-3,2e-3"]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as running:
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not (sweep / "learning_rate-2e-3/sweep.log").exists():
                assert running.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            children = Path(f"/proc/{running.pid}/task").glob("*/children")
            pids = [pid for listed in children for pid in listed.read_text().split()]
            assert pids
            running.send_signal(signal.SIGINT)
            _, shown = running.communicate(timeout=PATIENCE_S)
        finally:
            running.kill()
    assert running.returncode == 130, shown
    assert "interrupted: 1 of 2 runs are done" in shown
    assert "Run the same command again to continue." in shown
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


class References(HTMLParser):
    """What a page loads and links to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for name, v in attrs if name in ("src", "href", "srcset", "data")]
        assert tag not in ("script", "link", "iframe", "object")


@pytest.mark.timeout(1200)  # six processes, each of which imports everything
def test_an_interrupted_sweep_goes_on_and_trains_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, sweep = save_recipe(tmp_path), tmp_path / "runs/tiny-sweep"
    interrupt_in_the_second_run(recipe, sweep)
    first = sweep / "learning_rate-1e-3"
    kept = times(first, "**/*.*") | times(sweep, "base/*/*.png")
    assert str(first / "scales/scores.json") in kept
    assert not (sweep / "learning_rate-2e-3/adapters").exists()
    known = json.loads((first / "scales/scores.json").read_text())["variants"]

    # several at once, with another scale for the finished run, and a third run that diverges
    over = ["--over", f"{RATE}=1e-3,2e-3,1e30"]
    with pytest.raises(SystemExit) as caught:
        main([str(recipe), *over, "--scales", "0,1", "--at-once", "3"])
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert (
        "1 of 3 runs failed, the first, learning_rate-1e30, with: Training has diverged"
        in shown.err
    )
    assert "report.html" in shown.out
    written = times(first, "**/*.*") | times(sweep, "base/*/*.png")
    changed = {Path(file).name for file in kept if written[file] != kept[file]}
    assert changed <= {"scores.json", "sweep.log", "recipe.yaml"}  # nothing trained or drawn again
    results = json.loads((sweep / "results.json").read_text())
    assert [(row["settings"]["learning_rate"], row["scale"]) for row in results["outcomes"]] == [
        *(("1e-3", 0.0), ("1e-3", 1.0)),
        *(("2e-3", 0.0), ("2e-3", 1.0)),
    ]
    assert [failed["name"] for failed in results["failures"]] == ["learning_rate-1e30"]
    off, on = results["outcomes"][:2]
    assert off["scores"]["preservation"]["mean"] == pytest.approx(1)  # nothing is added to the base
    assert on["scores"]["clip_i"]["mean"] == known["1"]["clip_i"]["value"]
    assert any(row["on_front"] for row in results["outcomes"])
    assert all(row["training_seconds"]["mean"] > 0 for row in results["outcomes"])
    references = References((sweep / "report.html").read_text()).found
    assert len(references) >= 4  # two pictures each of the base and of a run
    assert all(reference.startswith("data:image/") for reference in references)


def test_mistakes_of_all_combinations_are_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = save_recipe(tmp_path)
    over = ["--over", "stage_1.adapter.rank=0,8", "--over", "stage_1.precision=fp32,fp99"]
    with pytest.raises(SystemExit, match="2"):
        main([str(recipe), *over])
    shown = capsys.readouterr().err
    assert "None of the sweep's runs was started: they have 2 mistakes:" in shown
    assert "stage_1.adapter.rank: " in shown
    assert "(rank-0_precision-fp32, rank-0_precision-fp99)" in shown
    assert "(rank-0_precision-fp99, rank-8_precision-fp99)" in shown
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--over", "stage_1.stpes=1,2"], "stage_1.stpes: unknown key; did you mean steps? (all"),
        (
            ["--over", "seed=1,2"],
            "over: seed cannot be varied: name the seeds of training in seeds",
        ),
        (["--over", "stage_1.steps={low: 1, high: 4}"], "a range needs random"),
        (["--random", "4"], "random needs over"),
        (["--scales", "1,1"], "scales: must be different"),
        (["--at-once", "0"], "at_once: "),
        (["--seeds", "a"], "seeds.0: "),
        (["--keep-others", "-1"], "keep_others: "),
        (
            ["--over", "stage_1.steps=1,2", "--against", "step-1"],
            "There is no combination 'step-1' to compare with; did you mean steps-1?",
        ),
        (
            ["--over", "stage_1.steps=1", "--over", "stage_1.steps=2"],
            "--over has stage_1.steps twice; list all values in one",
        ),
        (
            ["--over", "stage_1.steps=1,2", "--over", "stage_1=null"],
            "stage_1.steps is given twice, by stage_1.steps and by stage_1",
        ),
        (
            ["--over", "data.source=a,b", "--across", "pet={dog: {data.source: a}, cat: {}}"],
            "data.source is given twice, by data.source and by pet",
        ),
        (
            ["--over", "pet={dog: {data.source: a}}", "--across", "pet={cat: {seed_: a}}"],
            "pet is given twice, in over and in across",
        ),
        (
            ["--across", "pet={dog: {data.sorce: a}}"],
            "data.sorce: unknown key; did you mean source? (pet-dog)",
        ),
        (
            ["--across", "stage_1.steps={low: 1, high: 4}"],
            "across: stage_1.steps must list values, as scores are averaged over all",
        ),
        (["--across", "pet={dog: {}, cat: {}}"], "the values mean the same as those of pet-dog"),
        (
            ["data.source=a", "--across", "pet={dog: {data: {source: a}}}"],
            "data.source is both varied and set by 'data.source=a'",
        ),
        (["stage_1.steps=7", "--over", "stage_1.steps=10"], "stage_1.steps is both varied and set"),
        (["seed=7", "--seeds", "0,1"], "seed is both varied and set by 'seed=7'"),
        (["--over", "stage_1.steps=10,010"], "the values mean the same as those of steps-10"),
        (["--over", f"{RATE}=1e-3,0.001"], "the values mean the same as those of"),
        (["evaluation=null"], "the recipe needs an evaluation section"),
        (["evaluation.other_prompts=[]"], "the recipe needs an evaluation section"),
    ],
)
def test_a_mistake_is_a_sentence(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(save_recipe(tmp_path)), *arguments])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluation.clip=/nowhere/clip"], "evaluation.clip must name a CLIP model"),
        (["evaluation.dino=/nowhere/dino"], "evaluation.dino must name a DINO or DINOv2 model"),
        (
            ["--over", "validation.held_out=5,6,99"],
            "number of pictures, 6 (got 99). (held_out-99)",
        ),
    ],
)
def test_what_would_stop_a_run_later_is_found_before_the_first(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("finetune.sweeping.work.Workers", None)
    with pytest.raises(SystemExit, match="2"):
        main([str(save_recipe(tmp_path)), *arguments])
    assert said in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("recipe.yaml"))


def test_a_missing_base_is_found_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = save_recipe(tmp_path)
    over = ["--over", f"base.stage_1={ROOT / 'models/if-tiny/stage_1'},nowhere"]
    with pytest.raises(SystemExit, match="2"):
        main([str(recipe), *over])
    assert "nowhere" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("recipe.yaml"))


def test_two_sweeps_do_not_work_in_one_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = save_recipe(tmp_path), tmp_path / "runs/mine"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        said = refusal(capsys, main, recipe, "--over", f"{RATE}=1e-3", "--name", "mine")
    assert f"Another sweep is at work in {folder}" in said


def test_a_file_says_the_same_as_the_command_line(tmp_path: Path) -> None:
    from finetune.sweeping.points import plan_points
    from finetune.sweeping.schema import read_sweep

    recipe, file = save_recipe(tmp_path), tmp_path / "sweep.yaml"
    file.write_text(
        f"recipe: {recipe}\n"
        "name: mine\n"
        "overrides: [stage_1.steps=3]\n"
        "over:\n"
        f"  {RATE}: {{low: 1.0e-4, high: 1.0e-2, log: true}}\n"
        "  stage_1.adapter.rank: [2, 4]\n"
        "random: 3\n"
        "seeds: [0, 1]\n"
        "scales: [0.5, 1]\n"
        "against: rank-4\n"
        "keep_others: 1\n"
    )
    options: dict[str, str | None] = {
        "name": "mine",
        "random": "3",
        "seeds": "0,1",
        "scales": "0.5,1",
        "against": "rank-4",
        "keep_others": "1",
    }
    over = [f"{RATE}={{low: 1.0e-4, high: 1.0e-2, log: true}}", "stage_1.adapter.rank=2,4"]
    typed = read_sweep(recipe, overrides=["stage_1.steps=3"], over=over, options=options)
    filed = read_sweep(file, overrides=[], over=[], options={})
    assert filed.axes == typed.axes
    assert filed.model_dump(exclude={"over"}) == typed.model_dump(exclude={"over"})
    assert (filed.against, filed.keep_others) == ("rank-4", 1)
    (folder, points), (_, same) = plan_points(filed), plan_points(typed)
    assert points == same
    assert folder == tmp_path / "runs/mine"
    assert len(points) == 6
    assert {point.seed for point in points} == {0, 1}
    assert {point.recipe.stage_1.steps for point in points if point.recipe.stage_1} == {3}
    assert all(point.folder == folder / point.name for point in points)


def test_every_combination_is_trained_across_all_subjects_and_seeds(tmp_path: Path) -> None:
    from finetune.sweeping.points import plan_points
    from finetune.sweeping.schema import read_sweep

    pets = "pet={dog: {data.source: dogs, evaluation: {subject: dog}}, cat: {data.source: cats}}"
    over = [f"{RATE}={{low: 1.0e-4, high: 1.0e-2, log: true}}"]
    options: dict[str, str | None] = {"random": "3", "seeds": "0,1"}
    recipe = save_recipe(tmp_path)
    sweep = read_sweep(recipe, overrides=[], over=over, across=[pets], options=options)
    _, points = plan_points(sweep)
    rates = dict.fromkeys(point.settings["learning_rate"] for point in points)
    assert len(rates) == 3
    assert [(p.settings["learning_rate"], p.across["pet"], p.seed) for p in points] == [
        (rate, pet, seed) for rate in rates for pet in ("dog", "cat") for seed in (0, 1)
    ]
    for point in points:
        assert point.recipe.data.source == f"{point.across['pet']}s"
        assert point.recipe.evaluation is not None
        given = {"dog": "dog", "cat": "octopus"}  # the cat keeps the recipe's
        assert point.recipe.evaluation.subject == given[point.across["pet"]]
    assert points[1].name.endswith("_pet-dog_seed-1")


def test_options_replace_what_a_file_says(tmp_path: Path) -> None:
    from finetune.sweeping.schema import read_sweep

    file = tmp_path / "sweep.yaml"
    file.write_text("recipe: a.yaml\nover: {stage_1.steps: [1, 2]}\nat_once: 2\n")
    sweep = read_sweep(
        file, overrides=["seed=1"], over=["stage_1.steps=3"], options={"at_once": "4"}
    )
    assert (sweep.at_once, sweep.overrides) == (4, ("seed=1",))
    assert sweep.over == {"stage_1.steps": ["3"]}
    assert sweep.recipe == "a.yaml"


@pytest.mark.parametrize(("name", "runs"), [("quickstart", 6), ("subjects", 12)])
def test_the_shipped_sweeps_are_valid_and_say_how_to_run(name: str, runs: int) -> None:
    points = plan_shipped(name)
    assert len(points) == runs
    path = f"recipes/sweeps/{name}.yaml"
    assert f"python -m finetune.sweep {path}" in (ROOT / path).read_text()


def test_the_shipped_subjects_leave_nothing_of_one_another() -> None:
    for point in plan_shipped("subjects"):
        words = point.across["subject"].replace("_", " ")
        assert point.recipe.evaluation is not None
        assert point.recipe.evaluation.subject == words
        settings = point.recipe.model_dump_json(exclude={"name"})
        assert ("octopus" in settings) == (words == "octopus")
        assert all(f"sks {words} " in prompt for prompt in point.recipe.validation.prompts)
        captions = (ROOT / point.recipe.data.source / "metadata.jsonl").read_text()
        assert f"a {point.recipe.evaluation.identifier} on" in captions


def plan_shipped(name: str) -> list[Point]:
    """The runs of a shipped sweep."""
    from finetune.sweeping.points import plan_points
    from finetune.sweeping.schema import read_sweep

    sweep = read_sweep(ROOT / f"recipes/sweeps/{name}.yaml", overrides=[], over=[], options={})
    _, points = plan_points(sweep.model_copy(update={"recipe": str(ROOT / sweep.recipe)}))
    return points
