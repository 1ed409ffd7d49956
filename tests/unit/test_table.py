"""Tables fit the terminal, lose nothing in a pipe, and no text in them can act on the terminal."""

import doctest
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.cli import output, table
from sysctr.cli.table import GAP, NARROWEST, Column, cut, fit, neutralise, render, width

TEXTS = st.text(max_size=40)


@pytest.mark.parametrize("module", [table, output])
def test_examples_of_the_module_hold(module):
    assert doctest.testmod(module).failed == 0


@given(st.text(st.characters()))
def test_neutralised_text_holds_nothing_that_acts_on_a_terminal(text):
    shown = neutralise(text)
    # Space separators other than the space look like it, so they are escaped too.
    assert not {unicodedata.category(char) for char in shown} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    shown.encode()


@given(st.text(st.characters(categories=("L", "N", "P", "S"))))
def test_printable_text_stays_as_it_is(text):
    assert neutralise(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("\x9b2J", "\\x9b2J"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\u2066x\u2069\u200b\ufeff", "\\u2066x\\u2069\\u200b\\ufeff"),
        ("\U000e0041", "\\U000e0041"),
        ("\udc80", "\\udc80"),
        ("日本 café", "日本 café"),
    ],
)
def test_attacks_on_the_terminal_become_visible(text, shown):
    assert neutralise(text) == shown


@given(TEXTS, st.integers(0, 60))
def test_cut_text_is_never_wider_than_asked(text, cells):
    assert width(cut(text, cells)) <= cells


@given(st.lists(st.tuples(st.integers(0, 80), st.booleans()), min_size=1, max_size=8), st.integers(1, 200))
def test_a_row_fits_whenever_its_columns_can_give_enough(columns, available):
    widths = [cells for cells, _ in columns]
    least = [min(cells, NARROWEST) if may else cells for cells, may in columns]
    fitted = fit(widths, least, available)
    gaps = len(GAP) * (len(columns) - 1)
    if sum(least) + gaps <= available:
        assert sum(fitted) + gaps <= available
    else:
        assert fitted == least
    assert all(now == cells for now, (cells, may) in zip(fitted, columns, strict=True) if not may)


def test_optional_columns_go_before_another_is_cut_too_short():
    columns = (
        Column("NAME"),
        Column("IP", flexible=True, narrowest=9),
        Column("A", optional=True),
        Column("B", optional=True),
    )
    rows = [("web", "10.0.0.10", "aaaa", "bbbb")]
    assert render(columns, rows, available=27)[1].split() == ["web", "10.0.0.10", "aaaa", "bbbb"]
    assert render(columns, rows, available=26)[1].split() == ["web", "10.0.0.10", "aaaa"]
    assert render(columns, rows, available=10)[1].split() == ["web", "10.0.0.10"]


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=6), st.integers(30, 120))
def test_a_rendered_table_keeps_to_the_terminal(rows, available):
    columns = (Column("NAME", flexible=True), Column("VALUE", flexible=True, right=True))
    for line in render(columns, rows, available=available):
        assert width(line) <= available
        assert "\n" not in line


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=6))
def test_nothing_is_cut_in_a_pipe(rows):
    lines = render((Column("NAME", flexible=True), Column("VALUE", flexible=True)), rows)
    for (name, value), line in zip(rows, lines[1:], strict=True):
        assert line.startswith(neutralise(name))
        assert line.endswith(neutralise(value))


def test_the_widest_flexible_column_gives_way_and_shows_it():
    columns = (Column("ID"), Column("NAME", flexible=True), Column("NOTE", flexible=True))
    lines = render(columns, [("101", "short", "a" * 60)], available=30)
    assert lines[1] == "101  short  " + "a" * 17 + "…"


def test_colour_surrounds_the_text_and_not_the_space_behind_it():
    columns = (Column("STATE", colour=output.state_colour), Column("NAME"))
    lines = render(columns, [("running", "a"), ("stopped", "b")], coloured=True)
    assert lines[1] == "\x1b[32mrunning\x1b[0m  a"
    assert lines[2] == "stopped  b"


@given(st.integers(0, 2**60))
def test_sizes_are_short(size_bytes):
    assert len(output.size(size_bytes)) <= 5
