"""Compare the speed of the cascade's Stage I, in pictures a second, with diffusers' own pipeline.

    python -m benchmarks.sampling [--model FOLDER] [--batch 1 4] [--steps 50] [--dtype fp16]

Random weights of the published size are made in ``--model`` if they are missing. Both draw the same
pictures from the same embeddings and generators, with guidance, once to warm up and once timed. The
distance between their pictures, as the mean difference in grey levels, is printed next to
the pipeline's distance from itself in float32 (``--exact``). Writes
``sampling.txt``.
"""

import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import IFPipeline
from PIL import Image

from adapters import Parts, load_cascade
from adapters.base.estimates import PROMPT_TOKENS
from adapters.cascade.sampling import Sampling, StageSampling
from adapters.tables import format_table
from benchmarks.machine import parser, prepare_models, write_report
from unets.precision import PRECISIONS, dtype_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

HEADER = (
    *("pictures at once", "pipeline, pictures/s", "cascade", "ratio"),
    *("grey levels apart", "pipeline from float32"),
)

Draw = Callable[[int], Sequence[Image.Image]]
"""A function that draws a number of pictures, the same on each call."""


def embeddings(count: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw random encodings of prompts, and of the empty caption."""
    draw = torch.Generator().manual_seed(0)
    size = (count, PROMPT_TOKENS, width)
    return tuple(torch.randn(size, generator=draw).to(DEVICE, dtype) for _ in range(2))


def pipeline(model: Path, dtype: torch.dtype, steps: int) -> Draw:
    """Load diffusers' own pipeline."""
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
    """Load the cascade."""
    loaded = load_cascade(model, dtype=dtype, parts=Parts(text_encoder=False))
    width = loaded.stages[1].unet.config.encoder_hid_dim

    def draw(count: int) -> Sequence[Image.Image]:
        prompts, negative = embeddings(count, width, dtype_of(dtype))
        settings = Sampling(stage_1=StageSampling(steps=steps), batch_size=count)
        texts, others = ([f"{word} {row}" for row in range(count)] for word in ("to", "from"))
        embeds = dict(zip(texts + others, [*prompts, *negative], strict=True))
        options = {"embeds": embeds, "sampling": settings, "progress": False}
        return loaded(texts, negative_prompt=others, **options).final

    return draw


def measure(draw: Draw, counts: Sequence[int]) -> list[tuple[float, np.ndarray]]:
    """Measure, by batch size, the pictures a second once warm, and return them [N, S, S, 3]."""
    runs = []
    for count in counts:
        draw(count)
        start = time.perf_counter()
        pictures = draw(count)  # they are in main memory, so the device is done
        rate = count / (time.perf_counter() - start)
        runs.append((rate, np.stack([np.asarray(p) for p in pictures])))
    return runs


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Compute the mean difference in grey levels."""
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options = parser(__doc__, ".cache/against_peer/model", "runs/sampling")
    options.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--dtype", choices=PRECISIONS, default="fp16")
    options.add_argument("--exact", action="store_true", help="compare with float32 as well")
    given = options.parse_args(arguments)
    folder = given.model / "stage_1"
    prepare_models(given.model, [1])
    builders = {
        "pipeline": lambda: pipeline(folder, dtype_of(given.dtype), given.steps),
        "cascade": lambda: cascade(folder, given.dtype, given.steps),
        "exact": lambda: pipeline(folder, torch.float32, given.steps),
    }
    runs = {}
    for name, build in builders.items():
        if name != "exact" or given.exact:
            runs[name] = measure(build(), given.batch)
            gc.collect()
            torch.cuda.empty_cache()
    rows = []
    for place, count in enumerate(given.batch):
        (plain, theirs), (fast, ours) = runs["pipeline"][place], runs["cascade"][place]
        noise = f"{distance(theirs, runs['exact'][place][1]):.2f}" if given.exact else "-"
        rates = (f"{plain:.3f}", f"{fast:.3f}", f"{fast / plain:.2f}")
        rows.append([str(count), *rates, f"{distance(theirs, ours):.2f}", noise])
    about = f"Stage I XL, {given.steps} steps with guidance, {given.dtype}"
    sys.stdout.write(write_report(given.out / "sampling.txt", about, format_table([HEADER, *rows])))


if __name__ == "__main__":
    main()
