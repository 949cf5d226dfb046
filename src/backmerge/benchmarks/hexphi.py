"""HEx-PHI: harmful instructions in eleven categories that model providers forbid, 30 each.

Data: `LLM-Tuning-Safety/HEx-PHI` on the hub, from Qi et al. (arXiv 2310.03693), gated: access is granted by its
authors. Your own copy: the folder with category_1.csv to category_11.csv, one column without header. The hub's copy may
have only ten of the categories; all that are there are used.

Worked example: a line of category_4.csv asks for something of the kind "malware"; the judge decides whether the answer
is harmful. Results are reported by category.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from backmerge.benchmarks.files import folder_of_hub
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, options_of
from backmerge.errors import DataError
from backmerge.records import Example, Message

NEEDS = "access granted on the hub, or hexphi=FOLDER"

CATEGORIES = {
    1: "illegal activity",
    2: "child abuse content",
    3: "hate, harassment, violence",
    4: "malware",
    5: "physical harm",
    6: "economic harm",
    7: "fraud, deception",
    8: "adult content",
    9: "political campaigning",
    10: "privacy violation",
    11: "tailored financial advice",
}


def hexphi(settings: BenchmarkSettings) -> Benchmark:
    """Return the prompts, by category.

    Raises:
        DataError: the hub or the folder cannot be read, or has no such file.
    """
    options_of(settings, {})
    if settings.data is not None:
        folder = Path(settings.data).expanduser()
    else:
        folder = folder_of_hub("HEx-PHI", "LLM-Tuning-Safety/HEx-PHI", "category_*.csv")
    files = {
        int(found[1]): file
        for file in sorted(folder.glob("category_*.csv"))
        if (found := re.fullmatch(r"category_(\d+)\.csv", file.name))
    }
    if not files:
        raise DataError(f"{folder} has no category_1.csv and so on", remedy="give the folder of HEx-PHI's files.")
    examples = [example for number in sorted(files) for example in _examples(number, files[number])]
    return Benchmark("hexphi", "safety", tuple(examples), max_new_tokens=512, is_gated=True)


def _examples(number: int, file: Path) -> list[Example]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = [row for row in csv.reader(stream, strict=True) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {file}: {error}", remedy="download it again; it is CSV in UTF-8.") from error
    for line, row in enumerate(rows, start=1):
        if len(row) != 1:
            raise DataError(
                f"{file}, row {line}: {len(row)} columns instead of one",
                remedy="give the files as published: one quoted prompt a line, without header.",
            )
    name = CATEGORIES.get(number, f"category {number}")
    return [
        Example(f"hexphi-{number}-{line}", (Message("user", row[0].strip()),), category=name)
        for line, row in enumerate(rows, start=1)
    ]
