"""Publishing an exported adapter on the hub, once all of its files have passed the checks."""

from collections.abc import Sequence
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from yaml import YAMLError

from adapters.base.hub import STAGE_FOLDERS, asking_the_hub
from adapters.errors import UserError
from adapters.files.info import NOTICE, AdapterInfo
from adapters.files.licence import DEEPFLOYD, find_copies
from adapters.files.model_card import CARD, SAMPLES, hub_bases, parse_samples
from adapters.files.places import (
    DIFFUSERS_WEIGHTS,
    PEFT_WEIGHTS,
    STAGE_FILES,
    export_of,
    export_stages,
)
from adapters.files.stage_adapter import StageAdapter

REPLACED = (*(f"{stage}/*" for stage in STAGE_FOLDERS), "stage_?-*", f"{SAMPLES}/*")
"""The files of an earlier export that a new one replaces in the repository; all others stay."""


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    pull_request: bool = False,
) -> str:
    """Publish an exported folder in one commit, with only the files of the export.

    The branch ``revision`` (``None``: ``main``) then holds this export alone: leftover files of
    an earlier one are deleted there; other files stay. A missing repository or branch is created.

    Returns:
        The address of the repository, branch or pull request.

    Raises:
        UserError: if the folder is not fit to be published (then nothing is sent), or the hub
            refuses.
    """
    folder = export_of(Path(folder))
    infos = [_check_stage(stage) for stage in export_stages(folder)]
    files = [CARD, *_check_card(folder, infos)]
    for info in infos:
        files += [f"stage_{info.stage}/{name}" for name in STAGE_FILES]
        files += _check_licence(folder, info)
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


def _check_stage(folder: Path) -> AdapterInfo:
    """Check that all files of a stage can be read and are an export's; return its information."""
    for name in STAGE_FILES:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; export the adapter again.")
    adapter, _ = (StageAdapter.load(folder / name) for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS))
    info = adapter.info
    if info is None or folder.name != f"stage_{info.stage}":
        found = "another tool's" if info is None else f"that of Stage {info.stage}"
        raise UserError(
            f"{folder} should hold its stage's exported adapter, but has {found}; export again."
        )
    return info


def _check_card(folder: Path, infos: Sequence[AdapterInfo]) -> list[str]:
    """Check that a folder's card is whole and its own; return the sample pictures it shows."""
    card = folder / CARD
    advice = _advise_card(folder)
    try:
        text = card.read_text(encoding="utf-8")
        data = ModelCard(text).data
    except (OSError, ValueError, TypeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{card} is not a model card ({reason}); {advice}.") from error
    found, wanted = data.get("base_model"), hub_bases(infos) or None
    samples = list(parse_samples(text))
    noticed = NOTICE in text or not any(map(_is_deepfloyd, infos))
    for problem, holds in {
        "has no metadata": data.get("license") is None,
        f"describes other adapters: its base_model is {found}, not {wanted}": found != wanted,
        "shows pictures that are missing": not all((folder / name).is_file() for name in samples),
        f"lacks the notice that the base's licence requires ({NOTICE!r})": not noticed,
    }.items():
        if holds:
            raise UserError(f"{card} {problem}; {advice}.")
    return samples


def _check_licence(folder: Path, info: AdapterInfo) -> list[str]:
    """Check that a stage's licence files are there if they must be; return their names."""
    files = find_copies(folder, info.stage)
    if _is_deepfloyd(info) and not files:
        raise UserError(
            f"{folder} lacks stage_{info.stage}-LICENSE.md, the copy of its base's licence that"
            f" must go with it; log in with an account that has accepted {info.base_model}"
            f" (hf auth login), and {_advise_card(folder)}."
        )
    return [path.name for path in files]


def _advise_card(folder: Path) -> str:
    return f"write it again with `python -m adapters.card {folder}`"


def _is_deepfloyd(info: AdapterInfo) -> bool:
    return info.licence_notice is not None or info.base_model.startswith(DEEPFLOYD)
