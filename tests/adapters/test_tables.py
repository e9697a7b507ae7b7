"""Columns of tables are aligned as asked, and nothing stands behind a line."""

from adapters.tables import format_facts, format_range, format_table

ROWS = [("", "rank", "in"), ("a longer name", "4", "mid"), ("b",)]


def test_columns_are_aligned() -> None:
    assert format_table(ROWS) == "               rank   in\na longer name     4  mid\nb"
    assert format_table(ROWS, left=3) == "               rank  in\na longer name  4     mid\nb"


def test_cells_of_several_lines_stay_in_their_columns() -> None:
    rows = [("", "one", "two"), ("a long\nname", "1", "2\n2 to 3"), ()]
    assert format_table(rows) == "        one     two\na long    1       2\nname         2 to 3\n"


def test_a_text_of_several_lines_stays_in_its_column() -> None:
    facts = [("size", "2 tensors\n3 kB"), ("prompts", ""), ("kind", "lora")]
    assert format_facts(facts) == "size     2 tensors\n         3 kB\nkind     lora"


def test_ranges() -> None:
    assert [format_range(v) for v in ([], [4, 4.0], [16, 2, None])] == ["", "4", "2 to 16"]
