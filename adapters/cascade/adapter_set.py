"""The loaded adapters of a cascade by name: adding, scaling, combining, saving, removing."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from threading import RLock
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

import torch
from diffusers import IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from torch import Tensor

from adapters.arguments import Scale, Scales, expand_home, read_scales, split_scale
from adapters.cascade.listing import Listing
from adapters.errors import UserError
from adapters.files.export import save_adapters
from adapters.files.stage_adapter import StageAdapter
from adapters.merging.combination import Part, combine
from adapters.merging.in_place import MergedAdapters
from adapters.merging.methods import Combination
from unets.graphs import GraphMemory, Replayed

Stage: TypeAlias = "IFPipeline | IFSuperResolutionPipeline"

Of = ParamSpec("Of")

Result = TypeVar("Result")


def alone(
    method: Callable[Concatenate[Any, Of], Result],
) -> Callable[Concatenate[Any, Of], Result]:
    """Keep other threads from drawing with an object or changing it while a method runs."""

    @wraps(method)
    def locked(self: Any, /, *args: Of.args, **options: Of.kwargs) -> Result:
        with self.lock:
            return method(self, *args, **options)

    return locked


@dataclass(kw_only=True)
class AdaptedStages:
    """Stages with adapters merged in place, so that recorded forward passes use them."""

    stages: Mapping[int, Stage]
    """Stage I and II, by number."""
    base_names: Mapping[int, str]
    """The bases' names, for messages."""
    originals: torch.device | None = None
    """The device of the copies of the base's weights, see :class:`MergedAdapters`."""
    sources: dict[str, str] = field(default_factory=dict, init=False)
    """The folder or hub name of each loaded adapter, as given."""
    lock: AbstractContextManager[Any] = field(default_factory=RLock, init=False, repr=False)
    """Lock held by the thread that draws with the stages or changes them."""
    merged: dict[int, MergedAdapters] = field(init=False)
    recorded: dict[int, Replayed[Tensor]] = field(init=False)
    """The UNets' forward passes: on a GPU one CUDA graph for each size of batch."""

    def __post_init__(self) -> None:
        memory = GraphMemory()  # shared, as the lock lets one stage draw at a time
        self.recorded = {
            number: Replayed(partial(_predict, pipe.unet), f"Stage {number}'s UNet", memory=memory)
            for number, pipe in self.stages.items()
        }
        self.merged = {
            number: MergedAdapters(pipe.unet, self.originals, self.recorded[number].renew)
            for number, pipe in self.stages.items()
        }

    @property
    def adapters(self) -> Listing:
        """The loaded adapters and their scales; printing it also shows their kinds and sources."""
        loaded: dict[str, dict[int, tuple[StageAdapter, float]]] = {}
        for stage, merged in self.merged.items():
            for name, adapter in merged.adapters.items():
                loaded.setdefault(name, {})[stage] = adapter, merged.scales[name]
        return Listing(loaded)

    @alone
    def add_adapter(self, folder: str | Path, scale: Scale = 1.0, name: str | None = None) -> str:
        """Load an adapter and merge it into the stages that it and this cascade share.

        An adapter's base is recognised by its weights, not by its name, since folders move and hub
        repositories are mirrored: the UNet's configuration and a few of its weights, recorded at
        export, must match this cascade's UNet as it was before any merging.

        Args:
            folder: the folder of a finished run, an exported folder (with ``stage_1``, ``stage_2``
                or both in it), one of these stage folders, another tool's file or folder, or the
                hub name of any of them, see :func:`adapters.files.places.adapter_path`. Another
                tool's adapter goes to the stage that its names and shapes fit, and is not checked
                against any base.
            scale: the factor, for all stages or by stage (``{1: 0.5}``: off in Stage II): each
                weight W becomes W + scale * (W merged - W). Adapters add up. For the scale of a
                DoRA, see :meth:`set_adapters`.
            name: the adapter's name; ``None``: one after its folder.

        Returns:
            The adapter's name.

        Raises:
            UserError: if the folder has no adapter for a stage of this cascade, or has one that was
                trained on another base, the scale is not finite, or the name is taken. Nothing is
                loaded or merged then.

        Example:
            >>> before = cascade.stages[1].unet.conv_in.weight.clone()
            >>> cascade.add_adapter("runs/quickstart/adapters", 0.8)
            'quickstart'
            >>> cascade.remove_adapters()
            >>> torch.equal(cascade.stages[1].unet.conv_in.weight, before)
            True
        """
        adapters = self._for_stages(folder)
        name = name or self.adapters.choose_name(Path(folder))
        return self._load(adapters, scale, name, str(folder))

    @alone
    def set_adapters(self, scales: Scales) -> None:
        """Switch to some of the loaded adapters, each with its scale.

        This takes milliseconds, and recorded forward passes stay valid, except if more is switched
        on in a layer of a quantised base than ever before
        (:class:`adapters.merging.in_place.QuantisedLayer`).

        Args:
            scales: by name, for all stages or by stage (``{"dog": 0.8, "style": {1: 0.5, 2: 1}}``);
                names alone have a scale of 1. Adapters, and stages of them, that are not named are
                switched off but stay loaded.

                A scale applies to the whole change that an adapter makes, whatever its kind: a DoRA
                at 0.5 is halfway from W to W merged. In diffusers' ``set_adapters`` a scale
                multiplies only a DoRA's B A and keeps its magnitudes in full, so the two agree only
                at a scale of 1. For LoRA, rsLoRA, LoHa and LoKr both mean the same.

        Raises:
            UserError: if a name is unknown or a scale is not finite. Nothing changes then.
        """
        factors, before = self._by_stage(scales), self.adapters
        try:
            self._set(factors)
        except BaseException:  # such as a device without room
            self._set(before)
            raise

    @alone
    def combine(
        self,
        scales: Scales,
        method: str = "linear",
        *,
        name: str | None = None,
        density: float | None = None,
        rank: int | None = None,
        majority_sign: str | None = None,
        seed: int = 0,
    ) -> str:
        """Combine loaded LoRAs into one by a method of PEFT; the result starts switched off.

        The originals keep their scales until :meth:`set_adapters` switches to the result.

        Args:
            scales: by name of the adapters to combine, for all stages or by stage. Those with a
                scale of 0 take no part.
            method: one of :data:`adapters.merging.methods.METHODS`.
            name: the result's name; ``None``: the adapters' names with ``+`` between them.
            density: see :class:`adapters.merging.methods.Combination`.
            rank: see the same class.
            majority_sign: see the same class.
            seed: see the same class.

        Returns:
            The result's name, for :meth:`set_adapters` and :meth:`save_adapter`.

        Raises:
            UserError: if a name is unknown or taken, or the method cannot combine an adapter.
        """
        how = Combination(method, density, rank, majority_sign, seed)
        factors = self._by_stage(scales)
        name = name or "+".join(factors)
        self.adapters.check_free(name)
        adapters = {}
        for stage, merged in self.merged.items():
            parts = [
                Part(each, merged.adapters[each], own[stage])
                for each, own in factors.items()
                if own.get(stage)
            ]
            if parts:
                adapters[stage] = combine(parts, how, name, merged.unet.device)
        if not adapters:
            raise UserError("There is nothing to combine; give adapters scales other than 0.")
        return self._load(adapters, 0.0, name, f"{method} of {', '.join(factors)}")

    def save_adapter(self, name: str, folder: str | Path) -> None:
        """Write a loaded LoRA as a self-contained folder, as ``save_adapters`` does.

        Raises:
            UserError: if the name is unknown or not a LoRA's, or the folder is not empty.
        """
        loaded = self.adapters
        loaded.check_loaded(name)
        adapters = {stage: self.merged[stage].adapters[name] for stage in loaded[name]}
        save_adapters(adapters, expand_home(folder))

    @alone
    def remove_adapter(self, name: str) -> None:
        """Remove an adapter and free the memory kept for it.

        Raises:
            UserError: if the name is unknown.
        """
        loaded = self.adapters
        loaded.check_loaded(name)
        for stage in loaded[name]:
            self.merged[stage].remove(name)
        self.sources.pop(name, None)

    @alone
    def remove_adapters(self) -> None:
        """Remove all adapters; every weight is the base's own again, to the bit."""
        self.set_adapters({})
        for name in self.adapters:
            self.remove_adapter(name)

    @alone
    def free_graphs(self) -> None:
        """Free the GPU memory of recorded forward passes; the next pictures record them again."""
        for recorded in self.recorded.values():
            recorded.forget()

    def _for_stages(self, folder: str | Path) -> dict[int, StageAdapter]:
        """Read the adapters of a folder, by stage, and check that they belong to the bases."""
        configs = {number: pipe.unet.config for number, pipe in self.stages.items()}
        adapters = find_adapters(folder, configs)
        for stage, adapter in adapters.items():
            adapter.check_base(self.merged[stage].base, self.base_names[stage])
        return adapters

    def _load(
        self, adapters: Mapping[int, StageAdapter], scale: Scale, name: str, source: str
    ) -> str:
        before = self.adapters
        before.check_free(name)
        factors = split_scale(scale, adapters, self.stages, f"adapter {name!r}")
        try:
            for stage, adapter in adapters.items():
                self.merged[stage].add(name, adapter)
            self._set(before | {name: factors})
        except BaseException:
            if name in self.adapters:
                self.remove_adapter(name)
            raise
        self.sources[name] = source
        return name

    def _set(self, factors: Mapping[str, Mapping[int, float]]) -> None:
        for stage, merged in self.merged.items():
            merged.set({name: own[stage] for name, own in factors.items() if stage in own})

    def _by_stage(self, scales: Scales) -> dict[str, dict[int, float]]:
        """Check scales, and arrange them by adapter and stage."""
        loaded, factors = self.adapters, {}
        for name, scale in read_scales(scales).items():
            loaded.check_loaded(name)
            factors[name] = split_scale(scale, loaded[name], self.stages, f"adapter {name!r}")
        return factors


def find_adapters(
    folder: str | Path, configs: Mapping[int, Mapping[str, Any]]
) -> dict[int, StageAdapter]:
    """Read the adapters of a folder or hub name for the stages that there are, by stage.

    Args:
        folder: as :meth:`AdaptedStages.add_adapter` takes it.
        configs: the configurations of the stages' UNets.

    Raises:
        UserError: if these stages have no adapter, or there are two for one.
    """
    staged = [(adapter.stage_among(configs), adapter) for adapter in StageAdapter.load_all(folder)]
    fitting = [(stage, adapter) for stage, adapter in staged if stage in configs]
    if not fitting:
        raise UserError(
            f"{folder} has an adapter of Stage"
            f" {' and '.join(str(stage) for stage, _ in staged)}, but this"
            f" cascade has Stage {' and '.join(map(str, configs))}; load the stage that it"
            " belongs to."
        )
    if len(dict(fitting)) < len(fitting):
        raise UserError(
            f"{folder} has two adapters of Stage {fitting[0][0]}; load them one by one."
        )
    return dict(fitting)


def _predict(unet: UNet2DConditionModel, **inputs: Tensor) -> Tensor:
    prediction: Tensor = type(unet).forward(unet, **inputs, return_dict=False)[0]
    return prediction
