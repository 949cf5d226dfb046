"""The figures in docs/real-model.md are those of the runs that are packed next to the experiments."""

import json
import tarfile
from html import unescape
from pathlib import Path

import pytest

from backmerge.reporting.report import write_report
from backmerge.reporting.run_tables import write_tables

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "real-model.md"
PACKED = sorted((ROOT / "experiments" / "smollm2" / "measured").glob("*.tar.xz"))


def name_of(file: Path) -> str:
    """The run's name."""
    return file.name.partition(".")[0]


def unpacked(file: Path, folder: Path) -> Path:
    """The run."""
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    return folder / name_of(file)


@pytest.mark.parametrize("file", PACKED, ids=name_of)
def test_the_page_has_the_figures_of_the_run(file: Path, tmp_path: Path) -> None:
    """Each recipe's row, after the tables were made again without a model."""
    run = unpacked(file, tmp_path)
    write_tables(run)
    lines = (run / "tables" / "points.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]  # after the head and its rule
    page = PAGE.read_text(encoding="utf-8")
    assert len(rows) == len(json.loads((run / "results.json").read_text(encoding="utf-8"))["points"]) >= 6
    for row in rows:
        name, _, *cells, _ = (cell.strip() for cell in unescape(row).replace("\\", "").split("|")[1:-1])
        shown = "" if name.startswith("λ by layer@") else f"| {name} "  # the page says from which λ to which
        assert f"{shown}| {' | '.join(cells)} |" in page


@pytest.mark.parametrize("file", PACKED, ids=name_of)
def test_the_report_is_made_again_without_a_model(file: Path, tmp_path: Path) -> None:
    """All of it, with every recipe of the results."""
    run = unpacked(file, tmp_path)
    write_report(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    points = json.loads((run / "results.json").read_text(encoding="utf-8"))["points"]
    assert all(f">{point['point']}<" in page for point in points)
    assert {file.suffix for file in (run / "plots").iterdir()} == {".png", ".svg", ".pdf"}
