"""Pictures from the shell: ``python -m adapters.generate --adapter A --prompt P --out DIR``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from adapters.errors import UserError, command_line
from adapters.info import AdapterInfo
from adapters.load import load_cascade
from adapters.merging import StageAdapter
from adapters.sampling import Sampling
from adapters.scales import parse_scaled
from unets.loading import Precision


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample prompts and write every stage's pictures and a contact sheet."""
    options = parser().parse_args(arguments)
    with command_line():
        sheet = generate(options)
    sys.stdout.write(f"{sheet}\n")


def parser() -> argparse.ArgumentParser:
    """The command line; sampling settings are the fields of :class:`Sampling`."""
    parser = argparse.ArgumentParser(
        prog="adapters.generate", description="Sample pictures from the cascade, with adapters."
    )
    add = parser.add_argument
    add("--prompt", action="append", required=True, help="what to draw; may be repeated")
    add("--negative-prompt", help="what to lead away from")
    add("--out", type=Path, required=True, help="the folder for the pictures")
    help_ = (
        "an exported folder or owner/name[@revision], and its scale: A, A=0.7, by stage"
        " A=1:0.5,2:1; may be repeated"
    )
    add("--adapter", action="append", default=[], metavar="ADAPTER[=SCALE]", help=help_)
    add("--scale", type=float, default=1.0, help="of adapters without a scale of their own (1)")
    add("--stage-1", help="Stage I, folder or hub name (the adapter's own base)")
    add("--stage-2", help="Stage II (the adapter's own base; otherwise none)")
    add("--stage-3", help="the x4 upscaler (none)")
    add("--revision", help="the hub revision of Stage I and II")
    add("--variant", help="the weights' variant of Stage I and II, such as fp16")
    add("--seed", type=int, default=0, help="the first picture's seed (0)")
    add("--images-per-prompt", type=int, default=1, help="pictures of each prompt (1)")
    add("--device", default="auto", help="such as cuda or cpu (auto: the GPU where there is one)")
    add("--dtype", choices=("auto", *get_args(Precision)), default="auto", help="precision (auto)")
    for name, field in Sampling.model_fields.items():
        kind, text = type(field.default), f"{field.description} ({field.default:g})"
        add(f"--{name.replace('_', '-')}", type=kind, default=field.default, help=text)
    return parser


def generate(options: argparse.Namespace) -> Path:
    """Sample and write; returns the path of the contact sheet."""
    settings = sampling(options)
    adapters = [parse_scaled(argument) for argument in options.adapter]
    own = {info.stage: info for name, _ in adapters for info in infos(name)}
    bases = {stage: info.base_model for stage, info in own.items()}
    revisions = (info.base_revision for info in own.values())
    cascade = load_cascade(
        options.stage_1 or bases.get(1),
        options.stage_2 or bases.get(2),
        options.stage_3,
        revision=options.revision or next(revisions, None),
        variant=options.variant,
        device=options.device,
        dtype=options.dtype,
    )
    for folder, scale in adapters:
        cascade.add_adapter(folder, options.scale if scale is None else scale)
    images = cascade(
        options.prompt,
        negative_prompt=options.negative_prompt,
        seed=options.seed,
        images_per_prompt=options.images_per_prompt,
        sampling=settings,
    )
    return images.save(options.out)


def infos(folder: str | Path) -> list[AdapterInfo]:
    """What the adapters in a folder say of themselves; those of other tools say nothing."""
    loaded = StageAdapter.load_all(folder)
    return [adapter.info for adapter in loaded if adapter.info is not None]


def sampling(options: argparse.Namespace) -> Sampling:
    """The sampling settings of a command line.

    Raises:
        UserError: where one is out of range.
    """
    try:
        return Sampling(**{name: vars(options)[name] for name in Sampling.model_fields})
    except ValidationError as error:
        mistake = error.errors()[0]
        flag = "--" + str(mistake["loc"][0]).replace("_", "-")
        raise UserError(f"{flag}: {mistake['msg']} (got {mistake['input']}).") from None


if __name__ == "__main__":
    main()
