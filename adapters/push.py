"""Publishing an exported adapter on the hub: `python -m adapters.push FOLDER owner/name`."""

import argparse
import sys
from collections.abc import Sequence
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.constants import DEFAULT_REVISION
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils.tqdm import enable_progress_bars
from yaml import YAMLError

from adapters.base.hub import STAGE_FOLDERS, asking_the_hub
from adapters.errors import UserError, command_line
from adapters.files.info import NOTICE, AdapterInfo
from adapters.files.licence import DEEPFLOYD, find_copies
from adapters.files.model_card import CARD, SAMPLES, hub_bases, parse_samples
from adapters.files.places import DIFFUSERS_WEIGHTS, PEFT_WEIGHTS, STAGE_FILES, export_stages
from adapters.files.stage_adapter import StageAdapter

REPLACED = (*(f"{stage}/*" for stage in STAGE_FOLDERS), "stage_?-*", f"{SAMPLES}/*")
"""What of an earlier export a new one replaces in the repository; all else there stays."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Check a folder, upload it and say where it is."""
    parser = argparse.ArgumentParser(prog="adapters.push", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="an exported folder: a finished run's adapters")
    add("repository", help="its name on the hub, owner/name; created where there is none")
    add("--private", action="store_true", help="a repository that only you see")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--revision", help=f"the branch, created if missing ({DEFAULT_REVISION})")
    target.add_argument("--pr", action="store_true", help="as a pull request instead")
    add("--message", help="the commit's message (Upload ... adapter)")
    options = parser.parse_args(arguments)
    with command_line():
        enable_progress_bars()
        url = push(
            options.folder,
            options.repository,
            private=options.private,
            revision=options.revision,
            message=options.message,
            pull_request=options.pr,
        )
    sys.stdout.write(f"{url}\n")


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    pull_request: bool = False,
) -> str:
    """Publish an exported folder, in one commit, with what export wrote and nothing else.

    The revision then holds this export alone: files of an earlier one that it lacks are deleted
    there. Files of other making in the repository stay.

    Args:
        folder: the folder, with its card.
        repository: ``owner/name``; created where there is none.
        private: only for a repository that only its owner sees.
        revision: the branch to commit to, created where missing; ``None``: ``main``.
        message: the commit's message.
        pull_request: open a pull request against ``main`` instead.

    Returns:
        The address of what was published.

    Raises:
        UserError: where the folder is not fit to be published (nothing is sent then), or the hub
            does not let you.
    """
    folder = Path(folder)
    infos, files = checked(folder)
    with asking_the_hub(repository):
        if repository.count("/") != 1:
            raise HFValidationError
        api = HfApi()
        api.whoami()
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UserError(
                f"--private was asked for, but {repository} exists and is public; make it private"
                f" in its settings ({url}/settings), or name another."
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        stages = " and ".join(f"Stage {info.stage}" for info in infos)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[escape(file) for file in files],
            delete_patterns=list(REPLACED),
            commit_message=message or f"Upload {stages} adapter",
            revision=revision,
            create_pr=pull_request,
        )
    return commit.pr_url or (url if revision is None else f"{url}/tree/{revision}")


def checked(folder: Path) -> tuple[list[AdapterInfo], list[str]]:
    """What an exported folder's adapters say of themselves, and which files in it are the export.

    Raises:
        UserError: where it is no export, is damaged, or lacks its card or its base's licence.
    """
    infos = [checked_stage(stage) for stage in export_stages(folder)]
    samples = checked_card(folder, infos)
    stages = [f"stage_{info.stage}/{name}" for info in infos for name in STAGE_FILES]
    licences = [path.name for info in infos for path in find_copies(folder, info.stage)]
    return infos, [CARD, *stages, *licences, *samples]


def checked_stage(folder: Path) -> AdapterInfo:
    """What a stage's adapter says of itself, once all of its files have been read.

    Raises:
        UserError: where one is missing, damaged, or of another making.
    """
    for name in STAGE_FILES:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; export the adapter again.")
    adapter, _ = (StageAdapter.load(folder / name) for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS))
    info = adapter.info
    if info is None or folder.name != f"stage_{info.stage}":
        found = "no adapter of this toolkit" if info is None else f"one of Stage {info.stage}"
        raise UserError(f"{folder} should hold an exported adapter, but has {found}; export again.")
    return info


def checked_card(folder: Path, infos: Sequence[AdapterInfo]) -> list[str]:
    """The sample pictures that a folder's card shows, once it is found fit to be published.

    Raises:
        UserError: where the card is missing, damaged or of other adapters, shows pictures that are
            not there, or lacks what the licence of its base asks for.
    """
    card = folder / CARD
    mend = f"write it anew with `python -m adapters.card {folder}`"
    try:
        text = card.read_text(encoding="utf-8")
        data = ModelCard(text).data
    except (OSError, ValueError, TypeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{card} is no model card ({reason}); {mend}.") from error
    found, wanted = data.get("base_model"), hub_bases(infos) or None
    samples = list(parse_samples(text))
    problems = {
        "has no metadata": data.get("license") is None,
        f"is of other adapters: its base_model is {found}, not {wanted}": found != wanted,
        "shows pictures that are not there": not all((folder / name).is_file() for name in samples),
        f"lacks the notice that the base's licence asks for ({NOTICE!r})": (
            any(under_deepfloyd(info) for info in infos) and NOTICE not in text
        ),
    }
    for problem, holds in problems.items():
        if holds:
            raise UserError(f"{card} {problem}; {mend}.")
    for info in infos:
        if under_deepfloyd(info) and not find_copies(folder, info.stage):
            raise UserError(
                f"{folder} lacks stage_{info.stage}-LICENSE.md, the copy of its base's licence that"
                f" must go with it; log in with an account that has accepted {info.base_model}"
                f" (hf auth login), and {mend}."
            )
    return samples


def under_deepfloyd(info: AdapterInfo) -> bool:
    """Whether the DeepFloyd licence applies to an adapter."""
    return info.licence_notice is not None or info.base_model.startswith(DEEPFLOYD)


if __name__ == "__main__":
    main()
