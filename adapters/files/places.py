"""The place of an adapter: the local folder or file behind a path or hub name that a user gives."""

from pathlib import Path

from adapters.arguments import expand_home
from adapters.base.hub import HUB_NAME, STAGE_FOLDERS, asking_the_hub
from adapters.errors import UserError, listed, quote

# written out here, as importing PEFT and diffusers, which define them, takes seconds
PEFT_WEIGHTS = "adapter_model.safetensors"
"""The file of an exported stage that PEFT and our own loader read."""

PEFT_CONFIG = "adapter_config.json"
"""The configuration next to :data:`PEFT_WEIGHTS`."""

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file of an exported stage that diffusers reads."""

STAGE_FILES = (PEFT_WEIGHTS, PEFT_CONFIG, DIFFUSERS_WEIGHTS)
"""The files of an exported stage."""

RUN_EXPORT, RUN_RECIPE = "adapters", "recipe.yaml"
"""The folder of the exported stages in a run's folder, and the file that marks a run's folder."""

ADAPTER_FILES = (
    *(f"{stage}/{name}" for stage in STAGE_FOLDERS for name in (PEFT_WEIGHTS, PEFT_CONFIG)),
    *STAGE_FILES,
)
"""The files to download from a repository: our exports, and PEFT's and diffusers' adapters."""

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""The endings of files that only Python's pickle can read."""


def export_of(path: Path) -> Path:
    """Return the exported folder of a run whose folder this is, and any other path as it is.

    Raises:
        UserError: if it is the folder of a run that has exported nothing yet.
    """
    exported = path / RUN_EXPORT
    if any((exported / stage).is_dir() for stage in STAGE_FOLDERS):
        return exported
    if (path / RUN_RECIPE).is_file() and not any((path / name).exists() for name in STAGE_FOLDERS):
        raise UserError(
            f"The run in {path} has exported no adapter yet; train it to its end first, with the"
            " command that began it."
        )
    return path


def adapter_path(name: str | Path) -> Path:
    """Return the local folder or file of an adapter that a user names, downloaded if necessary.

    An existing path comes first; the folder of a finished run stands for its ``adapters``.
    Otherwise the name is a hub name: for ``owner/name``, only the
    adapter's safetensors and JSON files are downloaded; ``owner/name/stage_1`` is one of its
    stages, and ``owner/name/FILE.safetensors`` one of its files. ``@revision`` at the end is a
    branch, a tag, a commit or a pull request (``@refs/pr/1``); the default is ``main``. A name that
    can be neither is returned unchanged.

    Raises:
        UserError: if the hub has no such adapter, does not show it, or cannot be reached and the
            adapter is not in the local cache.
    """
    if not isinstance(name, str | Path):
        raise UserError(f"An adapter must be given as a folder or a hub name (got {quote(name)}).")
    path = expand_home(name)
    try:
        is_here = path.exists()
    except OSError as error:  # such as a name that is too long
        raise UserError(
            f"The adapter {quote(str(name))} cannot be found ({error.strerror}); correct the path."
        ) from error
    match = None if is_here else HUB_NAME.fullmatch(str(name))
    if match is None:
        return export_of(path)
    from huggingface_hub import get_cached_repo_tree, snapshot_download

    repo, inside, revision = match["repo"], match["inside"] or "", match["revision"]
    wanted = [inside] if inside.endswith(".safetensors") else list(ADAPTER_FILES)
    if inside in STAGE_FOLDERS:
        wanted = [file for file in wanted if file.startswith(inside)]
    with asking_the_hub(str(name)):
        snapshot = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    place = snapshot / inside
    if not any(weights_file(path) for path in (place, *(place / n for n in STAGE_FOLDERS))):
        tree = get_cached_repo_tree(repo, revision=snapshot.name)
        others = [file.path for file in tree if file.path.endswith(".safetensors")]
        raise UserError(
            f"{name} has no adapter on the hub ({', '.join(STAGE_FOLDERS)}, {PEFT_WEIGHTS} or"
            f" {DIFFUSERS_WEIGHTS}); name one of its safetensors files, as in"
            f" {repo}/FILE.safetensors: it has {listed(others) or 'none'}."
        )
    return place


def stage_folders(folder: Path) -> list[Path]:
    """List an export's stage folders, or a single adapter's own; a UserError if it is neither."""
    inside = [folder / name for name in STAGE_FOLDERS if (folder / name).is_dir()]
    if not inside:
        find_weights(folder)
    return inside or [folder]


def export_stages(folder: Path) -> list[Path]:
    """List the stage folders of an exported folder, which holds one or both.

    Raises:
        UserError: if it is something else, such as one of its stage folders.
    """
    folder = export_of(folder)
    places = stage_folders(folder)
    if places == [folder]:
        raise UserError(
            f"{folder} is a single adapter, not an exported folder with"
            f" {' or '.join(STAGE_FOLDERS)} in it; name the folder of a finished run."
        )
    return places


def find_weights(path: Path) -> Path:
    """Find the safetensors file of a single adapter: the path itself, or a file in that folder.

    Raises:
        UserError: if there is no such file, there are only pickled ones, or there are several whose
            names do not tell which one to use.
    """
    file = weights_file(path)
    if file is not None:
        return file
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    several = [each.name for each in inside if each.suffix == ".safetensors" and each.is_file()]
    pickled = [str(each) for each in inside if each.suffix in PICKLED and each.is_file()]
    if several and path.is_dir():
        problem = (
            f"{path} has {len(several)} .safetensors files ({listed(several, 4)}), and none of"
            " their names says which is the adapter; name the one that you mean"
        )
    elif pickled:
        problem = (
            f"{listed(pickled, 4)} cannot be read, as pickled files may run code; convert pickled"
            " files to .safetensors with the tool that wrote them"
        )
    elif not path.exists() and not path.is_symlink():
        problem = (
            f"{path} has no exported adapter (there is no such file or folder); correct the path,"
            " or write owner/name for one on the hub"
        )
    elif path.is_file():
        problem = f"{path} is not an adapter: adapters are .safetensors files; correct the path"
    else:
        problem = (
            f"{path} has no exported adapter (no stage_1, stage_2 or .safetensors file in it);"
            " name the folder of a finished run, or another tool's adapter"
        )
    raise UserError(f"{problem}.")


def weights_file(path: Path) -> Path | None:
    """Find the file as :func:`find_weights` does; ``None`` if there is not exactly one."""
    if path.is_file():
        return path if path.suffix == ".safetensors" else None
    names = [path / name for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS)]
    found = [name for name in (*names, *path.glob("*.safetensors")) if name.is_file()]
    return found[0] if found and (found[0] in names or len(found) == 1) else None
