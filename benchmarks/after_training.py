"""Draw with the runs of sweeps in other ways than they were judged in, and compare the outcome.

    python -m benchmarks.after_training runs/choice drawing --processes 14
    python -m benchmarks.after_training runs/stage_2 enlarging --processes 14
    python -m benchmarks.after_training runs/best exporting --processes 14

`drawing` scores the runs' adapters as their evaluation does, with other numbers of sampling steps,
solvers, precisions of the base and scales of the adapter (`WAYS`). `enlarging` gives Stage II what
is no picture of Stage I: true renders of the evaluation's captions, shrunk, which it enlarges with
each combination's adapters and with none; PSNR and SSIM compare them with the renders. `exporting`
scores what `validation.best` chose, and beside it the last step of the same training, from its
checkpoint. Processes are shared out over the GPUs. Prints the mean over a combination's runs, and
their range.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from adapters.tables import format_table
from models.truth_of_sweeps import Run, read_runs

RENDERS = 2
"""The number of true renders of each caption."""


def steps(stage_1: int, stage_2: int = 10) -> dict[str, Any]:
    """Return settings of sampling with other numbers of steps."""
    return {"sampling": {"stage_1": {"steps": stage_1}, "stage_2": {"steps": stage_2}}}


WAYS: Mapping[str, dict[str, Any]] = {
    "as trained": {},
    "10 steps": steps(10),
    "15 steps": steps(15),
    "50 steps": steps(50),
    "100 steps": steps(100),
    "Stage II in 5 steps": steps(25, 5),
    "Stage II in 25 steps": steps(25, 25),
    "DPM-Solver++, 10 steps": {**steps(10), "solver": "dpmsolver++"},
    "DPM-Solver++, 15 steps": {**steps(15), "solver": "dpmsolver++"},
    "DPM-Solver++, 25 steps": {**steps(25), "solver": "dpmsolver++"},
    "SDE-DPM-Solver++, 15 steps": {**steps(15), "solver": "sde-dpmsolver++"},
    "SDE-DPM-Solver++, 25 steps": {**steps(25), "solver": "sde-dpmsolver++"},
    "bf16": {"precision": "bf16"},
    "int8": {"precision": "int8"},
    "nf4": {"precision": "nf4"},
    "scale 0.6": {"scale": 0.6},
    "scale 0.8": {"scale": 0.8},
    "scale 1.2": {"scale": 1.2},
}
"""What each way of drawing changes."""


def draw(run: Run, way: str) -> dict[str, float]:
    """Evaluate a run's adapters as they draw one way: fidelity, preservation and CLIP-T."""
    from finetune.evaluation.drawing import FINE_TUNED
    from finetune.evaluation.measurement import evaluate
    from finetune.run.folders import Folders
    from finetune.sweeping.outcomes import compute_figures

    changes = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:  # the base's pictures, which the solver changes
        recipe = change(run, changes, folder)
        if solver := changes.get("solver"):
            solve_with(solver)
        try:
            adapters = {Folders(run.recipe.folder).adapters: changes.get("scale", 1.0)}
            report = evaluate(recipe, adapters)
        finally:
            solve_with(None)
    found = compute_figures(report.as_json(), FINE_TUNED)
    return {name: found[name] or math.nan for name in ("fidelity", "preservation", "clip_t")}


def change(run: Run, changes: Mapping[str, Any], cache_dir: str) -> Any:
    """Change a run's recipe: how it draws, the base's precision, and where its cache is."""
    from finetune.recipe.schema import Recipe

    tree = run.recipe.model_dump()
    tree["cache_dir"] = cache_dir
    for stage, settings in changes.get("sampling", {}).items():
        tree["validation"]["sampling"][stage] |= settings
    for stage in ("stage_1", "stage_2"):
        if tree[stage] and (precision := changes.get("precision")):
            tree[stage]["precision"] = precision
    return Recipe.model_validate(tree)


UNCHANGED: dict[type, Callable[..., Any]] = {}
"""The pipelines' own calls."""


def solve_with(algorithm: str | None) -> None:
    """Let the pipelines draw with DPM-Solver++ of an algorithm; ``None``: with their own scheduler.

    The noise is predicted as in training; the learned variance, which these solvers have no use
    for, is left out, and the predicted picture is thresholded as the pipelines' scheduler does.
    """
    from diffusers import DPMSolverMultistepScheduler, IFPipeline, IFSuperResolutionPipeline

    for pipeline in (IFPipeline, IFSuperResolutionPipeline):
        own = UNCHANGED.setdefault(pipeline, pipeline.__call__)

        def call(self: Any, *arguments: Any, own: Any = own, **settings: Any) -> Any:
            scheduler = self.scheduler
            self.scheduler = DPMSolverMultistepScheduler.from_config(
                scheduler.config,
                algorithm_type=algorithm,
                variance_type="learned_range",
                lambda_min_clipped=-5.1,  # as DeepFloyd publishes it for its cosine schedule
            )
            try:
                return own(self, *arguments, **settings)
            finally:
                self.scheduler = scheduler

        pipeline.__call__ = own if algorithm is None else call


def enlarge(run: Run, way: str) -> dict[str, float]:
    """Enlarge shrunk true renders by the base's Stage II or a run's; PSNR in dB, and SSIM."""
    from adapters import load_cascade
    from finetune.data.batches import shrink
    from finetune.run.folders import Folders
    from finetune.step.stages import STAGES
    from models.picture_scores import render_true

    recipe, settings = run.recipe, run.settings
    size_px, low_res_px = (recipe.source(STAGES[number]).picture_size_px for number in (2, 1))
    prompts = {
        kind: [prompt for prompt in prompts for _ in range(RENDERS)]
        for kind, prompts in (("own", settings.prompts), ("others", settings.other_prompts))
    }
    adapters = Folders(recipe.folder).adapters / "stage_2"
    cascade = load_cascade(None, recipe.base.stage_2, adapters=adapters if way else None)
    scores: dict[str, float] = {}
    for kind, texts in prompts.items():
        captions = [text.replace(settings.identifier, settings.subject) for text in texts]
        true = [render_true([text], 1, seed, size_px)[0] for seed, text in enumerate(captions)]
        drawn = cascade(
            texts,
            low_res=[shrink(picture, low_res_px) for picture in true],
            seed=settings.seed,
            sampling=settings.sampling or recipe.validation.sampling,
        )
        for name, value in compare(drawn.final, true).items():
            scores[f"{name}, {kind}"] = value
    return scores


def export(run: Run, way: str) -> dict[str, float]:
    """Score a run's exported adapters, or those of its last step, and give Stage I's step."""
    from adapters.files.info import read_info
    from finetune.evaluation.drawing import FINE_TUNED
    from finetune.evaluation.measurement import evaluate
    from finetune.run.folders import Folders
    from finetune.sweeping.outcomes import compute_figures

    with tempfile.TemporaryDirectory() as folder:
        adapters = Folders(run.recipe.folder).adapters
        if way == "last":
            adapters = export_last(run, Path(folder))
        found = compute_figures(evaluate(run.recipe, {adapters: 1.0}).as_json(), FINE_TUNED)
        step = read_info(adapters / "stage_1").step
    figures = {name: found[name] or math.nan for name in ("fidelity", "preservation", "clip_t")}
    return figures | {"step": float(step)}


def export_last(run: Run, folder: Path) -> Path:
    """Export the adapters of a run's newest checkpoints."""
    from adapters.arguments import find_device
    from adapters.files.export import export_adapter
    from adapters.files.info import read_info
    from finetune.run.checkpoints import find_newest
    from finetune.run.folders import Folders
    from finetune.run.stage_run import continue_training

    folders = Folders(run.recipe.folder)
    for stage in run.recipe.trained:
        found = find_newest(folders.checkpoints(stage))
        trainee = continue_training(run.recipe, stage, found, find_device("auto"))
        info = read_info(folders.adapters / stage.name)
        fields = {"step": trainee.step, "last_step": None, "choice": None}
        with trainee.final_weights() as unet:
            export_adapter(unet, folder, info.model_copy(update=fields))
    return folder


def compare(drawn: Sequence[Any], true: Sequence[Any]) -> dict[str, float]:
    """Compare pictures with others, one by one: mean PSNR and mean SSIM."""
    import numpy as np
    import torch

    from models.shape import ssim_map

    pixels = [
        torch.tensor(np.stack([np.asarray(each) for each in pictures])).movedim(-1, 1) / 255
        for pictures in (drawn, true)
    ]
    errors = (pixels[0] - pixels[1]).square().mean(dim=(1, 2, 3))
    likeness = ssim_map(pixels[0].double(), pixels[1].double())
    return {"PSNR": float((-10 * errors.log10()).mean()), "SSIM": float(likeness.mean())}


KINDS: Mapping[str, tuple[Callable[[Run, str], dict[str, float]], Sequence[str]]] = {
    "drawing": (draw, tuple(WAYS)),
    "enlarging": (enlarge, ("base", "")),
    "exporting": (export, ("best", "last")),
}
"""The ways of each kind of comparison, and what measures one with a run."""


def measure(kind: str, run: Run, way: str) -> dict[str, float]:
    """Measure in a process of its own."""
    return KINDS[kind][0](run, way)


def begin(counter: Any, gpus: int) -> None:
    """Choose a process's GPU, and keep it to one core."""
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
    import torch

    from adapters.errors import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--ways", nargs="+", help="only these (default: all)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0, help="(default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    given = parser.parse_args(arguments)
    runs = list(itertools.chain(*map(read_runs, given.sweeps)))
    ways = given.ways or KINDS[given.kind][1]
    context = multiprocessing.get_context("spawn")
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    with ProcessPoolExecutor(
        given.processes,
        context,
        initializer=begin,
        initargs=(context.Value("i", 0), given.gpus),
    ) as pool:
        futures = [
            (f"{run.combination}; {way}".strip("; "), pool.submit(measure, given.kind, run, way))
            for way in ways
            for run in runs
        ]
        for name, future in tqdm(futures):
            rows[name].append(future.result())
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")
    names = list(next(iter(rows.values()))[0])
    table = [("", *names)]
    for name, found in rows.items():
        columns = [[each[figure] for each in found] for figure in names]
        table.append((name, *(f"{fmean(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in columns)))
    sys.stdout.write(f"{format_table(table)}\n")


if __name__ == "__main__":
    main()
