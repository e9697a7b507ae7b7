"""The command that draws pictures: ``python -m adapters.generate --prompt P --out FOLDER``.

``--like PICTURE.png`` draws a saved picture again; other options override its settings.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from adapters.arguments import Scale, expand_home, format_scales, parse_scale, parse_scaled
from adapters.atomic import check_out
from adapters.cascade.sampling import DEFAULTS as DEFAULT_SETTINGS
from adapters.cascade.sampling import RENAMED, Sampling, SettingError, StageSampling, nest
from adapters.command import command_parser, run_command
from adapters.errors import UserError, print_once
from unets.precision import Precision

if TYPE_CHECKING:
    from PIL import Image

    from adapters.cascade.cascade import Cascade
    from adapters.cascade.provenance import PictureInfo
    from adapters.cascade.redraw import Redraw
    from adapters.files.info import AdapterInfo

DEFAULTS: dict[str, Any] = {
    "adapter": [],
    "scale": 1.0,
    "seed": 0,
    "images_per_prompt": 1,
    "clean_caption": True,
    "device": "auto",
    "dtype": "auto",
}
"""The values of options that neither the command line nor a ``--like`` picture gives."""

PUBLISHED = "published"
"""The choice of the published pipelines' own sampling settings."""

FLAGS = {
    flag: place
    for flag, place in RENAMED.items()
    if place not in (("stage_1", "noise_level"), ("stage_3", "timesteps"))
    and flag != "stage_2_noise_level"
}
"""The stage and the name of each sampling setting, by its option's name."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample prompts, and write every stage's pictures and a contact sheet."""
    run_command(parser(), arguments, generate)


def parser() -> argparse.ArgumentParser:
    """Build the command line's parser; options that are not given are ``None``."""
    parser = command_parser(
        "generate",
        "Sample pictures from the cascade, with adapters.",
        '--adapter runs/dog --prompt "a sks dog on the moon" --out pictures',
        "--clean-caption",
    )
    add = parser.add_argument
    add("--prompt", action="append", help="what to draw; may be repeated")
    text = (
        "the prompt of Stage {}, one for all pictures or one for each prompt (default: Stage {}'s)"
    )
    add("--stage-2-prompt", action="append", metavar="PROMPT", help=text.format("II", "I"))
    add("--stage-3-prompt", action="append", metavar="PROMPT", help=text.format("III", "II"))
    add("--negative-prompt", metavar="PROMPT", help="what the pictures should not show")
    help_ = "the prompts' encodings, from adapters.encode; no text encoder is then loaded"
    add("--embeds", metavar="FILE", help=help_)
    add(
        "--out",
        type=expand_home,
        required=True,
        metavar="FOLDER",
        help="the folder for the pictures",
    )
    help_ = "a square picture to enlarge, one for all prompts or one for each; replaces Stage I"
    add("--low-res", action="append", metavar="FILE", help=help_)
    help_ = "a saved picture to draw again; other options override its settings"
    add("--like", metavar="PNG", help=help_)
    help_ = "a picture to start from; changes the defaults to those of diffusers' pipelines for it"
    add("--image", metavar="FILE", help=help_)
    help_ = "a picture of the same size: white is drawn again, black stays"
    add("--mask", metavar="FILE", help=help_)
    help_ = "how much of --image to change, up to 1, or by stage 1:0.6,2:0.9"
    add("--strength", metavar="S", help=help_)
    help_ = (
        "an exported folder or owner/name[@revision], with its scale: A, A=0.7, or by stage"
        " A=1:0.5,2:1; may be repeated"
    )
    add("--adapter", action="append", metavar="ADAPTER[=SCALE]", help=help_)
    add("--scale", type=float, help="the scale of adapters given without one (default: 1)")
    help_ = "Stage I: folder or owner/name[@revision] (default: the adapter's own base)"
    add("--stage-1", metavar="MODEL", help=help_)
    add("--stage-2", metavar="MODEL", help="Stage II (default: the adapter's own base, if any)")
    add("--stage-3", metavar="MODEL", help="the x4 upscaler (default: none)")
    help_ = "the hub revision of Stage I and II (default: the adapter's, for its base)"
    add("--revision", help=help_)
    add("--variant", help="the weights' variant of Stage I and II, such as fp16")
    add("--seed", type=int, help="the first picture's seed (default: 0)")
    add("--images-per-prompt", type=int, metavar="N", help="pictures of each prompt (default: 1)")
    add("--device", help="the device, such as cuda or cpu (default: a GPU if there is one)")
    add("--dtype", choices=("auto", *get_args(Precision)), help="precision (default: auto)")
    help_ = "GPU memory to stay within, such as 6GB; chooses precisions and placement to fit"
    add("--memory", help=help_)
    for flag, (stage, setting) in FLAGS.items():
        default = DEFAULT_SETTINGS[int(stage[-1])].model_dump()[setting]
        text = str(StageSampling.model_fields[setting].description).replace("``", "`").split(";")[0]
        shown = "none" if default is None else f"{default:g}"
        kind = str if default is None else type(default)
        help_ = f"Stage {stage[-1]}: {text} ({shown})"
        add(f"--{flag.replace('_', '-')}", type=kind, metavar=setting.upper(), help=help_)
    help_ = (
        "the settings that the options above change: those that the adapter was validated with in"
        " training, or the published ones, in brackets (default: as trained, if the adapter records"
        " them)"
    )
    add("--sampling", choices=("as_trained", PUBLISHED), help=help_)
    size = Sampling.model_fields["batch_size"]
    add("--batch-size", type=int, help=f"{size.description} ({size.default})")
    return parser


def generate(parsed: argparse.Namespace) -> Path:
    """Sample and write pictures; return the path of the contact sheet.

    Raises:
        UserError: if an option is missing or out of range, or a file or model cannot be loaded.
    """
    from adapters.cascade.conditioning import lay_out
    from adapters.cascade.embeds import load_embeds, look_up
    from adapters.cascade.provenance import read_picture_info
    from adapters.cascade.redraw import read_pictures
    from adapters.texts import KEEP_IN_PYTHON, check_captions, check_texts

    given = {name: value for name, value in vars(parsed).items() if value is not None}
    info = None if parsed.like is None else read_picture_info(parsed.like)
    known = {} if info is None else _read_options(info)
    options = argparse.Namespace(**vars(parsed) | DEFAULTS | known | given)
    if not options.prompt:
        raise UserError("There is nothing to draw; give --prompt, or a picture with --like.")
    negative = options.negative_prompt or ""
    check_texts([negative])
    texts = {1: options.prompt, 2: options.stage_2_prompt, 3: options.stage_3_prompt}
    layout, prompts = lay_out(texts, options.images_per_prompt)
    layout.seeds(options.seed)
    if options.embeds is None:
        places = {negative: "--negative-prompt"} | dict.fromkeys(prompts[2], "--stage-2-prompt")
        places |= dict.fromkeys(prompts[1], "--prompt")
        check_captions(places, clean_caption=options.clean_caption, setting=KEEP_IN_PYTHON)
    check_out(options.out, "folder")
    redraw = _read_redraw(options, info)
    low_res = options.low_res and read_pictures(options.low_res, "The picture of --low-res")
    if low_res:
        layout.spread(low_res, "pictures of --low-res")
    adapters = _read_adapters(options)
    settings = _read_sampling(given, _find_base_sampling(options, info, redraw, adapters))
    models = _find_models(options, info, adapters)
    _check_models(options, models, settings, redraw, low_res)
    _say_without_effect(options, given, models, settings)
    embeds = None if options.embeds is None else load_embeds(options.embeds)
    if embeds is not None:
        look_up(embeds, [*dict.fromkeys([*prompts[1], *prompts[2], negative])])
    images = _load(options, models, adapters)(
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


def _read_options(info: "PictureInfo") -> dict[str, Any]:
    """Read the options that draw a picture again; the one that it started from is not stored."""
    named = {
        "negative_prompt": info.negative_prompt,
        "clean_caption": info.clean_caption,
        "seed": info.seed,
        "revision": info.revision,
        "variant": info.variant,
        "adapter": [
            f"{used.source}={format_scales(used.scales)}" for used in info.adapters.values()
        ],
        "strength": format_scales(info.strength) or None,
    }
    models = {f"stage_{stage}": name for stage, name in info.models.items()}
    texts = list(info.prompts.values())
    prompts = {"prompt": texts[:1], "stage_2_prompt": texts[1:2], "stage_3_prompt": texts[2:]}
    before = {"stage_2_prompt": texts[:1], "stage_3_prompt": texts[1:2]}
    own = {name: given for name, given in prompts.items() if given and given != before.get(name)}
    return named | models | own


def _read_redraw(options: argparse.Namespace, info: "PictureInfo | None") -> "Redraw | None":
    """Read the picture to start from and its mask, if any; a UserError if one is missing."""
    from adapters.cascade.redraw import Redraw

    way = "text" if info is None else info.way
    wanted = {
        "image": way != "text" or options.mask is not None or options.strength is not None,
        "mask": way == "inpaint",
    }
    missing = [
        f"--{name}" for name, needed in wanted.items() if needed and vars(options)[name] is None
    ]
    if missing:
        raise UserError(f"To draw from a picture, give {' and '.join(missing)} too.")
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


@dataclass(frozen=True)
class _Named:
    """An adapter of the command line, with what its stages say of themselves."""

    name: str
    scale: Scale
    infos: Sequence["AdapterInfo"]


def _read_adapters(options: argparse.Namespace) -> list[_Named]:
    """Read the descriptions of all adapters that are named."""
    from adapters.files.stage_adapter import StageAdapter

    found = []
    for name, scale in map(parse_scaled, options.adapter):
        infos = [adapter.info for adapter in StageAdapter.load_all(name) if adapter.info]
        found.append(_Named(name, options.scale if scale is None else scale, infos))
    return found


def _find_base_sampling(
    options: argparse.Namespace,
    info: "PictureInfo | None",
    redraw: "Redraw | None",
    adapters: Sequence[_Named],
) -> Sampling:
    """Find the settings that options change: a picture's, the adapters', or the pipelines'."""
    from adapters.cascade.as_trained import find_sampling
    from adapters.cascade.redraw import WAYS

    if info is not None:
        return info.sampling
    trained = None
    if options.sampling != PUBLISHED:
        stages = [(each.name, own) for each in adapters if each.scale for own in each.infos]
        trained = find_sampling(stages)
        if trained is None and options.sampling is not None:
            raise UserError(
                "No adapter records the settings of its training's validation; leave out"
                f" --sampling {options.sampling}, and give the settings."
            )
    return trained or WAYS["text" if redraw is None else redraw.way].sampling


def _read_sampling(given: Mapping[str, Any], base: Sampling) -> Sampling:
    """Read the given sampling settings over others."""
    try:
        names = (*FLAGS, "batch_size")
        flat = {name: given[name] for name in names if name in given}
        return base.but(**nest(flat))
    except SettingError as error:
        flags: dict[tuple[str, ...], str] = {place: flag for flag, place in FLAGS.items()}
        flag = flags.get(error.place, error.place[-1])
        raise UserError(f"--{flag.replace('_', '-')}: {error.reason}") from None


def _find_models(
    options: argparse.Namespace, info: "PictureInfo | None", adapters: Sequence[_Named]
) -> dict[int, str]:
    """Find the models' names by stage; those not named default to the adapters' bases."""
    from adapters.base.hub import with_revision

    bases = {}
    for each in () if info else adapters:
        for own in each.infos:
            revision = None if options.revision else own.base_revision
            bases[own.stage] = with_revision(own.base_model, revision)
    names = {
        1: options.stage_1 or (None if options.low_res else bases.get(1)),
        2: options.stage_2 or bases.get(2),
        3: options.stage_3,
    }
    return {stage: name for stage, name in names.items() if name}


def _check_models(
    options: argparse.Namespace,
    models: Mapping[int, str],
    settings: Sampling,
    redraw: "Redraw | None",
    low_res: "Sequence[Image.Image] | None",
) -> None:
    """Check what the models' configuration files tell, before weights are downloaded and loaded."""
    from adapters.arguments import find_device
    from adapters.base.source import Source
    from adapters.cascade.checks import Limits, check_settings, check_small_pictures, check_stages
    from adapters.cascade.load import check_memory

    check_memory(options.memory, options.dtype, find_device(options.device))
    sources = {
        stage: Source(name, stage, *((options.revision, options.variant) if stage < 3 else ()))
        for stage, name in models.items()
    }
    if not {1, 2} & sources.keys():
        return  # loading says so
    check_stages(sources, enlarges=low_res is not None)
    for stage, source in sources.items():
        strength = {} if redraw is None else redraw.strength
        check_settings(stage, Limits.of_source(source), settings, strength)
    if low_res is not None:
        size_px = sources[1].picture_size_px if 1 in sources else None
        check_small_pictures(low_res, size_px, square=redraw is None)


def _say_without_effect(
    options: argparse.Namespace,
    given: Mapping[str, Any],
    models: Mapping[int, str],
    settings: Sampling,
) -> None:
    """Say which given options have no effect, and why; those of prompts are then left out."""
    idle: dict[str, list[str]] = {}
    drawing = [stage for stage in models if stage > 1 or options.low_res is None]
    for stage in {1, 2, 3}.difference(drawing):
        own = [flag for flag, place in FLAGS.items() if place[0] == f"stage_{stage}"]
        reason = f"without Stage {'I' * stage}" if stage not in models else "with --low-res"
        idle[reason] = [flag for flag in (f"stage_{stage}_prompt", *own) if flag in given]
    scaled = all(parse_scaled(name)[1] is not None for name in options.adapter)
    idle["as each adapter has its own" if options.adapter else "without --adapter"] = (
        ["scale"] if scaled and "scale" in given else []
    )
    if all(settings.of(stage).guidance == 1 for stage in drawing):
        idle["with a guidance of 1"] = ["negative_prompt"] if "negative_prompt" in given else []
    for reason, names in idle.items():
        if names:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
            print_once(f"{flags} {'have' if names[1:] else 'has'} no effect {reason}.")
    for stage in {2, 3}.difference(models):
        vars(options)[f"stage_{stage}_prompt"] = None


def _load(
    options: argparse.Namespace, models: Mapping[int, str], adapters: Sequence[_Named]
) -> "Cascade":
    """Load the cascade with its adapters."""
    from adapters.cascade.load import Parts, load_cascade

    return load_cascade(
        models.get(1),
        models.get(2),
        models.get(3),
        adapters=[(each.name, each.scale) for each in adapters],
        revision=options.revision,
        variant=options.variant,
        device=options.device,
        dtype=options.dtype,
        memory=options.memory,
        parts=Parts(text_encoder=options.embeds is None),
    )


if __name__ == "__main__":
    main()
