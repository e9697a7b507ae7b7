"""Measure how long a running cascade takes to add, switch, scale and remove adapters.

    python -m benchmarks.switching --unet IF-I-XL
    python -m benchmarks.switching --unet IF-I-XL --targets attention+conv --precision nf4
    python -m benchmarks.switching --model models/if-tiny/stage_1

A model that is missing at ``--model`` is made with random weights of the published size; the two
LoRAs are random too. Times are medians over ``--repeats`` changes back and forth; adding and
removing are timed once, and include reading files. Times include the device's work. A pass of the
UNet is for one picture with guidance, replayed on a GPU; "recordings made" counts those that
the changes required. After each change the pass is compared with one that is not replayed: "off by"
is the largest difference relative to the largest value.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from adapters import Parts, load_cascade
from adapters.base.signature import BaseSignature
from adapters.files.export import write_adapter
from adapters.files.info import AdapterInfo
from adapters.files.reading import lora_config
from adapters.files.stage_adapter import StageAdapter
from adapters.tables import format_facts
from adapters.weights.kinds import PRESETS, AdapterSpec, match_targets
from benchmarks.machine import ROOT
from benchmarks.random_model import UNETS, save_random_model
from unets.precision import Precision
from unets.tally import GIB

TOKENS = 77

CHANGES: Mapping[str, tuple[dict[str, float], dict[str, float]]] = {
    "switch": ({"one": 1.0}, {"two": 1.0}),
    "scale": ({"one": 0.5}, {"one": 0.75}),
    "mix of two": ({"one": 0.5, "two": 0.5}, {"one": 0.75, "two": 0.25}),
    "off and on": ({}, {"one": 1.0}),
}
"""The changes to measure: pairs of scales that are set in turn."""


class Switching:
    """A cascade of one stage, two random LoRAs for it, and the measurements."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.stage = 2 if options.unet.startswith("IF-II-") else 1
        self.cascade = load_cascade(
            **{f"stage_{self.stage}": options.model},
            dtype=options.precision,
            device=options.device,
            parts=Parts(text_encoder=False, originals=options.originals),
        )
        self.unet = self.cascade.stages[self.stage].unet
        self.recorded = self.cascade.recorded[self.stage]
        self.inputs = self.random_inputs()
        self.rows: dict[str, str] = {}

    @torch.no_grad()
    def run(self) -> dict[str, str]:
        """Measure everything, and return the rows of the table."""
        original = self.weights()
        with tempfile.TemporaryDirectory() as temporary:
            folders = [self.random_adapter(Path(temporary) / name) for name in ("one", "two")]
            self.time_pass("the base")
            self.note_memory("the base")
            for folder in folders:
                added = self.seconds(lambda folder=folder: self.cascade.add_adapter(folder, 0.5))
                self.rows[f"add {folder.name}"] = f"{added * 1e3:.0f} ms"
        self.time_pass("two adapters")
        self.note_memory("two adapters")
        for what, pair in CHANGES.items():
            self.rows[what] = self.change(pair)
        self.rows["remove both"] = f"{self.seconds(self.cascade.remove_adapters) * 1e3:.0f} ms"
        same = all(torch.equal(original[name], w) for name, w in self.weights().items())
        self.rows["then the weights are the base's, to the bit"] = "yes" if same else "NO"
        return self.rows

    def change(self, pair: tuple[dict[str, float], dict[str, float]]) -> str:
        """Time setting scales in turn, and check that recordings stay valid."""
        for scales in pair:  # memory is allocated the first time
            self.cascade.set_adapters(scales)
        self.record()
        function, made = self.recorded.function, []
        self.recorded.function = lambda **tensors: made.append(0) or function(**tensors)
        times, off = [], []
        for repeat in range(2 * self.options.repeats):
            scales = pair[repeat % 2]
            times.append(self.seconds(lambda scales=scales: self.cascade.set_adapters(scales)))
            replayed = self.recorded(**self.inputs).float()
            exact = function(**self.inputs).float()
            off.append(float((replayed - exact).abs().max() / exact.abs().max()))
        self.recorded.function = function
        recordings = f", recordings made: {len(made)}" if self.unet.device.type == "cuda" else ""
        return f"{statistics.median(times) * 1e3:.1f} ms, off by {max(off):.1g}{recordings}"

    def time_pass(self, what: str) -> None:
        """Time a pass of the UNet."""
        self.record()
        times = [
            self.seconds(lambda: self.recorded(**self.inputs))
            for _ in range(2 * self.options.repeats)
        ]
        self.rows[f"pass with {what}"] = f"{statistics.median(times) * 1e3:.1f} ms"

    def record(self) -> None:
        """Record the pass, which the second call does, and replay it once."""
        for _ in range(3):
            self.recorded(**self.inputs)

    def note_memory(self, what: str) -> None:
        """Note the memory that is allocated on a GPU."""
        if self.unet.device.type == "cuda":
            self.rows[f"memory with {what}"] = f"{torch.cuda.memory_allocated() / GIB:.2f} GiB"

    def seconds(self, function: Callable[[], object]) -> float:
        """Time a function, including the device's work."""
        start = self.now()
        function()
        return self.now() - start

    def now(self) -> float:
        """Wait for the device, and read the time."""
        if self.unet.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def weights(self) -> dict[str, Tensor]:
        """Copy the weights that all Linears and Conv2ds compute with to main memory."""
        return {
            name: module.weight.detach().to("cpu", copy=True)
            for name, module in self.unet.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }

    def random_inputs(self) -> dict[str, Tensor]:
        """Draw a batch of two inputs, with and without text."""
        config, like = self.unet.config, {"device": self.unet.device, "dtype": self.unet.dtype}
        inputs = {
            "sample": torch.randn(2, config.in_channels, *[config.sample_size] * 2, **like),
            "timestep": torch.tensor(500, device=self.unet.device),
            "encoder_hidden_states": torch.randn(2, TOKENS, config.encoder_hid_dim, **like),
        }
        if config.class_embed_type:
            inputs["class_labels"] = torch.full((2,), 250, device=self.unet.device)
        return inputs

    def random_adapter(self, folder: Path) -> Path:
        """Write a LoRA with random values, as if it were trained."""
        spec = AdapterSpec(rank=self.options.rank, targets=self.options.targets)
        state = {}
        for name in match_targets(self.unet, spec.targets):
            out, *columns = self.unet.get_submodule(name).weight.shape
            ones = [1] * len(columns[1:])
            state[f"{name}.lora_A.weight"] = torch.randn(spec.rank, *columns) / columns[0]
            state[f"{name}.lora_B.weight"] = torch.randn(out, spec.rank, *ones) * 0.01
        info = AdapterInfo(
            base_model=str(self.options.model),
            base_signature=BaseSignature.of(self.unet),
            stage=self.stage,
            spec=spec,
            step=0,
            recipe="",
            version="",
        )
        place = folder / f"stage_{self.stage}"
        write_adapter(StageAdapter(place, info, lora_config(state), state))
        return folder


def table(options: argparse.Namespace, rows: Mapping[str, str]) -> str:
    """Format the measurements, with their settings."""
    on_gpu = torch.cuda.is_available() and options.device != "cpu"
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    what = f"{options.model}, {options.precision}, {options.targets}, rank {options.rank}"
    return f"{what}\n{device}\n\n{format_facts([*rows.items()])}\n"


def main(arguments: list[str] | None = None) -> str:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--unet", choices=[n for n in UNETS if n[0] != "_"], default="IF-I-XL")
    add("--model", type=Path, help="one stage (.cache/switching/UNET)")
    add("--precision", choices=("auto", *get_args(Precision)), default="auto")
    add("--targets", choices=PRESETS, default="attention")
    add("--rank", type=int, default=16)
    add("--device", default="auto")
    add("--originals", choices=("device", "cpu"), default="device")
    add("--repeats", type=int, default=10)
    options = parser.parse_args(arguments)
    options.model = options.model or ROOT / ".cache/switching" / options.unet
    if not (options.model / "model_index.json").exists():
        save_random_model(options.model, options.unet)
    result = table(options, Switching(options).run())
    sys.stdout.write(result)
    return result


if __name__ == "__main__":
    main()
