"""The command that publishes an export: ``python -m adapters.push FOLDER owner/name``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from adapters.command import command_parser, run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Check a folder, upload it and print its address."""
    parser = command_parser(
        "push",
        "Check an exported adapter and publish it on the Hugging Face hub, in one commit.",
        "runs/dog owner/sks-dog --private",
    )
    add = parser.add_argument
    add("folder", type=Path, help="the folder of a finished run, or an exported one")
    add("repository", help="its name on the hub, owner/name; created if it does not exist")
    add("--private", action="store_true", help="create the repository as private")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--revision", help="the branch, created if missing (default: main)")
    target.add_argument("--pr", action="store_true", help="open a pull request instead")
    add("--message", help="the commit's message (default: Upload ... adapter)")
    run_command(parser, arguments, _push)


def _push(options: argparse.Namespace) -> str:
    from huggingface_hub.utils.tqdm import enable_progress_bars

    from adapters.files.upload import push

    enable_progress_bars()
    return push(
        options.folder,
        options.repository,
        private=options.private,
        revision=options.revision,
        message=options.message,
        pull_request=options.pr,
    )


if __name__ == "__main__":
    main()
