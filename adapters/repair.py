"""The command that repairs a LoRA for diffusers: ``python -m adapters.repair FILE``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from adapters.arguments import expand_home
from adapters.command import command_parser, run_command
from adapters.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Repair one file, and print how much of it diffusers was losing."""
    parser = command_parser(
        "repair",
        "Rewrite a LoRA that diffusers loads only in part as a file that it loads completely.",
        "lora.safetensors --out whole.safetensors",
    )
    add = parser.add_argument
    add("file", help="a LoRA's safetensors file, its folder, or its hub name")
    help_ = "the new file (default: FILE_repaired.safetensors, if FILE needs repair)"
    add("--out", type=expand_home, metavar="FILE", help=help_)
    run_command(parser, arguments, _repair)


def _repair(options: argparse.Namespace) -> str:
    from adapters.files.places import adapter_path

    if options.out is not None and options.out.suffix != ".safetensors":
        raise UserError(f"--out must end in .safetensors (got {options.out}); name another file.")
    file = adapter_path(options.file)
    if options.out is None and not Path(options.file).exists() and file.exists():
        raise UserError(f"{options.file} is on the hub; name the file to write with --out.")
    return repair(file, options.out)


def repair(path: Path, out: Path | None = None) -> str:
    """Write a LoRA of any key style so that ``load_lora_weights`` takes all of it.

    Without ``out`` the new file is next to the old one, which is not changed, if that needs repair.
    Returns a sentence that names the loss and the new file.

    Raises:
        UserError: if the file is not a LoRA, has unknown or unpaired keys, or is ``out``.
    """
    from peft import LoraConfig

    from adapters.atomic import check_out, replacing
    from adapters.files.for_diffusers import list_arriving, save_for_diffusers
    from adapters.files.places import find_weights
    from adapters.files.reading import kind_of, read_adapter

    config, state, header = read_adapter(path)
    file = find_weights(path)
    if not isinstance(config, LoraConfig):
        raise UserError(
            f"{file} is an adapter of kind {kind_of(config)}, which diffusers cannot load"
            " under any key names; load it with load_cascade, or make a LoRA of it with"
            " `python -m adapters.resize`."
        )
    new = out or file.with_name(f"{file.stem}_repaired.safetensors")
    check_out(new, "file")
    if new.exists() and new.samefile(file):
        raise UserError(f"--out {new} is the file to repair, which is kept; name another.")
    lost = len(state) - len(list_arriving(file, config, state))
    if out is None and not lost:
        return f"{file}: diffusers loads all {len(state)} tensors; there is nothing to repair."
    with replacing(new) as temporary:
        save_for_diffusers(state, config, temporary, {"format": "pt"} | header)
        arrived = len(list_arriving(temporary, config, state))
        if arrived < len(state):
            raise UserError(
                f"{file} cannot be repaired, as diffusers loads only {arrived} of its {len(state)}"
                " tensors under any key names; load it with load_cascade or PEFT."
            )
    return f"{file}: diffusers loses {lost} of {len(state)} tensors; it loads all of {new}."


if __name__ == "__main__":
    main()
