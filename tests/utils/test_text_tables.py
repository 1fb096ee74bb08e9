"""Tables of text."""

from __future__ import annotations

from dvae.utils.text_tables import aligned_lines, markdown_table


def test_markdown_is_aligned_and_harmless() -> None:
    assert markdown_table(["", "5 steps"], [["a", "21.3"], ["x\x1b[2J", ""]]).splitlines() == [
        "|          | 5 steps |",
        "|----------|---------|",
        "| a        | 21.3    |",
        r"| x\x1b[2J |         |",
    ]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [["run", "state"], ["runs/demo", "-"]]
    assert aligned_lines(rows) == ["run        state", "runs/demo  -"]
    assert aligned_lines(rows, right=True) == ["      run  state", "runs/demo      -"]
