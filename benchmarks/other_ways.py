"""Sweep a recipe of the embedded cascade as others train DeepFloyd IF, to compare the outcome.

    python -m benchmarks.other_ways peers_stage_2 recipes/sweeps/subjects.yaml --name peers_stage_2

The first word is one of `WAYS`; the rest is the command line of `finetune.sweep`, whose runs are
all trained, and drawn, that way. Each way replaces one part of the toolkit in the sweep's
processes.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

CHOSEN = "IF_OTHER_WAY"
"""The environment variable that hands the way on to the sweep's processes."""

SOFT_GAMMA = 5.0
"""The gamma of soft Min-SNR, as of Min-SNR's paper."""


def change_step(part: str, change: Callable[..., Any]) -> None:
    """Pass what a part of the training step returns, then its arguments, through a function."""
    import finetune.run.trainee

    compute = getattr(finetune.run.trainee, part)

    def changed(*arguments: Any, **settings: Any) -> Any:
        return change(compute(*arguments, **settings), *arguments)

    setattr(finetune.run.trainee, part, changed)


def show_noisy_twice() -> None:
    """Show Stage II the noisy picture in place of the low-res one, and its timestep as the level.

    diffusers' DreamBooth script and SimpleTuner do so.
    """
    import torch

    def show(inputs: dict[str, Any], stage: Any, batch: Any, noisy: Any, *_: Any) -> dict[str, Any]:
        if not stage.super_resolution:
            return inputs
        twice = torch.cat([noisy, noisy], dim=1).to(inputs["sample"].dtype)
        return inputs | {"sample": twice, "class_labels": batch.timesteps}

    change_step("unet_inputs", show)


def learn_no_variance() -> None:
    """Train the noise alone: the squared error, without the variational bound."""

    def omit_bound(losses: Any, *arguments: Any) -> Any:
        return replace(losses, total=squared_error(*arguments), bound=0 * losses.bound)

    change_step("hybrid_loss", omit_bound)


def weight_softly() -> None:
    """Weight the squared error by soft Min-SNR, gamma / (SNR + gamma) (arXiv 2401.11605)."""

    def weight(losses: Any, *arguments: Any) -> Any:
        timesteps, tables = arguments[4:6]
        excess = tables.snr[timesteps] / (tables.snr[timesteps] + SOFT_GAMMA)
        return replace(losses, total=losses.total - excess * squared_error(*arguments))

    change_step("hybrid_loss", weight)


def squared_error(prediction: Any, pixels: Any, noise: Any, *_: Any) -> Any:
    """Average the squared error of the predicted noise over each picture, [B]."""
    return (prediction.float()[:, :3] - noise.float()).square().mean(dim=(1, 2, 3))


def draw_with_fixed_variance() -> None:
    """Train the noise alone, and draw with the schedule's smaller variance instead of the learned.

    diffusers' instructions say so for adapters that its script has trained.
    """
    from diffusers import IFPipeline, IFSuperResolutionPipeline

    learn_no_variance()
    for pipeline in (IFPipeline, IFSuperResolutionPipeline):
        draw = pipeline.__call__

        def draw_fixed(self: Any, *arguments: Any, draw: Any = draw, **settings: Any) -> Any:
            self.scheduler.register_to_config(variance_type="fixed_small")
            self.scheduler.variance_type = "fixed_small"
            return draw(self, *arguments, **settings)

        pipeline.__call__ = draw_fixed


WAYS: Mapping[str, Callable[[], None]] = {
    "peers_stage_2": show_noisy_twice,
    "no_variance": learn_no_variance,
    "fixed_variance": draw_with_fixed_variance,
    "soft_min_snr": weight_softly,
}
"""What each way replaces."""


def main() -> None:
    """Run the sweep, or one of its runs."""
    if way := os.environ.get(CHOSEN):
        from finetune.sweeping import child

        WAYS[way]()
        child.main()
        return
    if len(sys.argv) < 2 or sys.argv[1] not in WAYS:
        sys.exit(f"{__doc__}\nWays: {', '.join(WAYS)}")
    from finetune import sweep
    from finetune.sweeping import work

    os.environ[CHOSEN] = sys.argv.pop(1)
    work.CHILD = "benchmarks.other_ways"
    sweep.main(sys.argv[1:])


if __name__ == "__main__":
    main()
