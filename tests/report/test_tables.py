"""Bits per byte as rows, sentences and tables."""

import io

from rich.console import Console

from tokenkit.report.content import Bar
from tokenkit.report.tables import bits_per_byte_rows, bits_per_byte_table, gap_closed, gap_sentence, markdown_table


def bars(group: str = "g", **values: float) -> list[Bar]:
    return [Bar(group=group, label=kind, kind=kind, bits_per_byte=value) for kind, value in values.items()]


def test_the_share_of_the_gap() -> None:
    group = bars(alm=1.5, clm=2.5, zero_shot=3.0, teacher=1.0)
    assert gap_closed(group) == [("ALM", 0.75), ("CLM", 0.25)]
    assert gap_sentence(group) == "ALM closes 75 % of the gap between zero-shot and teacher, CLM 25 %."
    assert "CLM −50 %" in gap_sentence(bars(alm=1.0, clm=4.0, zero_shot=3.0, teacher=1.0))


def test_two_runs_of_one_kind_go_by_their_labels() -> None:
    group = bars(teacher=1.0, zero_shot=2.0, alm=1.5)
    group.append(Bar(group="g", label="ALM, longer", kind="alm", bits_per_byte=1.25))
    assert gap_closed(group) == [("ALM, longer", 0.75), ("alm", 0.5)]
    assert bits_per_byte_rows(group)[1][3] == "1.500 / 1.250"


def test_no_gap_no_sentence() -> None:
    for group in (bars(alm=1.0), bars(teacher=2.0, alm=1.0), bars(teacher=2.0, zero_shot=2.0, alm=1.0)):
        assert gap_sentence(group) == ""


def test_rows_markdown_and_terminal_agree() -> None:
    both = bars("uni|gram [b]", teacher=1.0, zero_shot=3.0, alm=1.5) + bars("bytes", teacher=1.0, clm=2.0)
    rows = bits_per_byte_rows(both)
    assert rows == [
        ["target", "teacher", "zero-shot", "CLM", "ALM", "gap closed"],
        ["uni|gram [b]", "1.000", "3.000", "–", "1.500", "ALM 75 %"],
        ["bytes", "1.000", "–", "2.000", "–", "–"],
    ]
    assert markdown_table(rows).splitlines()[2] == r"| uni\|gram [b] | 1.000 | 3.000 | – | 1.500 | ALM 75 % |"
    terminal = io.StringIO()
    Console(file=terminal, width=120).print(bits_per_byte_table(both))
    assert all(cell in terminal.getvalue() for row in rows for cell in row)
