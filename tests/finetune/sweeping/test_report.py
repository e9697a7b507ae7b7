"""The page, the tables and the Markdown of a sweep."""

from pathlib import Path

from finetune.sweeping.outcomes import collect_outcomes
from finetune.sweeping.report import write_markdown, write_page, write_text_report
from finetune.sweeping.scoring import list_files, pictures_folder
from finetune.sweeping.tables import Table
from finetune.sweeping.work import Result
from tests.builders.sweeps import PETS, SCALES, collect, finish_sweep


def test_the_page_leaves_damaged_pictures_out(tmp_path: Path) -> None:
    (point, *_) = finish_sweep(tmp_path, seeds=(0,))
    (file,) = list_files(pictures_folder(point.recipe, 1.0), 1)
    file.write_bytes(file.read_bytes()[:40])
    page = write_page("a sweep", collect([point]))
    assert page.count("data:image/jpeg") == 2  # the base's, and that of the other scale


def test_the_page_shows_errors_the_front_and_failures(tmp_path: Path) -> None:
    points = finish_sweep(tmp_path)
    results = [Result.read(point) for point in points[:-1]]
    results.append(Result(points[-1], failure="The loss is <nan>."))
    outcomes = collect_outcomes(results, SCALES, len(points), "rank-4=1")
    page = write_page("a sweep", outcomes)
    assert page.count("<circle") == len(outcomes.rows) + 1  # and the base
    assert 'class="range"' in page
    assert page.count('class="stairs"') == 1
    assert page.count("data:image/jpeg") == len(outcomes.front) + 1
    assert "<figcaption>a &lt;sks&gt; dog</figcaption>" in page
    assert "The loss is &lt;nan&gt;." in page
    assert 'alt="a &lt;sks&gt; dog"' in page
    assert "http" not in page
    assert "url(" not in page
    main = write_text_report(outcomes).partition("Differences from 2")[0]
    assert main.count(" *") == len(outcomes.front)


def test_every_subject_has_its_own_pictures_and_base(tmp_path: Path) -> None:
    outcomes = collect(finish_sweep(tmp_path, across={"pet": PETS}))
    page = write_page("a sweep", outcomes)
    assert page.count("data:image/jpeg") == 2 * (len(outcomes.front) + 1)
    for pet in PETS:
        assert page.count(f">{pet}, seed 0, fidelity") == len(outcomes.front)
        assert f">{pet}, fidelity 0.125, preservation 1.000<" in page


def test_the_markdown_holds_the_command_and_all_tables(tmp_path: Path) -> None:
    outcomes = collect(finish_sweep(tmp_path, across={"pet": PETS}))
    text = write_markdown("mine", "python -m finetune.sweep sweep.yaml", outcomes)
    assert text.startswith("## mine\n\n12 of 12 runs scored; 6 outcomes,")
    assert "```bash\npython -m finetune.sweep sweep.yaml\n```" in text
    for title in (
        "Outcomes:",
        "Differences from 2 (rank 4, scale 1), of pairs of the same seed and pet:",
        "Fidelity and preservation by pet",
    ):
        assert f"\n\n{title}" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for lines in tables:
        assert len({line.count(" | ") for line in lines}) == 1
        assert set(lines[1]) == set("| -")
    assert "\n\nRecommended: " in text


def test_bars_in_cells_do_not_end_them_in_markdown() -> None:
    table = Table("T", ("a", "b"), [("x|y", "z")])
    assert table.as_markdown().splitlines()[-1] == "| x\\|y | z |"


def test_a_page_without_any_result_can_be_written() -> None:
    nothing = collect_outcomes([], (1.0,), 3)
    assert "0 of 3 runs scored" in write_page("a sweep", nothing)
    assert write_text_report(nothing)
    assert write_markdown("mine", "command", nothing)
