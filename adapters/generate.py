"""Pictures from the shell: ``python -m adapters.generate --adapter A --prompt P --out DIR``.

``--like PICTURE.png`` draws a saved picture anew, or another one but for what else is given.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from adapters.arguments import check_seeds, parse_scale, parse_scaled, written
from adapters.atomic import check_out
from adapters.base.hub import with_revision
from adapters.cascade.cascade import Cascade
from adapters.cascade.embeds import load_embeds
from adapters.cascade.load import Parts, load_cascade
from adapters.cascade.provenance import PictureInfo, read_picture_info
from adapters.cascade.redraw import WAYS, Redraw
from adapters.cascade.sampling import DEFAULTS as DEFAULT_SETTINGS
from adapters.cascade.sampling import RENAMED, Sampling, SettingError, StageSampling, nest
from adapters.errors import UserError, command_line
from adapters.files.info import AdapterInfo
from adapters.files.stage_adapter import StageAdapter
from adapters.texts import KEEP_IN_PYTHON, check_captions, check_texts
from unets.loading import Precision

DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("prompt", "stage_2_prompt", "stage_3_prompt", "negative_prompt", "embeds")),
    **dict.fromkeys(("low_res", "image", "mask", "strength")),
    **dict.fromkeys(("stage_1", "stage_2", "stage_3", "revision", "variant", "memory")),
    "adapter": [],
    "scale": 1.0,
    "seed": 0,
    "images_per_prompt": 1,
    "clean_caption": True,
    "device": "auto",
    "dtype": "auto",
}
"""Of options that neither the command line nor a picture to draw anew gives."""


FLAGS = {
    flag: place
    for flag, place in RENAMED.items()
    if place not in (("stage_1", "noise_level"), ("stage_3", "timesteps"))
    and flag != "stage_2_noise_level"
}
"""The sampling settings of a stage by their options' names."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample prompts and write every stage's pictures and a contact sheet."""
    given = vars(parser().parse_args(arguments))
    with command_line():
        sheet = generate(given)
    sys.stdout.write(f"{sheet}\n")


def parser() -> argparse.ArgumentParser:
    """The command line; what is not given is not in its result."""
    parser = argparse.ArgumentParser(
        prog="adapters.generate",
        description="Sample pictures from the cascade, with adapters.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--prompt", action="append", help="what to draw; may be repeated")
    told = "what Stage {} is told instead, once for all prompts or for each (as Stage {})"
    add("--stage-2-prompt", action="append", metavar="PROMPT", help=told.format("II", "I"))
    add("--stage-3-prompt", action="append", metavar="PROMPT", help=told.format("III", "II"))
    add("--negative-prompt", help="what to lead away from")
    help_ = "clean prompts as IF's pipelines do; drops <sks>, j0hn, #3 and all Chinese (clean)"
    add("--clean-caption", action=argparse.BooleanOptionalAction, help=help_)
    add("--embeds", metavar="FILE", help="encodings of all these, by adapters.encode; no encoder")
    add("--out", type=Path, required=True, help="the folder for the pictures")
    help_ = "a square picture to enlarge, once for all prompts or for each; no Stage I (none)"
    add("--low-res", action="append", metavar="FILE", help=help_)
    add("--like", metavar="PNG", help="a saved picture to draw anew, but for what else is given")
    help_ = (
        "a picture to start from, with the settings that diffusers' pipelines for it have (none)"
    )
    add("--image", metavar="FILE", help=help_)
    add("--mask", metavar="FILE", help="of its size: white is drawn anew, black stays (none)")
    help_ = "how far from the picture, up to 1: S, by stage 1:0.6,2:0.9 (the pipelines' own)"
    add("--strength", metavar="S", help=help_)
    help_ = (
        "an exported folder or owner/name[@revision], and its scale: A, A=0.7, by stage"
        " A=1:0.5,2:1; may be repeated"
    )
    add("--adapter", action="append", metavar="ADAPTER[=SCALE]", help=help_)
    add("--scale", type=float, help="of adapters without a scale of their own (1)")
    add("--stage-1", help="Stage I: folder or owner/name[@revision] (the adapter's own base)")
    add("--stage-2", help="Stage II, likewise (the adapter's own base; otherwise none)")
    add("--stage-3", help="the x4 upscaler, likewise (none)")
    add("--revision", help="of Stage I and II without one (the adapter's, for its base)")
    add("--variant", help="the weights' variant of Stage I and II, such as fp16")
    add("--seed", type=int, help="the first picture's seed (0)")
    add("--images-per-prompt", type=int, help="pictures of each prompt (1)")
    add("--device", help="such as cuda or cpu (auto: the GPU where there is one)")
    add("--dtype", choices=("auto", *get_args(Precision)), help="precision (auto)")
    add("--memory", help="the GPU's, such as 6GB: choose precisions and places that fit it (none)")
    for flag, (stage, setting) in FLAGS.items():
        default = DEFAULT_SETTINGS[int(stage[-1])].model_dump()[setting]
        text = str(StageSampling.model_fields[setting].description).replace("``", "`").split(";")[0]
        shown = "none" if default is None else f"{default:g}"
        kind = str if default is None else type(default)
        add(f"--{flag.replace('_', '-')}", type=kind, help=f"Stage {stage[-1]}: {text} ({shown})")
    size = Sampling.model_fields["batch_size"]
    add("--batch-size", type=int, help=f"{size.description} ({size.default})")
    return parser


def generate(given: dict[str, Any]) -> Path:
    """Sample and write; returns the path of the contact sheet.

    Args:
        given: what the command line gives, by name.

    Raises:
        UserError: where something is missing, out of range or cannot be loaded.
    """
    info = read_picture_info(given["like"]) if "like" in given else None
    known = {} if info is None else options_of(info)
    options = argparse.Namespace(**(DEFAULTS | known | given))
    if not options.prompt:
        raise UserError("There is nothing to draw; give --prompt, or a picture with --like.")
    redraw = given_pictures(options, info)
    low_res = None if options.low_res is None else Redraw.of(options.low_res).pictures
    settings = sampling(given, info, redraw)
    check_seeds([options.seed])
    texts = {options.negative_prompt or "": "--negative-prompt"}
    texts |= dict.fromkeys(options.stage_2_prompt or (), "--stage-2-prompt")
    texts |= dict.fromkeys(options.prompt, "--prompt")
    check_texts(texts)
    if options.embeds is None:
        check_captions(texts, clean_caption=options.clean_caption, setting=KEEP_IN_PYTHON)
    check_out(options.out, "folder")
    embeds = None if options.embeds is None else load_embeds(options.embeds)
    images = loaded(options, info)(
        options.prompt,
        stage_2_prompt=options.stage_2_prompt,
        stage_3_prompt=options.stage_3_prompt,
        negative_prompt=options.negative_prompt,
        seed=options.seed,
        images_per_prompt=options.images_per_prompt,
        sampling=settings,
        low_res=low_res,
        redraw=redraw,
        embeds=embeds,
        clean_caption=options.clean_caption,
    )
    return images.save(options.out)


def options_of(info: PictureInfo) -> dict[str, Any]:
    """The options that draw a picture anew; pictures to start from are not known."""
    named = {
        "negative_prompt": info.negative_prompt,
        "clean_caption": info.clean_caption,
        "seed": info.seed,
        "revision": info.revision,
        "variant": info.variant,
        "adapter": [f"{used.source}={written(used.scales)}" for used in info.adapters.values()],
        "strength": written(info.strength) or None,
    }
    models = {f"stage_{stage}": name for stage, name in info.models.items()}
    texts = list(info.prompts.values())
    prompts = {"prompt": texts[:1], "stage_2_prompt": texts[1:2], "stage_3_prompt": texts[2:]}
    before = {"stage_2_prompt": texts[:1], "stage_3_prompt": texts[1:2]}
    own = {name: told for name, told in prompts.items() if told and told != before.get(name)}
    return named | models | own


def given_pictures(options: argparse.Namespace, info: PictureInfo | None) -> Redraw | None:
    """The picture to start from, with its mask; ``None``: there is none.

    Raises:
        UserError: where one is needed and not given, or cannot be read.
    """
    way = "text" if info is None else info.way
    wanted = {
        "image": way != "text" or options.mask is not None or options.strength is not None,
        "mask": way == "inpaint",
    }
    missing = [
        f"--{name}" for name, needed in wanted.items() if needed and vars(options)[name] is None
    ]
    if missing:
        raise UserError(f"These pictures start from a picture; give {' and '.join(missing)} too.")
    if options.image is None:
        return None
    try:
        strength = None if options.strength is None else parse_scale(options.strength)
    except ValueError:
        raise UserError(
            f"--strength must be a number up to 1, or one for each stage as in 1:0.6,2:0.9 (got"
            f" {options.strength!r})."
        ) from None
    return Redraw.of(options.image, options.mask, strength)


def sampling(given: Mapping[str, Any], info: PictureInfo | None, redraw: Redraw | None) -> Sampling:
    """The sampling settings of a command line, over those of a picture or the pipelines' own.

    Raises:
        UserError: where one is out of range, or two do not go together.
    """
    base = WAYS["text" if redraw is None else redraw.way].sampling
    try:
        names = (*FLAGS, "batch_size")
        flat = {name: given[name] for name in names if name in given}
        return (info.sampling if info else base).but(**nest(flat))
    except SettingError as error:
        flags: dict[tuple[str, ...], str] = {place: flag for flag, place in FLAGS.items()}
        flag = flags.get(error.place, error.place[-1])
        raise UserError(f"--{flag.replace('_', '-')}: {error.reason}") from None


def loaded(options: argparse.Namespace, info: PictureInfo | None) -> Cascade:
    """The cascade with its adapters; of models that are not named, those that they belong to."""
    parsed = [parse_scaled(argument) for argument in options.adapter]
    adapters = [(name, options.scale if scale is None else scale) for name, scale in parsed]
    own = {} if info else {each.stage: each for name, _ in adapters for each in infos(name)}
    bases = {
        stage: with_revision(each.base_model, None if options.revision else each.base_revision)
        for stage, each in own.items()
    }
    return load_cascade(
        options.stage_1 or (None if options.low_res else bases.get(1)),
        options.stage_2 or bases.get(2),
        options.stage_3,
        adapters=adapters,
        revision=options.revision,
        variant=options.variant,
        device=options.device,
        dtype=options.dtype,
        memory=options.memory,
        parts=Parts(text_encoder=options.embeds is None),
    )


def infos(folder: str | Path) -> list[AdapterInfo]:
    """What the adapters in a folder say of themselves; those of other tools say nothing."""
    loaded = StageAdapter.load_all(folder)
    return [adapter.info for adapter in loaded if adapter.info is not None]


if __name__ == "__main__":
    main()
