"""Names on the Hugging Face hub, and sentences for its refusals."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import httpx
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from adapters.errors import UserError

STAGE_FOLDERS = ("stage_1", "stage_2")
"""The folders of an export, one per stage."""

HUB_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    rf"(?:/(?P<inside>{'|'.join(STAGE_FOLDERS)}|[^@]+\.safetensors))?"
    r"(?:@(?P<revision>.+))?"
)
"""``owner/name``, with an optional stage or file in it and revision: ``owner/name/stage_1@v2``."""

MISTAKES: Mapping[type[Exception], str] = MappingProxyType(
    {
        HFValidationError: "{name} is not a hub name; write owner/name, in letters, digits, '-',"
        " '_' and '.'.",
        LocalTokenNotFoundError: "You are not logged in to the hub, which {name} needs; run"
        " `hf auth login` with a token that may write, or set HF_TOKEN.",
        GatedRepoError: "{name} is gated; accept its terms at {endpoint}/{repo}, and log in with"
        " `hf auth login`.",
        RevisionNotFoundError: "The hub has {repo}, but not the revision that {name} names; name"
        " one of its branches, tags or commits.",
        RepositoryNotFoundError: "{repo} is neither a local path nor a hub repository that you"
        " can see; correct the name, or log in with a token that may read it (`hf auth login`).",
        OfflineModeIsEnabled: "The hub cannot be asked for {name} in offline mode; unset"
        " HF_HUB_OFFLINE.",
        LocalEntryNotFoundError: "{name} is neither a local path nor in the cache, and the hub at"
        " {endpoint} cannot be reached; check the name and the connection (and HF_ENDPOINT,"
        " HF_HUB_OFFLINE).",
        httpx.TransportError: "The hub at {endpoint} cannot be reached for {name} ({reason}); check"
        " the connection and HF_ENDPOINT.",
    }
)
"""Sentences for errors of the hub's client, the particular before the general."""

REFUSALS: Mapping[int, str] = MappingProxyType(
    {
        401: "The hub does not accept your token for {name}; log in again with `hf auth login` (a"
        " token in HF_TOKEN takes precedence).",
        403: "Your token lacks permission for {repo} ({reason}); log in with one that may write"
        " there, or name a repository of your own.",
        413: "The hub refuses a file of {name} as too large ({reason}); export with a lower rank.",
    }
)
"""Sentences for the hub's answers, by HTTP status."""

REFUSED = "The hub refuses {name}: {reason}"


def is_hub_name(name: str) -> bool:
    """Tell whether a model's name is ``owner/name`` on the hub, and not a local path."""
    match = HUB_NAME.fullmatch(name)
    return match is not None and match["repo"] == name and not Path(name).exists()


def split_revision(name: str) -> tuple[str, str | None]:
    """Split ``owner/name@v2`` into ``owner/name`` and ``v2``; an existing path has no revision."""
    match = None if Path(name).exists() else HUB_NAME.fullmatch(name)
    return (name, None) if match is None or match["inside"] else (match["repo"], match["revision"])


def with_revision(name: str, revision: str | None) -> str:
    """Append a revision to a hub name, as :func:`split_revision` takes it; a path has none."""
    return f"{name}@{revision}" if revision and is_hub_name(name) else name


@contextmanager
def asking_the_hub(name: str) -> Iterator[None]:
    """Turn errors in requests to the hub for a name into a UserError."""
    try:
        yield
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        # the hub's client wraps errors over a single file
        cause = error.__cause__ if isinstance(error, RuntimeError) else None
        raise UserError(_explain(cause or error, name)) from None


def _explain(error: BaseException, name: str) -> str:
    """Say what an error of the hub's client means, and what to do."""
    known = next((text for kind, text in MISTAKES.items() if isinstance(error, kind)), REFUSED)
    reason = str(error)
    if isinstance(error, HfHubHTTPError):
        reason = error.server_message or reason
        if known is REFUSED:
            known = REFUSALS.get(error.response.status_code, REFUSED)
    match = HUB_NAME.fullmatch(name)
    repo = match["repo"] if match else name
    words = " ".join(reason.split()).rstrip(".")
    return known.format(name=name, repo=repo, endpoint=ENDPOINT, reason=words)
