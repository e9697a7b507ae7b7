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

STAGE_1 = "models/if-tiny/stage_1"
"""The Stage I whose outputs Stage II is shown."""

OWN_TIMESTEP = 300
"""The timestep of the noisy picture that they are drawn from."""


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


def show_own_outputs() -> None:
    """Show Stage II Stage I's own pictures in place of real low-res ones, noised as ever.

    They must match the real pictures place by place, so each is what the base's Stage I sees in a
    noisy real one: its estimate of the picture at timestep :data:`OWN_TIMESTEP`.
    """
    import torch
    import torch.nn.functional as F

    from finetune.run import trainee

    build, unets = trainee.unet_inputs, dict[torch.device, Any]()

    @torch.no_grad()
    def redraw(batch: Any, schedule: Any) -> Any:
        device = batch.pixels.device  # meta where a step is only rehearsed
        if device not in unets:
            from adapters.base.source import Source

            unets[device] = Source(STAGE_1, 1).unet("fp32", device).eval()
        ratio = batch.pixels.shape[-1] // batch.low_res.shape[-1]
        noise = F.avg_pool2d(batch.low_res_noise, ratio) * ratio  # standard normal again
        at = torch.full_like(batch.timesteps, OWN_TIMESTEP)
        noisy = schedule.add_noise(batch.low_res, noise, at)
        predicted = unets[device](noisy, at, batch.prompt_embeds.float(), return_dict=False)[0][
            :, :3
        ]
        kept = float(schedule.alphas_cumprod[OWN_TIMESTEP])
        return ((noisy - (1 - kept) ** 0.5 * predicted) / kept**0.5).clamp(-1, 1)

    def show(stage: Any, batch: Any, noisy: Any, schedulers: Any, dtype: Any) -> Any:
        if stage.super_resolution:
            batch = replace(batch, low_res=redraw(batch, schedulers[0]))
        return build(stage, batch, noisy, schedulers, dtype)

    vars(trainee)["unet_inputs"] = show


def replace_oft(peft_type: str, fields: Mapping[str, str], settings: Mapping[str, int]) -> None:
    """Let the kind ``oft`` stand for another of PEFT's, before any module has read the table.

    The toolkit has no format for these, so each is exported as the LoRA of its whole update.
    """
    from types import MappingProxyType

    from adapters.weights import kinds

    row = kinds.Kind(peft_type, fields, settings)
    vars(kinds)["KINDS"] = MappingProxyType({**kinds.KINDS, "oft": row})
    import finetune.run.ending
    import finetune.run.loop

    vars(finetune.run.ending)["export_adapter"] = export_as_lora
    vars(finetune.run.loop)["UpdateSize"] = lambda unet: None


def export_as_lora(unet: Any, folder: Any, info: Any) -> Any:
    """Export the whole update of any adapter of PEFT's as a LoRA, as ``export_adapter`` does."""
    from pathlib import Path

    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    from adapters.files.export import Exported, complete_info, write_adapter
    from adapters.files.stage_adapter import StageAdapter
    from adapters.weights.approximation import Approximation
    from adapters.weights.kinds import KINDS

    lora = Approximation(None, 1e-4)
    for name, layer in unet.named_modules():
        if isinstance(layer, BaseTunerLayer):
            weight = layer.get_base_layer().weight
            own = weight.detach().clone()
            with torch.no_grad():
                layer.merge()
                lora.add_update(name, layer.get_base_layer().weight - own)
                layer.merged_adapters.clear()
                layer.get_base_layer().weight.copy_(own)
    spec = info.spec.model_copy(update={"kind": "lora", "rank": max(lora.ranks), "alpha": None})
    info = complete_info(info.model_copy(update={"spec": spec}), unet)
    config = KINDS["lora"].peft_config(spec)
    ranks = {
        name.removesuffix(".lora_A.weight"): len(a)
        for name, a in lora.state.items()
        if name.endswith(".lora_A.weight")
    }
    config.target_modules, config.rank_pattern = list(ranks), ranks
    config.alpha_pattern = dict(ranks)
    adapter = StageAdapter(Path(folder) / f"stage_{info.stage}", info, config, lora.state)
    write_adapter(adapter)
    return Exported(adapter.folder, len(lora.state), None)


def train_hra() -> None:
    """Train Householder reflections (arXiv 2405.17484), as many as the rank, in place of OFT."""
    replace_oft("HRA", {"r": "rank"}, {})


def train_boft() -> None:
    """Train two butterflies of blocks as wide as the rank (arXiv 2311.06243), in place of OFT."""
    replace_oft(
        "BOFT", {"boft_block_size": "rank"}, {"boft_block_num": 0, "boft_n_butterfly_factor": 2}
    )


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
    "own_outputs": show_own_outputs,
    "hra": train_hra,
    "boft": train_boft,
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
