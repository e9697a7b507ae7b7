"""The page of troubleshooting quotes sentences that the code really says."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.builders import ROOT

PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^> (.+)$", PAGE, re.MULTILINE)


@cache
def said() -> str:
    """All texts of the code, with … for what is put into them."""
    files = (file for name in ("adapters", "finetune") for file in (ROOT / name).rglob("*.py"))
    return "\n".join(text for file in files for text in texts_of(file))


def texts_of(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"\{[a-z_/]+\}", "…", node.value)


def test_sentences_are_quoted() -> None:
    assert len(QUOTED) >= 20


@pytest.mark.parametrize("sentence", QUOTED)
def test_the_code_says_it(sentence: str) -> None:
    # the page shortens what is put in at either end
    assert sentence.strip("…; ") in said()
