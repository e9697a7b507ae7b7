"""Write a recipe for a folder of pictures.

python -m finetune.init FOLDER --subject dog
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.command import CommandParser
from adapters.errors import UserError, command_line, quiet_libraries, quote

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe

KINDS = ("living", "object")
"""The kinds of subjects, which differ in the prompts that suit them."""

LONGEST_WORDS = 200
"""The most letters of a subject's name."""

LAUNCH = "accelerate launch --quiet --config_file accelerate_config.yaml -m finetune.train"
"""The command that trains, without its recipe."""

EXAMPLE = """examples:
  python -m finetune.init photos/my_dog --subject dog --memory 16GB
  python -m finetune.init datasets/robot --subject robot --base models/if-tiny
  python -m finetune.init drawings_with_captions"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandParser(
        prog="python -m finetune.init",
        description="Write a recipe for a folder of pictures: one subject, or a style from their"
        " captions. In a terminal it asks for what it cannot find out.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="the folder with the pictures, or a zip of them")
    add("--subject", metavar="WORDS", help="the subject in plain words, such as dog")
    add("--identifier", metavar="WORDS", help="its name in prompts (default: sks and the subject)")
    add("--kind", choices=KINDS, help="the kind of subject, for prompts that suit it")
    add("--memory", metavar="SIZE", help="the GPU's memory, such as 16GB (default: this GPU's)")
    base = "a folder with stage_1 and stage_2, such as models/if-tiny (default: DeepFloyd's models)"
    add("--base", metavar="FOLDER", help=base)
    add("--name", help="the run's name (default: after the subject)")
    add("--out", type=Path, metavar="FILE", help="the recipe to write (default: NAME.yaml)")
    options = parser.parse_args(arguments)
    with command_line():
        expand_paths(options)
        ask_for_missing(options)
        check_options(options)
        quiet_libraries()
        sys.stdout.write(write_recipe(options))


def expand_paths(options: argparse.Namespace) -> None:
    """Expand the ``~`` of paths, which a shell leaves in ``--base=~/models``."""
    from adapters.arguments import expand_home

    options.folder = expand_home(options.folder)
    options.base = options.base and str(expand_home(options.base))
    options.out = options.out and expand_home(options.out)


def ask_for_missing(options: argparse.Namespace) -> None:
    """Ask in a terminal for what neither an option nor the pictures can say."""
    from finetune.proposal.rules import LIVING

    options.asks = sys.stdin.isatty() and sys.stderr.isatty()
    captioned = options.folder.is_dir() and any(
        file.suffix.lower() in (".txt", ".jsonl") for file in options.folder.iterdir()
    )
    if options.subject is None and options.asks and not captioned:
        options.subject = ask("What do the pictures show, in plain words (such as dog)?")
    if options.kind is None and options.subject:
        known = bool(LIVING.intersection(options.subject.lower().split()))
        if not known and options.asks and options.base is None:
            known = ask(f"Is a {options.subject} a living being (y/n)?").lower().startswith("y")
        options.kind = KINDS[0] if known else KINDS[1]


def ask(question: str) -> str:
    """Ask a question in the terminal until there is an answer."""
    while True:
        sys.stderr.write(f"{question} ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise UserError("There was no answer; give the options that `--help` lists.")
        if line.strip():
            return line.strip()


def check_options(options: argparse.Namespace) -> None:
    """Raise a UserError for each mistake that can be seen before the pictures are read."""
    from adapters.texts import find_flaw
    from finetune.recipe.schema.fields import LONGEST_NAME, NAME

    if not options.folder.is_dir() and options.folder.suffix.lower() != ".zip":
        raise UserError(f"{options.folder} is not a folder: name the one with your pictures in it.")
    for name in ("subject", "identifier"):
        text = vars(options)[name]
        if text is not None and (flaw := find_flaw(text)):
            raise UserError(f"--{name} {flaw}.")
        if text is not None and len(text) > LONGEST_WORDS:
            raise UserError(
                f"--{name} must be a few words, of {LONGEST_WORDS} letters at most (got"
                f" {quote(text)})."
            )
    if (name := options.name) is not None and not (
        re.fullmatch(NAME, name) and len(name) <= LONGEST_NAME
    ):
        raise UserError(
            f"--name must be at most {LONGEST_NAME} letters, digits, '.', '_' and '-', and begin"
            f" with a letter or digit (got {quote(name)})."
        )
    if options.base is not None and not (Path(options.base) / "stage_1").is_dir():
        raise UserError(
            f"--base {options.base} must be a folder with stage_1 in it, such as models/if-tiny;"
            " leave it out for DeepFloyd's models."
        )


def write_recipe(options: argparse.Namespace) -> str:
    """Survey the pictures, write a recipe and its sheet of crops, and describe both."""
    from adapters.atomic import check_out, write_png, write_text
    from adapters.tables import fill_lines, format_facts
    from finetune.memory.published import use_published_sizes
    from finetune.memory.report import say_sizes_used
    from finetune.memory.timing import find_rate
    from finetune.proposal.crops import draw_crops
    from finetune.proposal.recipe_text import Answers, propose
    from finetune.proposal.survey import survey
    from finetune.recipe.schema import Recipe

    small = options.base is not None and is_small(options.base)
    memory_gb = find_memory(options, needs_gpu=not small)
    cache = Path(Recipe.model_fields["cache_dir"].default)
    found = survey(options.folder, cache, *crop_sizes(options.base))
    answers = Answers(
        subject=options.subject,
        identifier=options.identifier,
        alive=options.kind == KINDS[0],
        memory_gb=memory_gb,
        base=options.base,
        is_small=small,
        name=options.name,
    )
    proposal = propose(found, answers)
    recipe, unread = use_published_sizes(proposal.recipe)
    out = options.out or Path(f"{recipe.name}.yaml")
    check_out(out, "file")
    if out.exists():
        raise UserError(f"{out} already exists: name another recipe with --out, or remove it.")
    problems = found.find_problems(subject=options.subject is not None)
    notes = [fill_lines(f"note: {problem}") for problem in problems]
    sheet, train = out.with_suffix(".crops.png"), f"{LAUNCH} {out}"
    facts = format_facts([*found.describe(), *describe_run(recipe)])
    write_png(sheet, draw_crops(recipe, found.pictures))
    write_text(out, proposal.to_yaml(f"{train}\n\n{facts}"))
    chosen = "\n".join(["Chosen:", *(f"- {why}" for why in proposal.reasons)])
    last = (
        f"recipe  {out}\ncrops   {sheet}: look whether the subject is in all of them\n\n"
        f"Next:\n{train}"
    )
    rate = find_rate(recipe.cache) if options.memory is None else None  # of this machine's GPU
    memory = describe_memory(recipe, memory_gb, rate)
    parts = [facts, *notes, chosen, say_sizes_used(unread), memory, last]
    return "\n\n".join(filter(None, parts)) + "\n"


def find_memory(options: argparse.Namespace, *, needs_gpu: bool) -> float | None:
    """Find the memory of the GPU in GB, as cards are sold; ``None``: there is no GPU.

    Raises:
        UserError: if it is not a size, or there is no GPU although the base needs one.
    """
    import torch

    from adapters.cascade.memory_budget import parse_memory
    from unets.tally import DRIVER_BYTES, GIB

    if options.memory is None and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    given = options.memory
    if given is None and needs_gpu:
        if not options.asks:
            raise UserError(
                "This machine has no GPU: give the memory of the one to train on, as in"
                " --memory 16GB, or --base models/if-tiny to train on a CPU."
            )
        given = ask("How much memory has the GPU to train on (such as 16GB)?")
    return None if given is None else (parse_memory(given, "--memory") + DRIVER_BYTES) / GIB


def is_small(base: str) -> bool:
    """Tell whether a base is of the embedded cascade's size."""
    from adapters.base.source import Source
    from finetune.proposal.rules import SMALL_TEXT_WIDTH

    width = Source(str(Path(base) / "stage_1"), 1).unet_config.get("encoder_hid_dim")
    return width is not None and int(width) < SMALL_TEXT_WIDTH


def crop_sizes(base: str | None) -> list[int]:
    """Return the sides of the crops of both stages in pixels."""
    from adapters.base.published import PublishedSource
    from adapters.base.source import Source

    if base is None:
        sizes = ("DeepFloyd/IF-I-XL-v1.0", "DeepFloyd/IF-II-L-v1.0")
        return [PublishedSource(name, stage).picture_size_px for stage, name in enumerate(sizes, 1)]
    folders = ((stage, Path(base) / f"stage_{stage}") for stage in (1, 2))
    return [Source(str(f), stage).picture_size_px for stage, f in folders if f.is_dir()]


def describe_run(recipe: "Recipe") -> list[tuple[str, str]]:
    """List the main settings of a recipe, as names and texts."""
    rows = [("run", str(recipe.folder))]
    for stage in recipe.trained:
        own = recipe.training(stage)
        pictures = own.batch_size * own.accumulation
        base = recipe.source(stage).name
        rows.append((stage.name, f"{own.steps:,} steps of {pictures} pictures, {base}"))
    if recipe.evaluation:
        rows.append(
            ("subject", f'{recipe.evaluation.subject}, called "{recipe.evaluation.identifier}"')
        )
    return rows


def describe_memory(recipe: "Recipe", memory_gb: float | None, rate: float | None) -> str:
    """Write the plan of a recipe's memory and time, and the settings that fit if it does not."""
    import torch

    from adapters.cascade.memory_budget import GPU
    from finetune.memory.fit import fit, plan
    from finetune.memory.report import format_plan
    from unets.tally import DRIVER_BYTES, GIB

    planned = plan(recipe, torch.device("cpu") if memory_gb is None else GPU)
    parts = [format_plan(planned, rate)]
    if memory_gb is not None and planned.peak.bytes > memory_gb * GIB - DRIVER_BYTES:
        found = fit(recipe, memory_gb * GIB - DRIVER_BYTES)
        advice = "no settings fit: use a smaller base"
        if found.plan:
            advice = f"add these overrides to the command: {' '.join(found.overrides)}"
        parts.append(f"This is more than the card's {memory_gb:.0f} GB; {advice}.")
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
