"""Files that diffusers loads in part, made whole: `python -m adapters.repair FILE`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig

from adapters.atomic import check_out, replacing
from adapters.errors import UserError, command_line
from adapters.files.for_diffusers import list_arriving, save_for_diffusers
from adapters.files.places import adapter_path, find_weights
from adapters.files.reading import kind_of, read_adapter


def main(arguments: Sequence[str] | None = None) -> None:
    """Repair one file, and say how much of it diffusers was losing."""
    parser = argparse.ArgumentParser(prog="adapters.repair", description=__doc__)
    parser.add_argument("file", help="a LoRA's safetensors file, its folder, or its hub name")
    parser.add_argument("--out", type=Path, help="the new file (FILE_repaired.safetensors)")
    options = parser.parse_args(arguments)
    with command_line():
        file = adapter_path(options.file)
        if options.out is None and not Path(options.file).exists() and file.exists():
            raise UserError(f"{options.file} is on the hub; say where to with --out.")
        sys.stdout.write(f"{repair(file, options.out)}\n")


def repair(path: Path, out: Path | None = None) -> str:
    """Write a LoRA of any key style such that ``load_lora_weights`` takes all of it.

    Args:
        path: a safetensors file, or a folder with one; it stays as it is.
        out: the new file; ``None``: beside the old one, where that is not whole.

    Returns:
        What was wrong and where the new file is, for people.

    Raises:
        UserError: where the file is no LoRA, has keys that are unknown or unpaired, or is ``out``.
    """
    config, state, header = read_adapter(path)
    file = find_weights(path)
    if not isinstance(config, LoraConfig):
        raise UserError(
            f"{file} is an adapter of kind {kind_of(config)}, which diffusers cannot load in"
            " any spelling; load it with load_cascade, or make a LoRA of it with"
            " `python -m adapters.resize`."
        )
    beside = out is None
    out = out or file.with_name(f"{file.stem}_repaired.safetensors")
    check_out(out, "file")
    if out.exists() and out.samefile(file):
        raise UserError(f"--out {out} is the file to repair, which stays; name another.")
    lost = len(state) - len(list_arriving(file, config, state))
    if beside and not lost:
        return f"{file}: diffusers loads all {len(state)} tensors; nothing is to be repaired."
    with replacing(out) as temporary:
        save_for_diffusers(state, config, temporary, {"format": "pt"} | header)
        arrived = len(list_arriving(temporary, config, state))
        if arrived < len(state):
            raise UserError(
                f"{file} cannot be made whole, as diffusers takes {arrived} of its {len(state)}"
                " tensors in any spelling; load it with load_cascade or PEFT."
            )
    return f"{file}: diffusers loses {lost} of {len(state)} tensors; it loads all of {out}."


if __name__ == "__main__":
    main()
