"""The documentation is built without a warning, and has every key of a recipe."""

import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

import adapters
from finetune.recipe.reference import list_paths, list_sections
from tests.builders import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    out = tmp_path_factory.mktemp("site")
    options = ("--fail-on-warning", "--quiet", "-b", "html", "-d", out / "cache")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, ROOT / "docs", out / "html"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return out / "html"


def test_every_page_is_reached_from_the_first(site: Path) -> None:
    first = (site / "index.html").read_text(encoding="utf-8")
    docs = ROOT / "docs"
    pages = {file.relative_to(docs).with_suffix(".html") for file in docs.rglob("*.md")}
    pages |= {file.relative_to(docs).with_suffix(".html") for file in docs.rglob("*.ipynb")}
    assert len(pages) > 10
    for page in pages - {Path("index.html")}:
        assert f'href="{page}"' in first, page


def test_every_key_of_a_recipe_is_described(site: Path) -> None:
    page = unescape((site / "recipe.html").read_text(encoding="utf-8"))
    described = set(re.findall(r'<dt class="sig[^"]*" id="confval-([^"]+)"', page))
    assert described
    for section in list_sections():
        for key in section.keys:
            assert f">{key.name}<" in page or f".{key.name}<" in page, (section.label, key.name)
    assert "stage_1.optimizer.learning_rate" in page
    for optimizer in ("prodigy", "lion_8bit"):  # names come from tables, not from types
        assert optimizer in page


def test_the_public_api_is_described(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    for name in adapters.__all__:
        assert f'id="adapters.{name}"' in page, name


def test_the_migration_tables_name_keys_that_exist() -> None:
    text = (ROOT / "docs/migration.md").read_text(encoding="utf-8")
    tables = [line for line in text.splitlines() if line.startswith("| `") or "`--" in line]
    cells = [line.split("|")[2] for line in tables if line.count("|") >= 3]
    keys = {name for cell in cells for name in re.findall(r"`([a-z_0-9]+(?:\.[a-z_0-9]+)+)`", cell)}
    assert len(keys) > 40
    assert keys - {"adapters.push"} <= set(list_paths())
