"""Stage I's pictures a second: the cascade beside diffusers' own pipeline, on the same model.

    python -m benchmarks.sampling [--model FOLDER] [--batch 1 4] [--steps 50] [--dtype fp16]

Random weights of the published size, made in ``--model`` where they are not there. Both draw the
same pictures from the same embeddings and generators, with guidance; each is run once beforehand.
How far the pictures are apart is told beside how far the pipeline's own are from those of the same
pipeline in float32 (``--exact``), as the mean difference in grey levels. Writes ``sampling.md``.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import IFPipeline
from PIL import Image

from adapters import load_cascade
from adapters.base.estimates import PROMPT_TOKENS
from adapters.cascade.sampling import Sampling
from benchmarks.against_peer import UNETS
from benchmarks.machine import ROOT, machine
from benchmarks.random_model import save_random_model
from unets.loading import PRECISIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Draw = Callable[[int], Sequence[Image.Image]]
"""Draws so many pictures, always the same."""


def embeddings(count: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random encodings of prompts, and of the empty caption."""
    draw = torch.Generator().manual_seed(0)
    size = (count, PROMPT_TOKENS, width)
    return tuple(torch.randn(size, generator=draw).to(DEVICE, dtype) for _ in range(2))


def pipeline(model: Path, dtype: torch.dtype, steps: int) -> Draw:
    """Diffusers' own."""
    no_text = {"text_encoder": None, "tokenizer": None}
    pipe = IFPipeline.from_pretrained(model, torch_dtype=dtype, **no_text).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)

    def draw(count: int) -> Sequence[Image.Image]:
        prompts, negative = embeddings(count, pipe.unet.config.encoder_hid_dim, dtype)
        return pipe(
            prompt_embeds=prompts,
            negative_prompt_embeds=negative,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
        ).images

    return draw


def cascade(model: Path, dtype: str, steps: int) -> Draw:
    """The cascade."""
    loaded = load_cascade(model, dtype=dtype, text_encoder=False)
    width = loaded.stages[1].unet.config.encoder_hid_dim

    def draw(count: int) -> Sequence[Image.Image]:
        prompts, negative = embeddings(count, width, PRECISIONS[dtype])
        settings = Sampling(stage_1_steps=steps, batch_size=count)
        return loaded.sample(
            prompts, negative, seeds=range(count), sampling=settings, progress=False
        ).final

    return draw


def timed(draw: Draw, count: int) -> tuple[float, np.ndarray]:
    """Pictures a second once warm, and the pictures [N, S, S, 3]."""
    draw(count)
    start = time.perf_counter()
    pictures = draw(count)  # in main memory, so that the device is done
    return count / (time.perf_counter() - start), np.stack([np.asarray(p) for p in pictures])


def released(draw: Draw, counts: Sequence[int]) -> list[tuple[float, np.ndarray]]:
    """Each batch size timed."""
    return [timed(draw, count) for count in counts]


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """The mean difference in grey levels."""
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/against_peer/model")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/sampling")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", choices=tuple(PRECISIONS), default="fp16")
    parser.add_argument("--exact", action="store_true", help="compare with float32 as well")
    options = parser.parse_args(arguments)
    folder = options.model / "stage_1"
    if not (folder / "model_index.json").exists():
        save_random_model(folder, UNETS[1], device=DEVICE)
    dtype = PRECISIONS[options.dtype]
    runs: dict[str, list[tuple[float, np.ndarray]]] = {}
    for name, build in (
        ("pipeline", lambda: pipeline(folder, dtype, options.steps)),
        ("cascade", lambda: cascade(folder, options.dtype, options.steps)),
        ("exact", lambda: pipeline(folder, torch.float32, options.steps)),
    ):
        if name != "exact" or options.exact:
            runs[name] = released(build(), options.batch)
            gc.collect()
            torch.cuda.empty_cache()
    lines = [
        ", ".join(f"{key} {value}" for key, value in machine().items()),
        "",
        f"Stage I XL, {options.steps} steps with guidance, {options.dtype}",
        "",
        "| pictures at once | pipeline, pictures/s | cascade | ratio | grey levels apart |"
        " pipeline from float32 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for place, count in enumerate(options.batch):
        (plain, theirs), (fast, ours) = runs["pipeline"][place], runs["cascade"][place]
        noise = f"{apart(theirs, runs['exact'][place][1]):.2f}" if options.exact else "-"
        lines.append(
            f"| {count} | {plain:.3f} | {fast:.3f} | {fast / plain:.2f} |"
            f" {apart(theirs, ours):.2f} | {noise} |"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sampling.md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
