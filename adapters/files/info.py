"""An exported adapter's description of itself, in the header of its safetensors files."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from adapters.base.signature import BaseSignature
from adapters.errors import UserError
from adapters.files.places import PEFT_WEIGHTS
from adapters.weights.kinds import AdapterSpec

HEADER_KEY = "if_adapter"
"""The entry of the safetensors header that holds an :class:`AdapterInfo` as JSON."""

NOTICE = (
    "DeepFloyd is licensed under the DeepFloyd License,"
    " Copyright (c) Stability AI Ltd. All Rights Reserved."
)
"""The attribution that the DeepFloyd licence requires of anything derived from its weights."""


class AdapterInfo(BaseModel):
    """The description that an exported adapter of one stage carries."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    base_model: str
    """The base it was trained on: a hub name or a folder."""
    base_revision: str | None = None
    """The base's hub revision, if one was given."""
    stage: int = Field(ge=1, le=2)
    """The stage it belongs to."""
    spec: AdapterSpec
    """Its kind, rank, alpha, dropout and targets."""
    prompts: tuple[str, ...] = ()
    """Prompts that show what it has learned."""
    step: int
    """Optimizer steps it was trained for."""
    last_step: int | None = None
    """The last step of its run, if it is not the last but the best by validation."""
    choice: str | None = None
    """A sentence on why it is of this step; ``None``: it is the run's last."""
    stopped_early: bool = False
    """True if validation's patience ended the run before the last step of its recipe."""
    sampling: dict[str, dict[str, int | float | str | None]] | None = Field(
        default=None, repr=False
    )
    """The sampling settings of its run's validation, by stage (``stage_1`` …), as
    :class:`adapters.Sampling` takes them; ``None``: not known."""
    recipe: str = Field(repr=False)
    """The resolved recipe of the run, as YAML."""
    version: str
    """The version of this toolkit."""
    created: str | None = None
    """The time of its export (ISO 8601, UTC), in files of earlier versions: since then, the same
    adapter has the same bytes."""
    licence_notice: str | None = None
    """The attribution notice that its base's licence asks for."""
    approximation_error: float | None = None
    """The relative Frobenius error, if this approximates another adapter or a model."""
    base_signature: BaseSignature | None = Field(default=None, repr=False)
    """Signature of its base's weights; filled in at export."""


def read_info(folder: str | Path) -> AdapterInfo:
    """Read the description of the exported adapter of one stage.

    Args:
        folder: the stage's folder, such as ``adapters/stage_1``.

    Raises:
        UserError: if there is no adapter that this toolkit exported.

    Example:
        >>> read_info("runs/quickstart/adapters/stage_1")
        AdapterInfo(base_model='models/if-tiny/stage_1', base_revision=None, stage=1,
        spec=AdapterSpec(kind='lora', rank=4, alpha=None, dropout=0.0, targets='attention'), ...)
    """
    path = Path(folder) / PEFT_WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as an exported adapter ({error}); name the folder that a run"
            " exported, or one of its stage folders."
        ) from error
    return parse_info(header, path)


def parse_info(header: Mapping[str, str], path: Path) -> AdapterInfo:
    """Parse the description in the header of an adapter's file; a UserError if it has none."""
    try:
        return AdapterInfo.model_validate_json(header[HEADER_KEY], strict=False)
    except (KeyError, ValidationError) as error:
        raise UserError(
            f"{path} does not say which base and stage it belongs to (its header has no valid"
            f" {HEADER_KEY!r} entry); export it again with this version, or load it with diffusers."
        ) from error
