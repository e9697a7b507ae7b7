"""Measurements at each validation, and what is kept and said because of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeAlias

from PIL import Image
from torch import Tensor

from adapters.pictures.contact_sheet import contact_sheet
from adapters.weights.kinds import without_adapter
from finetune.recipe.schema import Validation
from finetune.run.best import choose, explain, has_stalled
from finetune.run.diagnosis import diagnose
from finetune.run.figures import FIXED_NOISE, HELD_OUT, Validated, add_floors
from finetune.run.fixed_losses import FixedLosses
from finetune.run.folders import find_changed
from finetune.run.picture_losses import name_pictures, tabulate_losses
from finetune.run.tracking import Tracker
from finetune.run.trainee import Trainee
from finetune.run.validation import DrawnRow, Validator

Score: TypeAlias = Callable[[Sequence[DrawnRow]], Mapping[str, float | Sequence[float]]]
"""Computes the figures of a validation's pictures, by tag: numbers, or values by picture, of which
the figure is the mean."""

Enlarge: TypeAlias = Callable[[Sequence[DrawnRow]], list[DrawnRow]]
"""Enlarges Stage I's pictures for display."""


class Measures:
    """The validations of one stage, on the main process.

    Args:
        trainee: what is measured.
        tracker: shows it.
        settings: the recipe's validation.
        validator: draws pictures; ``None``: there are no prompts.
        score: scores them; ``None``: the recipe has no evaluation section.
        enlarge: enlarges Stage I's pictures; ``None``: they are shown as they are.
        fixed: the losses of training pictures at fixed noise, if any.
        held_out: those of held-out pictures, if any.
        depends_on: the settings that the figures and the choice depend on, by name.
        prior: the kind of prior preservation; ``None``: none.
    """

    def __init__(
        self,
        trainee: Trainee,
        tracker: Tracker,
        settings: Validation,
        *,
        validator: Validator | None = None,
        score: Score | None = None,
        enlarge: Enlarge | None = None,
        fixed: FixedLosses | None = None,
        held_out: FixedLosses | None = None,
        depends_on: Mapping[str, Any] | None = None,
        prior: str | None = None,
    ) -> None:
        self.trainee, self.tracker, self.settings = trainee, tracker, settings
        self.validator, self.score, self.enlarge = validator, score, enlarge
        self.fixed, self.held_out = fixed, held_out
        self.depends_on, self.prior = depends_on or {}, prior
        self.history: list[Validated] = []
        self.best_weights: dict[str, Tensor] | None = None
        """The adapter's weights at the best validation so far, on the CPU."""
        self.kept_step: int | None = None
        """The step of those weights."""
        self.first_losses: list[float] = []
        """The losses of the training pictures at the first validation."""
        self.said: list[str] = []
        """The kinds of trouble that have been reported."""
        self.drawn: list[DrawnRow] = []
        """The pictures of the newest validation; empty in a run continued after its last one."""

    def begin(self) -> None:
        """Begin the history: measure the base, and the adapter if the run is past its first step.

        A fresh adapter changes nothing, so the base is then measured with it; later without.
        """
        if self.trainee.step > 0:
            started = time.perf_counter()
            with self.trainee.final_weights() as unet, without_adapter(unet):
                base, _ = self._measure(0, self.validator.sample() if self.validator else [])
            self.history.append(base)
            self.tracker.skip_time(time.perf_counter() - started)
        self.validate()

    def validate(self) -> None:
        """Measure and show the adapter as an export would have it now; keep it if it is best.

        It is done wholly or, if an error or a signal interrupts it, not at all. The time that this
        takes is left out of the progress bar's rate.
        """
        started, before = time.perf_counter(), self.state()
        try:
            with self.tracker.together():
                self._validate(self.trainee.step)
        except BaseException:
            self.load_state(before)
            raise
        self.tracker.skip_time(time.perf_counter() - started)

    def _validate(self, step: int) -> None:
        with self.trainee.final_weights():
            drawn = self._draw()
            measured, losses = self._measure(step, drawn)
            self._show_pictures_losses(losses)
            self.history.append(measured)
            self._keep_best()
        self.tracker.curves(add_floors(measured.figures, self.history[0].figures), step)
        trouble = diagnose(self.history, self.trainee.training.steps, self.prior)
        for kind, sentence in trouble.items():
            if kind not in self.said:
                self.said.append(kind)
                self.tracker.warn(kind, f"Step {step}: {sentence}", step)

    def draw_exported(self, step: int) -> dict[str, Image.Image]:
        """Return pictures of the validation prompts by the weights of a step, by prompt.

        They are drawn again, with the weights that the UNet has now, unless the newest validation
        was of that step. If the recipe wants it, they are shown enlarged by Stage II.
        """
        if self.validator is None:
            return {}
        newest = step == self.trainee.step and self.drawn
        drawn = self.drawn if newest else self.validator.sample()
        if self.enlarge and self.settings.through_stage_2 == "last":
            self._show(self.enlarge(drawn))
        own = [each.by_prompt for each in drawn if each.row.kind == "subject"]
        return own[0] if own else {}

    def _draw(self) -> list[DrawnRow]:
        """Draw all rows and show them."""
        self.drawn = self.validator.sample() if self.validator else []
        self._show(self.drawn)
        if self.enlarge and self.drawn and self.settings.through_stage_2 == "always":
            self._show(self.enlarge(self.drawn))
        return self.drawn

    def _show(self, drawn: Sequence[DrawnRow]) -> None:
        for each in drawn:
            sheet = contact_sheet([each.pictures], column_captions=each.row.prompts)
            self.tracker.picture(each.row.title, sheet, self.trainee.step)

    def _measure(self, step: int, drawn: Sequence[DrawnRow]) -> tuple[Validated, list[float]]:
        """Score the pictures drawn, and compute the losses at fixed noise.

        Returns:
            The validation, and the losses of the training pictures one by one.
        """
        scored = self.score(drawn) if self.score and drawn else {}
        by_picture = {tag: each for tag, each in scored.items() if isinstance(each, Sequence)}
        figures = {
            tag: fmean(each) if isinstance(each, Sequence) else each for tag, each in scored.items()
        }
        if self.held_out:
            by_picture[HELD_OUT] = self.held_out(self.trainee)
            figures[HELD_OUT] = fmean(by_picture[HELD_OUT])
        losses = self.fixed(self.trainee) if self.fixed else []
        if losses:
            figures[FIXED_NOISE] = sum(losses) / len(losses)
        self.first_losses = self.first_losses or losses
        return Validated(step, figures, by_picture), losses

    def _show_pictures_losses(self, losses: Sequence[float]) -> None:
        """Plot each training picture's loss, and list them with the worst first."""
        if self.fixed is None:
            return
        names, step = name_pictures(self.fixed.pictures), self.trainee.step
        points = zip(names, losses, strict=True)
        self.tracker.curves({f"loss_by_picture/{name}": loss for name, loss in points}, step)
        if step > 0:
            table = tabulate_losses(names, self.first_losses, losses)
            self.tracker.markdown("loss_by_picture", table, step)

    def _keep_best(self) -> None:
        if self.settings.best and choose(self.history, self.settings.best) is self.history[-1]:
            self.best_weights = self.trainee.copy_weights()
            self.kept_step = self.trainee.step

    @property
    def best_step(self) -> int | None:
        """The step of the best validation so far; ``None``: the last step is exported."""
        chosen = choose(self.history, self.settings.best) if self.settings.best else None
        return chosen.step if chosen else None

    def weights_of(self, step: int) -> dict[str, Tensor]:
        """Return the adapter's weights at the step of the best validation.

        Raises:
            RuntimeError: if the weights kept are another step's, which no recipe can cause.
        """
        if self.best_weights is None or self.kept_step != step:
            raise RuntimeError(f"The weights kept are those of step {self.kept_step}, not {step}.")
        return self.best_weights

    def figures_at(self, step: int) -> Mapping[str, float]:
        """Return the figures of the newest validation of a step; empty: there was none."""
        found = [each.figures for each in self.history if each.step == step]
        return found[-1] if found else {}

    @property
    def misses_validation(self) -> bool:
        """True if the trainee is past the newest validation."""
        return bool(self.history) and self.history[-1].step < self.trainee.step

    @property
    def stalled(self) -> bool:
        """True if the recipe's patience with validations that are no better has run out."""
        return self.settings.best is not None and has_stalled(self.history, self.settings.best)

    def explain_choice(self, *, stopped_early: bool) -> str | None:
        """Say why the exported step was chosen; ``None``: the recipe chooses none."""
        if self.settings.best is None:
            return None
        return explain(self.history, self.settings.best, stopped_early=stopped_early)

    def state(self) -> dict[str, Any]:
        """Return all that the validations so far have left, as a tree for a checkpoint."""
        return {
            "history": [
                {"step": v.step, "figures": dict(v.figures), "by_picture": dict(v.by_picture)}
                for v in self.history
            ],
            "first_losses": self.first_losses,
            "said": list(self.said),
            "best_weights": self.best_weights,
            "kept_step": self.kept_step,
            "depends_on": dict(self.depends_on),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same recipe.

        Figures measured under other settings do not compare, so then nothing is taken over but the
        trainee's step, and that is said.
        """
        if changed := find_changed(self.depends_on, state["depends_on"]):
            sentence = (
                f"Other settings than before ({', '.join(changed)}): validation's history begins"
                f" again at step {self.trainee.step}, after a new measurement of the base, and"
                " earlier validations are not compared with those from now on."
            )
            self.tracker.warn("other settings", sentence, self.trainee.step)
            return
        self.history = read_history(state)
        self.first_losses, self.said = state["first_losses"], state["said"]
        self.best_weights, self.kept_step = state["best_weights"], state["kept_step"]


def read_history(state: Mapping[str, Any]) -> list[Validated]:
    """Read the validations of a state that :class:`Measures` left."""
    return [
        # checkpoints of the same format have been written without values by picture
        Validated(each["step"], each["figures"], each.get("by_picture", {}))
        for each in state["history"]
    ]


def was_patient(state: Mapping[str, Any], settings: Validation, now: Mapping[str, Any]) -> bool:
    """Tell whether a state's validations have exhausted the patience that settings have.

    Args:
        state: what :class:`Measures` left.
        settings: the recipe's validation.
        now: the settings that figures depend on; others than the state's begin a new history.
    """
    same = not find_changed(now, state["depends_on"])
    return same and settings.best is not None and has_stalled(read_history(state), settings.best)
