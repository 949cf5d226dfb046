"""CSV: the numbers are the results', to the last digit."""

import csv
import io

from backmerge.reporting.tables import as_csv

from .synthetic import made_results


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
