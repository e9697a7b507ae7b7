"""Sampling prompts from a cascade by their cached encodings."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapters.cascade.cascade import Cascade
from adapters.cascade.results import CascadeImages
from adapters.cascade.sampling import Sampling


def sample_prompts(
    cascade: Cascade,
    embeds: Mapping[str, Tensor],
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    sampling: Sampling,
    stage_2_prompts: Sequence[str] | None = None,
    low_res: Tensor | None = None,
    clean_caption: bool = True,
    progress: bool = True,
) -> CascadeImages:
    """Sample each prompt once, guided away from the empty caption.

    Args:
        cascade: what to sample from.
        embeds: text encodings [T, D] of the prompts and the empty caption.
        prompts: N.
        seeds: of each picture, N.
        sampling: steps and guidance.
        stage_2_prompts: N, what Stage II and III are told instead; ``None``: the same.
        low_res: [N, 3, s, s] in [-1, 1]: upsample these; Stage I is not run.
        clean_caption: whether the encoded prompts were cleaned, which saved pictures say.
        progress: show progress bars.
    """
    told = {1: prompts, 2: prompts if stage_2_prompts is None else stage_2_prompts}
    return cascade.sample(
        {stage: torch.stack([embeds[text] for text in texts]) for stage, texts in told.items()},
        torch.stack([embeds[""]] * len(prompts)),
        seeds=seeds,
        sampling=sampling,
        low_res=low_res,
        prompts=told,
        clean_caption=clean_caption,
        progress=progress,
    )
