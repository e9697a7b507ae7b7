"""The record of a picture's settings, kept in its PNG."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from adapters.arguments import LARGEST_SCALE, LAST_SEED
from adapters.cascade.redraw import Way
from adapters.cascade.sampling import Sampling, nest
from adapters.errors import UserError, __version__
from adapters.mistakes import describe_first
from adapters.pictures.png import PICTURE_KEY, SHEET_KEY, Signed, plain_texts
from adapters.pictures.reading import open_picture

Value = TypeVar("Value")

Stage: TypeAlias = Annotated[int, Field(ge=1, le=3)]

UsedScale: TypeAlias = Annotated[float, Field(ge=-LARGEST_SCALE, le=LARGEST_SCALE)]

Share: TypeAlias = Annotated[float, Field(gt=0, le=1)]


class UsedAdapter(BaseModel):
    """An adapter that a picture was drawn with."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    source: str
    """The folder, file or hub name that it was loaded from."""
    scales: dict[Stage, UsedScale]
    """Its scale in each stage."""

    def __str__(self) -> str:
        """Format the scale, by stage if the stages differ."""
        different = len(set(self.scales.values())) > 1
        each = (f"{stage}:" * different + f"{scale:g}" for stage, scale in self.scales.items())
        return ",".join(dict.fromkeys(each))


class PictureInfo(BaseModel):
    """All that determines a picture, except the values of the models' weights.

    Dictionaries by stage end with the picture's own stage, and include those it depends on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    stage: Stage
    """The stage that drew the picture."""
    seed: Annotated[int, Field(ge=0, le=LAST_SEED)] = 0
    """The picture's seed, in every stage."""
    prompts: dict[Stage, str] = {}
    """The prompt of each stage."""
    negative_prompt: str | None = None
    """The prompt that guidance steered away from; ``None``: the empty caption."""
    clean_caption: bool = True
    """True if prompts were cleaned, as IF's pipelines do by default."""
    models: dict[Stage, str]
    """The base models, by the names that the user gave."""
    revision: str | None = None
    """The hub revision of Stage I and II, if one was given apart from their names."""
    variant: str | None = None
    """The weights' variant of Stage I and II, if one was given."""
    precisions: dict[Stage, str]
    """The precision of the UNets' weights."""
    adapters: dict[str, UsedAdapter] = {}
    """The adapters that were merged, by name."""
    sampling: Sampling
    """Steps, guidance and noise levels."""
    way: Way = "text"
    """The kind of drawing: from text alone, from a picture (``img2img``), masked (``inpaint``)."""
    strength: dict[Stage, Share] = {}
    """The strength of each stage that started from a picture."""
    version: str = __version__
    """The version of this toolkit."""

    @field_validator("sampling", mode="before")
    @classmethod
    def _read_flat_names(cls, given: Any) -> Any:
        return nest(given) if isinstance(given, dict) else given  # as in PNGs of version 0.1

    @property
    def prompt(self) -> str:
        """The prompt of the stage that drew the picture."""
        return self.prompts.get(self.stage, "")

    def of_each(
        self,
        seeds: Sequence[int],
        prompts: Mapping[int, Sequence[str]],
        negative_prompts: Sequence[str],
    ) -> Iterator["PictureInfo"]:
        """Yield the infos of pictures that differ only in seed and prompts (by stage)."""
        for row, (seed, negative) in enumerate(zip(seeds, negative_prompts, strict=True)):
            own = {stage: texts[row] for stage, texts in prompts.items()}
            yield self.model_copy(
                update={"seed": seed, "prompts": own, "negative_prompt": negative or None}
            )

    def of_stage(self, stage: int) -> "PictureInfo":
        """Derive the info of an earlier stage's picture, drawn on the way to this one."""
        adapters = {
            name: adapter.model_copy(update={"scales": _up_to(stage, adapter.scales)})
            for name, adapter in self.adapters.items()
        }
        by_stage = {
            name: _up_to(stage, values)
            for name, values in vars(self).items()
            if name in ("prompts", "models", "precisions", "strength")
        }
        used = {name: adapter for name, adapter in adapters.items() if adapter.scales}
        return self.model_copy(update={"stage": stage, "adapters": used, **by_stage})

    @property
    def texts(self) -> dict[str, str]:
        """The texts for its PNG: all of it as ``if_picture``, and plain ``prompt`` and ``seed``."""
        return plain_texts(self.prompt, self.seed) | {PICTURE_KEY: self.model_dump_json()}


def signed(
    pictures: Mapping[int, Sequence[Image.Image]], infos: Sequence[PictureInfo]
) -> dict[int, tuple[Signed, ...]]:
    """Attach their records to pictures, by stage; ``infos`` are those of the last stage."""
    return {
        stage: tuple(
            Signed.of(picture, info.of_stage(stage).texts)
            for picture, info in zip(drawn, infos, strict=True)
        )
        for stage, drawn in pictures.items()
    }


def sheet_texts(infos: Sequence[PictureInfo]) -> dict[str, str]:
    """Make the text of a contact sheet: its pictures' records as a JSON list."""
    return {SHEET_KEY: f"[{','.join(info.model_dump_json() for info in infos)}]"} if infos else {}


def used_adapters(
    scales: Mapping[str, Mapping[int, float]], sources: Mapping[str, str], stages: Collection[int]
) -> dict[str, UsedAdapter]:
    """List the adapters that are switched on in some of the stages, by name, with their sources."""
    on = {
        name: {stage: scale for stage, scale in own.items() if scale and stage in stages}
        for name, own in scales.items()
    }
    return {n: UsedAdapter(source=sources[n], scales=own) for n, own in on.items() if own}


def read_picture_info(path: str | Path) -> PictureInfo:
    """Read the record of a saved picture's settings.

    Raises:
        UserError: if the file is not a picture, or has no record.

    Example:
        >>> few = Sampling(
        ...     stage_1=StageSampling(timesteps="fast27"), stage_2=StageSampling(steps=2)
        ... )
        >>> cascade("a car on a pink background", seed=3, sampling=few)[0].save("car.png")
        >>> info = read_picture_info("car.png")
        >>> info.stage, info.seed, info.prompt, info.sampling.stage_1.steps
        (2, 3, 'a car on a pink background', 27)
    """
    with open_picture(path) as picture:  # opened only: the texts come before the pixels
        text = picture.info.get(PICTURE_KEY)
    if not isinstance(text, str):
        raise UserError(
            f"{path} does not say what it was drawn with (it is not a PNG with a {PICTURE_KEY!r}"
            " text); name a picture that this toolkit saved."
        )
    try:
        return PictureInfo.model_validate_json(text, strict=False)
    except ValidationError as error:
        field, words = describe_first(error)
        raise UserError(
            f"{path} does not say what it was drawn with (its {PICTURE_KEY!r} text is damaged:"
            f" {field} {words}); name a picture that this toolkit saved."
        ) from error


def _up_to(stage: int, values: Mapping[int, Value]) -> dict[int, Value]:
    return {number: value for number, value in values.items() if number <= stage}
