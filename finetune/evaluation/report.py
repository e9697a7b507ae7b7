"""The files of an evaluation: pictures, figures, and the page that shows both."""

import json
from dataclasses import dataclass
from pathlib import Path

from adapters.atomic import replace_folder, temporary_folder, write_text, writing_to
from adapters.errors import UserError
from finetune.evaluation.page import write_page
from finetune.evaluation.results import PICTURES, Results

SCORES, PAGE = "scores.json", "report.html"


@dataclass(frozen=True)
class EvaluationReport(Results):
    """Scores and pictures of the variants of a cascade, which can be saved."""

    def save(self, folder: str | Path) -> Path:
        """Write the pictures, ``scores.json`` and ``report.html``; return the path of the report.

        Args:
            folder: a new folder, or that of an earlier evaluation, which is replaced as a whole.

        Raises:
            UserError: if something else is in the folder, or it cannot be written.
        """
        folder = Path(folder)
        check_folder(folder)
        with writing_to(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with temporary_folder(folder.parent) as temporary:
                new = temporary / "new"
                for variant, samples in self.samples.items():
                    for file, sample in zip(self.files(variant), samples, strict=True):
                        sample.save(new / PICTURES / file)
                text = json.dumps(self.as_json(), indent=2, allow_nan=False, ensure_ascii=False)
                write_text(new / SCORES, text + "\n")
                write_text(new / PAGE, write_page(self))
                replace_folder(new, folder)
        return folder / PAGE


def check_folder(folder: Path) -> None:
    """Raise a UserError if a folder holds something other than an earlier evaluation."""
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not (folder / SCORES).is_file():
        raise UserError(
            f"{folder} is there already and is no earlier evaluation, so it stays as it is; name a"
            " new folder."
        )
