"""Measure this trainer against the diffusers example script, on the same model and the same work.

    python -m benchmarks.against_peer --peer .peer/train_dreambooth_lora.py

runs both in turn, each in a fresh process launched with Accelerate, through every scenario (or
those that ``--only`` names), and writes ``results.json`` and ``results.md`` below ``--out`` after
each run. ``--model`` is a folder with ``stage_1`` and ``stage_2``; what is missing there is made
with random weights of the published sizes. With a small cascade there, all of it runs on a CPU as
well, in fp32:

    python -c "from pathlib import Path; from tests.builders import random_cascade as toy; \
        toy.save_random_cascade(Path('/tmp/toy'))"
    python -m benchmarks.against_peer --peer … --model /tmp/toy --steps 40 --job-steps 60

The peer, ``examples/dreambooth/train_dreambooth_lora.py`` of huggingface/diffusers, is no part of
this repository. It asks for a least version of diffusers (that of the tag v0.40.0 accepts 0.42) and
for torchvision. What it needs for IF: the text encoded beforehand, with IF's 77 tokens and with the
attention mask; the stage's own resolution; for Stage II, the timestep as class label. It runs on
the published, learned variance as it is: it throws that half of the output away, and leaves the
scheduler to be switched by whoever samples.

The same for both: rank 4, the six attention projections, AdamW in 8 bits at a constant 1e-4, the
gradient clipped to norm 1, bf16 on a GPU, one prompt for all pictures; no validation, no prior
preservation, no checkpoint before the end. There are at least as many pictures as a batch holds,
since the peer would otherwise fill some of its batches only in part. Small pictures have exactly
the resolution of the stage, so that they cost either trainer as little as they can. Caches (text,
pictures, compiled kernels) are empty at the start of each run; the model's files have been read
once, so that nobody waits for the disk.

What is reported: the step time is the median of the intervals of ten steps between waits for the
device, past a warm-up; start, and the whole job, are counted from the launch; memory is torch's
peak over the whole process, and beside it the peak up to the last step, since the peer turns its
UNet to fp32 at the end. A whole job that is computed, not run, is the measured shorter job with
the steps that it lacks added at the median. A run that fails, runs out of memory or of time is a
row that says so.
"""

import argparse
import functools
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

from benchmarks.machine import ROOT, machine
from benchmarks.observed import LAUNCHED_AT, SYNCHRONIZE_EVERY
from benchmarks.photos import save_photos

PROMPT = "a photo of a sks dog"
RANK = 4
LEARNING_RATE = 1e-4
PICTURES = 4
PHOTO_PX = (4000, 3000)
WARM_UP_STEPS = 20
UNETS = {1: "IF-I-XL", 2: "IF-II-L-sized"}
"""The published sizes that are made where ``--model`` lacks a stage."""

OUT_OF_MEMORY = ("OutOfMemoryError", "CUDA out of memory")


@dataclass(frozen=True)
class Scenario:
    """One piece of work for both trainers."""

    about: str
    """What it is, for the table."""
    stage: int = 1
    """Which UNet is trained."""
    batch_size: int = 4
    """Pictures a step."""
    photos: bool = False
    """Photographs of 12 megapixels instead of small pictures."""
    whole_job: bool = False
    """As many steps as the peer's documentation takes, instead of a few to measure."""
    overrides: tuple[str, ...] = ()
    """What our recipe says otherwise."""
    peer_of: str | None = None
    """The scenario whose run of the peer is this one's too; ``None``: its own."""
    computed_from: str | None = None
    """The scenario from whose measurements this one is computed; ``None``: it is run."""


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


@dataclass(frozen=True)
class Column:
    """A figure of the table."""

    key: str
    title: str
    format: str


COLUMNS = (
    Column("step_ms", "step, ms", ".1f"),
    Column("first_step_s", "launch to first step, s", ".1f"),
    Column("job_s", "launch to exit, s", ".1f"),
    Column("reserved_gib", "GiB reserved", ".2f"),
    Column("allocated_gib", "GiB allocated", ".2f"),
    Column("reserved_in_steps_gib", "GiB reserved up to the last step", ".2f"),
    Column("allocated_in_steps_gib", "GiB allocated up to the last step", ".2f"),
    Column("resident_gib", "GiB of main memory", ".2f"),
)


@dataclass(frozen=True)
class Work:
    """What one process is to do, and where."""

    scenario: Scenario
    steps: int
    model: Path
    """The cascade's folder."""
    pictures: Path
    size_px: int
    """The stage's picture size."""
    scratch: Path
    """An empty folder for all that the run writes."""

    @property
    def unet_folder(self) -> Path:
        """The stage that is trained."""
        return self.model / f"stage_{self.scenario.stage}"


def peer_program(work: Work, script: Path) -> list[str]:
    """The peer and its arguments."""
    stage_2 = ["--class_labels_conditioning=timesteps"] if work.scenario.stage == 2 else []
    return [
        str(script),
        f"--pretrained_model_name_or_path={work.unet_folder}",
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
    """This trainer and its arguments, the recipe written."""
    recipe = {
        "name": "against_peer",
        "base": {f"stage_{number}": str(work.model / f"stage_{number}") for number in UNETS},
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
    """Run a program in a process of its own; its figures, or a ``failure`` that says what happened.

    All that it prints goes to ``log``.
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
            if process.poll() is None:  # the launcher's child has to go as well
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    job_s = time.monotonic() - launched
    if code:
        return {"failure": failure_in(log)}
    seen = json.loads(observations.read_text())
    if seen["steps"] != work.steps:
        return {"failure": f"took {seen['steps']} optimizer steps instead of {work.steps}"}
    if not any(work.scratch.glob("peer/*.safetensors")) and not any(
        work.scratch.glob("runs/*/adapters/*/*.safetensors")
    ):
        return {"failure": "exported no adapter"}
    return figures(seen) | {"steps": work.steps, "job_s": job_s}


def figures(seen: Mapping[str, Any]) -> dict[str, Any]:
    """The table's figures of what ``benchmarks.observed`` saw of a program."""
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


def failure_in(log: Path) -> str:
    """What a program that failed died of, from all that it printed."""
    text = log.read_text(errors="replace")
    if any(sign in text for sign in OUT_OF_MEMORY):
        return "out of memory"
    # the launcher adds a traceback of its own, whose last line only repeats the command
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "CalledProcessError" not in line]
    return (errors or lines or ["failed without a word"])[-1][-200:]


def computed_job(run: Mapping[str, Any], job_steps: int) -> dict[str, Any]:
    """A whole job's figures from those of fewer steps: the rest of the steps at the median."""
    if "failure" in run:
        return dict(run)
    more_s = (job_steps - run["steps"]) * run["step_ms"] / 1000
    return {**run, "job_s": run["job_s"] + more_s, "steps": job_steps, "computed": True}


def table(results: Mapping[str, Any]) -> str:
    """The results as markdown."""
    titles = ["scenario", "", *(column.title for column in COLUMNS)]
    rows = [titles, ["---", "---", *["---:"] * len(COLUMNS)]]
    for name, runs in results["scenarios"].items():
        rows += [_row(f"`{name}`: {SCENARIOS[name].about}", "peer", runs.get("peer"))]
        rows += [_row("", "ours", runs.get("ours")), ["", "ours / peer", *_ratios(runs)]]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    about = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    return f"{about}\n\n{text}\n\n\\* computed from fewer steps, not run\n"


def _row(title: str, who: str, run: Mapping[str, Any] | None) -> list[str]:
    if run is None or "failure" in run:
        said = run["failure"].replace("|", "\\|") if run else "not run"
        return [title, who, said, *[""] * (len(COLUMNS) - 1)]
    texts = {c.key: "-" if run[c.key] is None else f"{run[c.key]:{c.format}}" for c in COLUMNS}
    if run.get("computed"):
        texts["job_s"] += " \\*"
    return [title, who, *texts.values()]


def _ratios(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    pairs = [(runs.get("ours", {}).get(c.key), runs.get("peer", {}).get(c.key)) for c in COLUMNS]
    return [f"{ours / peer:.2f}" if ours and peer else "-" for ours, peer in pairs]


def prepare_model(folder: Path, stage: int) -> None:
    """Make a stage that is missing, and read its files once."""
    target = folder / f"stage_{stage}"
    if not (target / "model_index.json").exists():
        command = [sys.executable, "-m", "benchmarks.random_model", str(target)]
        subprocess.run([*command, "--unet", UNETS[stage]], cwd=ROOT, check=True)
    for file in target.glob("*/*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(2**26):
                pass


class Benchmark:
    """The results so far, and the means to get the rest."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out.resolve()
        self.model: Path = options.model.resolve()
        self.prepare_model = functools.cache(functools.partial(prepare_model, self.model))
        peer = {"peer sha256": hashlib.sha256(options.peer.read_bytes()).hexdigest()[:12]}
        self.results: dict[str, Any] = {"machine": machine() | peer, "scenarios": {}}
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        if (saved := self.out / "results.json").exists():
            earlier = json.loads(saved.read_text())
            if earlier["machine"] != self.results["machine"]:
                raise SystemExit(f"{saved} is of another machine or version: give another --out.")
            self.results = earlier

    def run(self, name: str) -> None:
        """Measure a scenario with both trainers, saving after each."""
        scenario = SCENARIOS[name]
        if scenario.computed_from:
            if scenario.computed_from not in self.results["scenarios"]:
                self.run(scenario.computed_from)
            for who, run in self.results["scenarios"][scenario.computed_from].items():
                self.save(name, who, computed_job(run, self.options.job_steps))
            return
        shared = self.results["scenarios"].get(scenario.peer_of, {}).get("peer")
        self.save(name, "peer", shared or self.measured(name, "peer"))
        self.save(name, "ours", self.measured(name, "ours"))

    def measured(self, name: str, who: str) -> dict[str, Any]:
        """One trainer's figures in a scenario."""
        scenario, options = SCENARIOS[name], self.options
        for stage in range(1, scenario.stage + 1):
            self.prepare_model(stage)
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
        """Write down what is known by now, in the order of the scenarios."""
        scenarios = self.results["scenarios"]
        scenarios[name] = scenarios.get(name, {}) | {who: run}
        ordered = {each: scenarios[each] for each in SCENARIOS if each in scenarios}
        self.results["scenarios"] = ordered
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1))
        (self.out / "results.md").write_text(table(self.results))


def tens(text: str) -> int:
    """A number of steps whose last is waited for, and that leaves an interval past the warm-up."""
    steps, least = int(text), WARM_UP_STEPS + SYNCHRONIZE_EVERY
    if steps % SYNCHRONIZE_EVERY or steps < least:
        raise argparse.ArgumentTypeError(
            f"must be a multiple of {SYNCHRONIZE_EVERY}, {least} or more (got {text})"
        )
    return steps


def names(text: str) -> list[str]:
    """Names of scenarios, separated by commas."""
    given = text.split(",")
    if unknown := [name for name in given if name not in SCENARIOS]:
        raise argparse.ArgumentTypeError(f"unknown {unknown}; valid: {', '.join(SCENARIOS)}")
    return given


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", type=Path, required=True, help="path of train_dreambooth_lora.py")
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/against_peer/model")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/against_peer")
    parser.add_argument("--only", type=names, default=list(SCENARIOS), metavar="NAME[,NAME]")
    parser.add_argument("--steps", type=tens, default=80, help="of a scenario that is no whole job")
    parser.add_argument("--job-steps", type=tens, default=1200, help="of a whole job")
    parser.add_argument("--limit-s", type=float, default=900, help="time limit of each run")
    options = parser.parse_args()
    benchmark = Benchmark(options)
    for name in options.only:
        benchmark.run(name)
    sys.stdout.write(table(benchmark.results))


if __name__ == "__main__":
    main()
