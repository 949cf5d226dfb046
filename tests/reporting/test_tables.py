"""Tables: the numbers are the results', to the last digit, in whatever form."""

import csv
import io
import math

from hypothesis import given
from hypothesis import strategies as st

from backmerge.records import Estimate
from backmerge.reporting.tables import FIELDS, Column, ColumnKind, Entry, Named, Table, as_csv, csv_rows, text_of

from .synthetic import made_results

SHARES = st.floats(0, 1)
CELLS = st.builds(
    Estimate,
    SHARES,
    SHARES,
    SHARES,
    st.integers(0, 9999),
    unscored=st.integers(0, 99),
    spread=st.none() | SHARES,
)
GAPS = st.builds(Estimate, st.floats(-1, 1), st.floats(-1, 1), st.floats(-1, 1), st.integers(0, 9999))


def table_of(columns: list[Column], *rows: list[Entry]) -> Table:
    """A table of one block."""
    return Table("name", "caption", columns, [rows])


def test_every_number_reads_back_as_itself() -> None:
    """Reading the CSV gives the rows of the results, `None` as an empty field."""
    for name in ("scores", "summary"):
        rows = made_results(unscored=1)[name]
        read = list(csv.DictReader(io.StringIO(as_csv(rows))))
        assert len(read) == len(rows)
        for found, row in zip(read, rows, strict=True):
            assert list(found) == list(row)
            for key, value in row.items():
                assert found[key] == ("" if value is None else str(value))
                if isinstance(value, float):
                    assert float(found[key]) == value


def test_a_name_with_commas_stays_one_field() -> None:
    """Quotes, commas and line ends in a name do not make columns or rows."""
    name = 'linear(a=1,b="x"\n)@0.5'
    assert list(csv.DictReader(io.StringIO(as_csv([{"point": name, "n": 1}])))) == [{"point": name, "n": "1"}]


@given(CELLS, GAPS, st.floats(allow_nan=False, allow_infinity=False))
def test_a_table_s_csv_has_every_number_in_full(cell: Estimate, gap: Estimate, number: float) -> None:
    """Shares and gaps come apart into fields of one number, and none is rounded."""
    columns = [Column("c", "C", "share"), Column("g", "G", "gap"), Column("x", "X", "number")]
    (row,) = csv.DictReader(io.StringIO(as_csv(csv_rows(table_of(columns, [cell, gap, number])))))
    assert float(row["x"]) == number
    for column, entry in zip(columns[:2], (cell, gap), strict=True):
        for field in ("value", *FIELDS[column.kind]):
            value = getattr(entry, field)
            found = row[column.name if field == "value" else f"{column.name}_{field}"]
            assert found == "" if value is None else type(value)(found) == value


def test_an_entry_is_read_in_percent_with_its_interval() -> None:
    """By hand: a share, one with a spread and unscored answers, a mean over benchmarks, a gap, λ, and nothing."""
    entries: list[Entry] = [
        Estimate(0.1234, 0.1, 0.1449, 50),
        Estimate(0.1234, 0.1, 0.1449, 50, unscored=3, spread=0.02, num_models=2),
        Estimate(0.5, 0.4, 0.6),
        Estimate(-0.012, -0.03, 0.006, 50),
        0.25,
        Named("over_refusal", "over-refusal"),
        "words",
        None,
        Estimate(None, 0.0, 1.0, 0, unscored=5),
    ]
    kinds: list[ColumnKind] = ["share", "share", "level", "gap", "number", "text", "text", "share", "share"]
    assert [text_of(entry, kind) for entry, kind in zip(entries, kinds, strict=True)] == [
        "12.3 [10.0, 14.5]",
        "12.3 ± 2.0 [10.0, 14.5] (3 unscored)",
        "50.0 [40.0, 60.0]",
        "-1.2 [-3.0, +0.6]",
        "0.25",
        "over-refusal",
        "words",
        "–",
        "–",
    ]


def test_words_instead_of_figures_give_empty_fields() -> None:
    """A column of shares may hold words or nothing; its fields are then empty."""
    columns = [Column("c", "C", "share"), Column("m", "M")]
    (words, nothing) = csv_rows(table_of(columns, ["why", Named("asr", "ASR")], [None, None]))
    assert [value for key, value in words.items() if key.startswith("c")] == [None] * 8
    assert (words["m"], nothing["m"]) == ("asr", None)


def test_columns_of_the_same_name_keep_their_numbers() -> None:
    """A benchmark may be called as a column is, or as one of its fields; nothing is lost."""
    columns = [Column("a", "A", "share"), Column("a_low", "B", "share"), Column("a", "C", "number")]
    (row,) = csv_rows(
        table_of(columns, [Estimate(0.1, 0.2, 0.3, 4, unscored=5), Estimate(0.6, 0.7, 0.8, 9, unscored=10), 11.0])
    )
    assert len(row) == 8 + 8 + 1
    assert [value for value in row.values() if value is not None] == [
        0.1,
        0.2,
        0.3,
        4,
        5,
        1,
        "prompts",
        0.6,
        0.7,
        0.8,
        9,
        10,
        1,
        "prompts",
        11,
    ]
    assert math.isclose(row["a_low"], 0.2)


def test_headings_over_neighbours_are_counted() -> None:
    """Columns of one group that stand together share a heading; without groups there is no such line."""
    columns = [Column("r", "run"), *(Column(n, n, "share", "score") for n in "abc"), Column("d", "d", "share", "ASR")]
    assert table_of(columns).groups == [("", 1), ("score", 3), ("ASR", 1)]
    assert table_of([Column("r", "run"), Column("s", "s")]).groups == []
