"""Measure this trainer against the diffusers example script, on the same model and the same work.

    python -m benchmarks.against_peer --peer .peer/train_dreambooth_lora.py

runs both, one after the other, in fresh processes launched with Accelerate, through every scenario
(or those of ``--only``), and updates ``results.json`` and ``results.txt`` in ``--out`` every time.
``--model`` is a folder with ``stage_1`` and ``stage_2``; missing stages are made with random
weights of the published sizes. With a small cascade there, everything also runs on a CPU, in fp32:

    python -c "from pathlib import Path; from tests.builders import random_cascade as toy; \
        toy.save_random_cascade(Path('/tmp/toy'))"
    python -m benchmarks.against_peer --peer … --model /tmp/toy --steps 40 --job-steps 60

The peer, ``examples/dreambooth/train_dreambooth_lora.py`` of huggingface/diffusers, is not part of
this repository. It checks for a minimum version of diffusers (that of the tag v0.40.0 accepts 0.42)
and needs torchvision. For IF it needs: text encoded in advance, with IF's 77 tokens and with the
attention mask; the stage's own resolution; for Stage II, the timestep as class label. It accepts
the published models' learned variance: it discards that half of the output, so the scheduler must
be switched for sampling.

Both use: rank 4, the six attention projections, AdamW in 8 bits at a constant 1e-4, the gradient
clipped to norm 1, bf16 on a GPU, one prompt for all pictures; no validation, no prior preservation,
no checkpoint before the end. There are at least as many pictures as a batch holds, since the peer
would otherwise leave some of its batches incomplete. Small pictures have exactly the stage's
resolution, to cost each trainer as little as possible. Caches (text, pictures, compiled
kernels) are empty at the start of each run; the model's files have been read once, so that neither
trainer waits for the disk.

The step time is the median over intervals of ten steps between waits for the device, after a
warm-up; start and the whole job are counted from the launch; memory is torch's peak over the whole
process, with the peak up to the last step next to it, since the peer converts its UNet to fp32 at
the end. A whole job that is computed rather than run is a measured shorter job plus the remaining
steps at the median. A run that fails, or runs out of memory or time, is reported as such.
"""

import argparse
import hashlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from adapters.tables import format_table
from benchmarks.machine import ROOT, machine, parser, prepare_models, write_report
from benchmarks.observed import LAUNCHED_AT, SYNCHRONIZE_EVERY
from benchmarks.photos import save_photos

PROMPT = "a photo of a sks dog"
RANK = 4
LEARNING_RATE = 1e-4
PICTURES = 4
PHOTO_PX = (4000, 3000)
WARM_UP_STEPS = 20
OUT_OF_MEMORY = ("OutOfMemoryError", "CUDA out of memory")


@dataclass(frozen=True)
class Scenario:
    """One piece of work for both trainers."""

    about: str
    """The description in the table."""
    stage: int = 1
    """The stage whose UNet is trained."""
    batch_size: int = 4
    photos: bool = False
    """Photographs of 12 megapixels instead of small pictures."""
    whole_job: bool = False
    """Take as many steps as the peer's documentation does, instead of a few to measure."""
    overrides: tuple[str, ...] = ()
    """Overrides of our recipe."""
    peer_of: str | None = None
    """The scenario whose peer run this one shares; ``None``: the peer runs for this one too."""
    computed_from: str | None = None
    """The scenario whose measurements give this one's figures; ``None``: this one is run."""


SCENARIOS: Mapping[str, Scenario] = {
    "batch_4": Scenario("Stage I, batch 4"),
    "batch_1": Scenario("Stage I, batch 1", batch_size=1),
    "batch_16": Scenario("Stage I, batch 16", batch_size=16),
    "compiled": Scenario(
        "Stage I, batch 4, compiled", overrides=("stage_1.compile=true",), peer_of="batch_4"
    ),
    "photos": Scenario("Stage I, batch 4, photos", photos=True),
    "stage_2": Scenario("Stage II, batch 4", stage=2),
    "job": Scenario("Stage I, batch 4, whole job", whole_job=True),
    "job_photos": Scenario(
        "Stage I, batch 4, photos, whole job", photos=True, whole_job=True, computed_from="photos"
    ),
}


COLUMNS = {
    "step_ms": ("step, ms", ".1f"),
    "first_step_s": ("launch to first step, s", ".1f"),
    "job_s": ("launch to exit, s", ".1f"),
    "reserved_gib": ("GiB reserved", ".2f"),
    "allocated_gib": ("GiB allocated", ".2f"),
    "reserved_in_steps_gib": ("GiB reserved up to the last step", ".2f"),
    "allocated_in_steps_gib": ("GiB allocated up to the last step", ".2f"),
    "resident_gib": ("GiB of main memory", ".2f"),
}
"""The figures of the table: their titles and formats."""


@dataclass(frozen=True)
class Work:
    """One process's work and its folders."""

    scenario: Scenario
    steps: int
    model: Path
    """The cascade's folder."""
    pictures: Path
    size_px: int
    """The stage's picture size."""
    scratch: Path
    """An empty folder for everything that the run writes."""


def peer_program(work: Work, script: Path) -> list[str]:
    """Build the command of the peer."""
    stage_2 = ["--class_labels_conditioning=timesteps"] if work.scenario.stage == 2 else []
    return [
        str(script),
        f"--pretrained_model_name_or_path={work.model / f'stage_{work.scenario.stage}'}",
        f"--instance_data_dir={work.pictures}",
        f"--instance_prompt={PROMPT}",
        f"--output_dir={work.scratch / 'peer'}",
        f"--resolution={work.size_px}",
        f"--train_batch_size={work.scenario.batch_size}",
        f"--max_train_steps={work.steps}",
        f"--checkpointing_steps={work.steps + 1}",
        f"--rank={RANK}",
        "--use_8bit_adam",
        f"--learning_rate={LEARNING_RATE}",
        "--lr_scheduler=constant",
        "--lr_warmup_steps=0",
        f"--mixed_precision={'bf16' if torch.cuda.is_available() else 'no'}",
        "--pre_compute_text_embeddings",
        "--tokenizer_max_length=77",
        "--text_encoder_use_attention_mask",
        "--seed=0",
        *stage_2,
    ]


def our_program(work: Work) -> list[str]:
    """Build the command of this trainer; its recipe is written to the scratch folder."""
    recipe = {
        "name": "against_peer",
        "base": {f"stage_{number}": str(work.model / f"stage_{number}") for number in (1, 2)},
        "data": {"source": str(work.pictures), "prompt": PROMPT, "caption_dropout": 0.0},
        f"stage_{work.scenario.stage}": {
            "steps": work.steps,
            "batch_size": work.scenario.batch_size,
            "checkpoint_every": work.steps + 1,
            "adapter": {"rank": RANK, "alpha": RANK, "targets": "attention"},
            "optimizer": {"name": "adamw_8bit", "learning_rate": LEARNING_RATE},
        },
        "runs_dir": str(work.scratch / "runs"),
        "cache_dir": str(work.scratch / "cache"),
    }
    file = work.scratch / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return ["-m", "finetune.train", str(file), *work.scenario.overrides]


def measure(work: Work, program: Sequence[str], log: Path, limit_s: float) -> dict[str, Any]:
    """Run a program in a process; return its figures, or a ``failure`` with the reason.

    The program's output goes to ``log``.
    """
    observations = work.scratch / "observations.json"
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "accelerate_config.yaml")]
    command += ["-m", "benchmarks.observed", str(observations), *program]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(work.scratch / "inductor"),
        "TRITON_CACHE_DIR": str(work.scratch / "triton"),
        LAUNCHED_AT: repr(launched := time.monotonic()),
    }
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return {"failure": f"stopped after {limit_s:.0f} s"}
        finally:
            if process.poll() is None:  # the group, as the launcher has a child
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    job_s = time.monotonic() - launched
    if code:
        return {"failure": find_failure(log)}
    seen = json.loads(observations.read_text())
    if seen["steps"] != work.steps:
        return {"failure": f"took {seen['steps']} optimizer steps instead of {work.steps}"}
    if not any(work.scratch.glob("peer/*.safetensors")) and not any(
        work.scratch.glob("runs/*/adapters/*/*.safetensors")
    ):
        return {"failure": "exported no adapter"}
    return summarise(seen) | {"steps": work.steps, "job_s": job_s}


def summarise(seen: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the table's figures from a record of ``benchmarks.observed``."""
    points = [point for point in seen["synchronized"] if point["step"] >= WARM_UP_STEPS]
    seconds = [
        (later["at_s"] - earlier["at_s"]) / (later["step"] - earlier["step"])
        for earlier, later in itertools.pairwise(points)
    ]
    in_steps = points[-1]["peaks"]
    return {
        "step_ms": 1000 * statistics.median(seconds),
        "intervals_ms": [1000 * each for each in seconds],
        "first_step_s": seen["synchronized"][0]["at_s"],
        **seen["peaks"],
        "reserved_in_steps_gib": in_steps["reserved_gib"],
        "allocated_in_steps_gib": in_steps["allocated_gib"],
    }


def find_failure(log: Path) -> str:
    """Find the reason for a program's failure in its output."""
    text = log.read_text(errors="replace")
    if any(sign in text for sign in OUT_OF_MEMORY):
        return "out of memory"
    # the launcher adds a traceback of its own, whose last line only repeats the command
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    signs = ("Error", "error: ")
    errors = [line for line in lines if any(sign in line for sign in signs)]
    errors = [line for line in errors if "CalledProcessError" not in line]
    return (errors or lines or ["failed without a message"])[-1][-200:]


def compute_job(run: Mapping[str, Any], job_steps: int) -> dict[str, Any]:
    """Compute a whole job's figures from a shorter run, with the missing steps at the median."""
    if "failure" in run:
        return dict(run)
    more_s = (job_steps - run["steps"]) * run["step_ms"] / 1000
    return {**run, "job_s": run["job_s"] + more_s, "steps": job_steps, "computed": True}


def table(results: Mapping[str, Any]) -> str:
    """Format the results as a table, with the failures below it."""
    header = ["scenario", "", *(title for title, _ in COLUMNS.values())]
    rows, failures = [], []
    for name, runs in results.items():
        for who in ("peer", "ours"):
            run = runs.get(who, {"failure": "not run"})
            figures = {key: format_figure(run, key) for key in COLUMNS}
            rows.append([f"{name}: {SCENARIOS[name].about}", who, *figures.values()])
            failures += [f"{name}, {who}: {run['failure']}"] if "failure" in run else []
        pairs = [(runs.get("ours", {}).get(key), runs.get("peer", {}).get(key)) for key in COLUMNS]
        ratios = [f"{ours / peer:.2f}" if ours and peer else "-" for ours, peer in pairs]
        rows.append(["", "ours / peer", *ratios])
    notes = ["* computed from fewer steps, not run", *failures]
    return "\n\n".join([format_table([header, *rows]), "\n".join(notes)])


def format_figure(run: Mapping[str, Any], key: str) -> str:
    """Format a figure of a run, or ``-`` if it has none."""
    value = run.get(key)
    star = "*" if key == "job_s" and run.get("computed") else ""
    return "-" if value is None else f"{value:{COLUMNS[key][1]}}{star}"


def read_files(folder: Path) -> None:
    """Read a cascade's weights once, so that no trainer waits for the disk."""
    for file in folder.glob("*/*/*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(2**26):
                pass


class Benchmark:
    """The results so far; :meth:`run` measures more."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out.resolve()
        self.model: Path = options.model.resolve()
        peer = {"peer sha256": hashlib.sha256(options.peer.read_bytes()).hexdigest()[:12]}
        self.results: dict[str, Any] = {"machine": machine() | peer, "scenarios": {}}
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        if (saved := self.out / "results.json").exists():
            earlier = json.loads(saved.read_text())
            if earlier["machine"] != self.results["machine"]:
                raise SystemExit(f"{saved} is from another machine or version: give another --out.")
            self.results = earlier

    def run(self, name: str) -> None:
        """Measure a scenario with both trainers, and save after each."""
        scenario = SCENARIOS[name]
        if scenario.computed_from:
            if scenario.computed_from not in self.results["scenarios"]:
                self.run(scenario.computed_from)
            for who, run in self.results["scenarios"][scenario.computed_from].items():
                self.save(name, who, compute_job(run, self.options.job_steps))
            return
        shared = self.results["scenarios"].get(scenario.peer_of, {}).get("peer")
        self.save(name, "peer", shared or self.measure(name, "peer"))
        self.save(name, "ours", self.measure(name, "ours"))

    def measure(self, name: str, who: str) -> dict[str, Any]:
        """Measure one trainer's figures in a scenario."""
        scenario, options = SCENARIOS[name], self.options
        prepare_models(self.model, range(1, scenario.stage + 1))
        read_files(self.model)
        config = self.model / f"stage_{scenario.stage}/unet/config.json"
        size_px = json.loads(config.read_text())["sample_size"]
        width, height = PHOTO_PX if scenario.photos else (size_px, size_px)
        count = max(PICTURES, scenario.batch_size)
        pictures = self.out / f"pictures/{count} of {width}x{height}"
        save_photos(pictures, count, width, height)
        steps = options.job_steps if scenario.whole_job else options.steps
        sys.stderr.write(f"{name}, {who}: {steps} steps ...\n")
        with tempfile.TemporaryDirectory(prefix="against_peer_") as scratch:
            work = Work(scenario, steps, self.model, pictures, size_px, Path(scratch))
            if who == "ours":
                program = our_program(work)
            else:
                program = peer_program(work, options.peer.resolve())
            log = self.out / f"logs/{name}_{who}.txt"
            return measure(work, program, log, options.limit_s)

    def save(self, name: str, who: str, run: dict[str, Any]) -> None:
        """Write the results so far, in the order of the scenarios."""
        scenarios = self.results["scenarios"]
        scenarios[name] = scenarios.get(name, {}) | {who: run}
        ordered = {each: scenarios[each] for each in SCENARIOS if each in scenarios}
        self.results["scenarios"] = ordered
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1))
        peer = f"peer sha256 {self.results['machine']['peer sha256']}"
        self.text = write_report(self.out / "results.txt", peer, table(ordered))


def tens(text: str) -> int:
    """Parse a number of steps, which must end with a wait and leave an interval after warm-up."""
    steps, least = int(text), WARM_UP_STEPS + SYNCHRONIZE_EVERY
    if steps % SYNCHRONIZE_EVERY or steps < least:
        raise argparse.ArgumentTypeError(
            f"must be a multiple of {SYNCHRONIZE_EVERY}, {least} or more (got {text})"
        )
    return steps


def names(text: str) -> list[str]:
    """Parse names of scenarios, separated by commas."""
    given = text.split(",")
    if unknown := [name for name in given if name not in SCENARIOS]:
        raise argparse.ArgumentTypeError(f"unknown {unknown}; valid: {', '.join(SCENARIOS)}")
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options = parser(__doc__, ".cache/against_peer/model", "runs/against_peer")
    add = options.add_argument
    add("--peer", type=Path, required=True, help="path of train_dreambooth_lora.py")
    add("--only", type=names, default=list(SCENARIOS), metavar="NAME[,NAME]")
    add("--steps", type=tens, default=80, help="of a scenario that is not a whole job")
    add("--job-steps", type=tens, default=1200, help="of a whole job")
    add("--limit-s", type=float, default=900, help="time limit of each run")
    given = options.parse_args(arguments)
    benchmark = Benchmark(given)
    for name in given.only:
        benchmark.run(name)
    sys.stdout.write(benchmark.text)


if __name__ == "__main__":
    main()
