"""Whether to compile the UNet: `torch.compile` fuses what is left between the fused operators.

It takes minutes and gains little beside what :mod:`unets` does by itself, so only a long run wins
them back. What was compiled lies in the recipe's cache, for the runs that follow.
"""

import os
from dataclasses import dataclass

from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D

from adapters.errors import UserError
from finetune.recipe.schema import Recipe
from finetune.run.trainee import Trainee

GAIN = 0.03
"""The share of a step that compiling saves, as measured (benchmarks/RESULTS.md)."""

SECONDS_A_BLOCK = 3.2
"""What compiling a ResNet or attention block takes, forward and backward, as measured there."""

WATCHED_POINTS = 3
"""After how many logged points the speed of a step is known."""


@dataclass
class Compiling:
    """Compiles a trainee's UNet where the recipe asks for it, or where it pays."""

    trainee: Trainee
    pictures_a_step: int
    undecided: bool
    points: int = 0

    @classmethod
    def of(cls, recipe: Recipe, trainee: Trainee, processes: int) -> "Compiling":
        """Compile at once where the recipe says so; ``auto`` is decided later, on a GPU.

        Raises:
            UserError: where there is no GPU to compile for.
        """
        training, cache = trainee.training, recipe.cache / "compiled"
        on_cpu = trainee.unet.device.type == "cpu"
        if training.compile is True and on_cpu:
            raise UserError(
                f"{trainee.stage.name}.compile: true needs a GPU, and this machine has none that is"
                " used: leave it at auto."
            )
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.resolve()))
        if training.compile is True:
            trainee.compile()
        pictures = training.batch_size * training.accumulation * processes
        undecided = training.compile == "auto" and not on_cpu
        return cls(trainee, pictures, undecided)

    def consider(self, pictures_per_second: float) -> str | None:
        """Decide, once the speed is known; returns the reason, for people."""
        self.points += 1
        if not self.undecided or self.points < WATCHED_POINTS:
            return None
        self.undecided = False
        steps_left = self.trainee.training.steps - self.trainee.step
        step_seconds = self.pictures_a_step / pictures_per_second
        modules = self.trainee.unet.modules()
        blocks = sum(isinstance(module, ResnetBlock2D | Attention) for module in modules)
        cost, saved = SECONDS_A_BLOCK * blocks, GAIN * step_seconds * steps_left
        if saved > cost:
            self.trainee.compile()
        return (
            f"{'Compiling' if saved > cost else 'Not compiling'} the UNet: that takes about"
            f" {cost:.0f} s and saves about {saved:.0f} s of the {steps_left:,} steps left."
        )
