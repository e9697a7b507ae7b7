"""A recipe for what a survey found, as a YAML file with the reasons in its header."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml

from adapters.errors import UserError
from finetune.proposal.rules import RARE_WORD, Case, choose_settings
from finetune.proposal.survey import Survey
from finetune.recipe.file import check_section
from finetune.recipe.prompt_lists import read_prompts
from finetune.recipe.schema import Recipe
from finetune.recipe.yaml12 import Dumper

VALIDATED = 4
"""The prompts that are drawn at each validation."""

ORDER = ("name", "seed", "base", "data", "text", "prior", "stage_1", "stage_2")
"""The first keys of a recipe, in the order of the shipped ones; the others follow."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The facts that the pictures do not tell."""

    subject: str | None = None
    """The subject in plain words; ``None``: the captions say what is taught."""
    identifier: str | None = None
    """The words that name it in prompts; ``None``: a rare word and the subject."""
    alive: bool = False
    """True if it is a living being."""
    memory_gb: float | None = None
    """The GPU's memory; ``None``: there is no GPU."""
    base: str | None = None
    """A folder with ``stage_1`` and perhaps ``stage_2``; ``None``: the published models."""
    is_small: bool = False
    """True if that base is of the embedded cascade's size."""
    name: str | None = None
    """The run's name; ``None``: after the subject or the folder."""


@dataclass(frozen=True)
class Proposal:
    """A recipe to start from."""

    tree: Mapping[str, Any]
    """The recipe's keys, without the defaults."""
    reasons: Sequence[str]

    @property
    def recipe(self) -> Recipe:
        """The recipe; a UserError if the answers make it invalid."""
        return check_section(Recipe, dict(self.tree), "The recipe")

    def to_yaml(self, about: str) -> str:
        """Write the recipe, with the command, what was found, and the reasons in its header."""
        rows = ["", *about.splitlines(), "", "Chosen:", *(f"- {why}" for why in self.reasons)]
        header = "\n".join(f"# {row}".rstrip() for row in rows).removeprefix("#\n")
        order = dict.fromkeys((*(key for key in ORDER if key in self.tree), *self.tree))
        tree = {key: self.tree[key] for key in order}
        # a copy, as YAML would write a list or section that stands twice as a reference
        tree = json.loads(json.dumps(tree))
        text = yaml.dump(tree, Dumper=Dumper, sort_keys=False, width=100, allow_unicode=True)
        return f"{header}\n{text}"


def propose(found: Survey, answers: Answers) -> Proposal:
    """Choose a recipe for the pictures of a folder.

    Raises:
        UserError: if there is neither a subject nor captions.
    """
    subject = answers.subject
    identifier = answers.identifier or (subject and f"{RARE_WORD} {subject}")
    captioned = found.captioned
    reasons = []
    if captioned and identifier and not any(identifier in text for text in found.captions):
        captioned = False
        reasons.append(
            f'one caption for all, as none of the pictures\' own says "{identifier}"'
            " (--identifier names the words that they have for it)"
        )
    if not captioned and subject is None:
        raise UserError(
            f"{found.folder} has no captions: give --subject, such as --subject dog, or write what"
            " each picture shows into a .txt file next to it."
        )
    case = Case(
        pictures=len(found.pictures),
        captioned=captioned,
        subject=subject,
        alive=answers.alive,
        memory_gb=answers.memory_gb,
        embedded=answers.is_small,
    )
    tree, why = choose_settings(case)
    tree["name"] = answers.name or find_name(subject or found.folder.resolve().name)
    tree["data"] = {"source": str(found.folder), **tree.get("data", {})}
    if captioned:
        tree["data"].pop("prompt", None)
    if answers.base is not None:
        _use_base(tree, Path(answers.base), subject)
    if subject is not None:
        tree["evaluation"] = {"identifier": identifier, "subject": subject, **tree["evaluation"]}
    _add_validation(tree, found)
    return Proposal(tree, reasons + why)


def _use_base(tree: dict[str, Any], folder: Path, subject: str | None) -> None:
    """Let a recipe train a base in a folder, with the captions and the scorer beside it."""
    tree["base"] = {"stage_1": str(folder / "stage_1"), "stage_2": str(folder / "stage_2")}
    if not (folder / "stage_2").is_dir():
        del tree["base"]["stage_2"], tree["stage_2"]
    if subject is None:
        return
    if (captions := folder / "captions.txt").is_file():
        tree["prior"] = tree["prior"] | {"prompts": str(captions)}
    if (clip := folder / "clip").is_dir():
        tree["evaluation"] = tree["evaluation"] | {"clip": str(clip)}


def _add_validation(tree: dict[str, Any], found: Survey) -> None:
    """Add prompts to draw while training, unless the rules name some."""
    validation = dict(tree["validation"])
    if "evaluation" not in tree:
        validation.setdefault("prompts", found.captions[:VALIDATED])
    else:
        for name in ("prompts", "other_prompts"):
            listed = tree["evaluation"][name]
            if isinstance(listed, str):
                validation.setdefault(name, _spread(read_prompts(listed)))
    tree["validation"] = dict(sorted(validation.items(), key=lambda item: "prompts" not in item[0]))


def _spread(prompts: Sequence[str]) -> list[str]:
    """Take a few prompts from all over a list, whose neighbours are alike."""
    return list(prompts[:: len(prompts) // VALIDATED][:VALIDATED])


def find_name(words: str) -> str:
    """Make a run's name of some words, with a number if there is such a run already.

    Example:
        >>> find_name("Anna's dog")
        'anna_s_dog'
    """
    name = re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_") or "subject"
    runs = Path(Recipe.model_fields["runs_dir"].default)
    numbered = (f"{name}_{number}" for number in count(2))
    return next(each for each in chain([name], numbered) if not (runs / each).exists())
