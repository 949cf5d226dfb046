"""Read rows of files and of the hub's data sets, each with its place and its fault, if any.

A line that is not JSON, or a row with too many fields, does not stop the reading: the row records its fault, so that
all bad rows of a file can be reported together.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.errors import DataError

SUFFIXES = (".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".tsv")
FORMATS_REMEDY = "give a .jsonl, .json, .csv, .tsv or .parquet file, with text in UTF-8."

_BLANK = re.compile(r"[ \t\r\n]*")
_BATCH = 1000  # rows of a Parquet file in memory at a time


class Row(NamedTuple):
    """One row, as read.

    Attributes:
        id: `<stem>-<number>`, counted from 1: the line in JSON Lines, CSV and TSV, the row in a JSON list, Parquet and
            on the hub.
        place: The same for messages, with the file's path.
        values: Column to value.
        fault: What is wrong with the row, if anything; then it has no values.
    """

    id: str
    place: str
    values: Mapping[str, Any]
    fault: str = ""


class HubData(NamedTuple):
    """A data set on the Hugging Face hub.

    Attributes:
        name: `owner/name`.
        revision: A commit; by default the newest version.
        file: One of its files, if not all are wanted.
        split: Its name on the hub.
    """

    name: str
    revision: str | None = None
    file: str | None = None
    split: str = "train"


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the file itself, or the data files in the folder, sorted by name.

    Raises:
        DataError: nothing is there, or two files of the folder would give their rows the same ids.
    """
    if path.is_file():
        return (path,)
    if not path.is_dir():
        raise DataError(f"there is no file '{path}'", remedy=FORMATS_REMEDY)
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        raise DataError(f"the folder {path} has no data files", remedy=FORMATS_REMEDY)
    stems = [file.stem for file in files]
    if repeated := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise DataError(
            f"the folder {path} has several files named '{repeated[0]}', which differ only in their endings",
            remedy="keep one of them, or give the file instead of the folder.",
        )
    return tuple(files)


def read_rows(path: Path, tsv_columns: Sequence[str] = ()) -> Iterator[Row]:
    """Read the rows of one file, in the format of its ending; without a known ending it is read as JSON.

    JSON is a list of objects, or one object on each line. CSV and TSV name their columns in the first line and may use
    quotes. Lists are read as a whole, everything else as a stream.

    Args:
        path: The file.
        tsv_columns: Names for the columns of a .tsv file without a header; it is then read without quotes, as fields
    separated by tabs.

    Raises:
        DataError: the file cannot be read, or is so damaged that later rows cannot be found.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet(path)
        elif suffix == ".tsv" and tsv_columns:
            yield from _bare_fields(path, tsv_columns)
        elif suffix in {".csv", ".tsv"}:
            yield from _separated(path, "\t" if suffix == ".tsv" else ",")
        elif _begins_a_list(path):
            yield from _json_list(path)
        else:
            yield from _json_lines(path)
    except OSError as error:
        remedy = "check the path." if isinstance(error, FileNotFoundError) else FORMATS_REMEDY
        raise DataError(f"cannot read {path}: {error.strerror or error}", remedy=remedy) from error


def sound_rows(path: str | Path) -> Iterator[Row]:
    """Read the rows of a file, and refuse any row with a fault.

    Raises:
        DataError: as for `read_rows`; or a row has a fault; the message names the row.
    """
    for row in read_rows(Path(path).expanduser()):
        if row.fault:
            raise DataError(f"{row.place}: {row.fault}", remedy=FORMATS_REMEDY)
        yield row


def hub_rows(source: HubData) -> Iterator[Row]:
    """Rows of a data set on the hub, or in its cache on this machine; they stay on the disk and are read one by one.

    Raises:
        DataError: the hub cannot be reached or refuses the data set, and it is not in the cache.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(source.name, data_files=source.file, split=source.split, revision=source.revision)
    except (OSError, ValueError, DatasetsError) as error:  # what datasets raises if the hub refuses something
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"the data set '{source.name}' could not be downloaded from the hub: {reason}",
            remedy="check the name, the network (HF_HUB_OFFLINE) and, for gated data, `hf auth login`; "
            "or download it elsewhere and give the file.",
        ) from error
    stem = source.name.rpartition("/")[2]
    for number, values in enumerate(rows, start=1):
        yield Row(f"{stem}-{number}", f"{source.name}, row {number}", values)


def _row(path: Path, line: int, values: Mapping[str, Any], fault: str = "") -> Row:
    return Row(f"{path.stem}-{line}", f"{path}, line {line}", values, fault)


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines with their line ends, without a byte order mark at the beginning."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream):
            yield line if number else line.removeprefix(codecs.BOM_UTF8)


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield _row(path, number, {}, "not UTF-8")
        except (ValueError, RecursionError) as error:  # besides JSONDecodeError: a number with too many digits
            yield _row(path, number, {}, f"not JSON: {getattr(error, 'msg', error)}")
        else:
            is_object = isinstance(values, dict)
            yield _row(path, number, values if is_object else {}, "" if is_object else "not a JSON object")


def _begins_a_list(path: Path) -> bool:
    first = next((line for line in _lines(path) if line.strip()), b"")
    return first.lstrip().startswith(b"[")


def _json_list(path: Path) -> Iterator[Row]:
    text = "".join(_decoded_lines(path))
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    line, counted, number = 1, 0, 0
    while True:
        at = _after_blanks(text, at)
        if text.startswith("]", at):
            return
        line, counted = line + text.count("\n", counted, at), at
        try:
            values, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}, line {getattr(error, 'lineno', line)}: not JSON: {getattr(error, 'msg', error)}",
                remedy="a file that begins with [ is read as one list of objects.",
            ) from error
        number += 1
        is_object = isinstance(values, dict)
        yield Row(
            f"{path.stem}-{number}",
            f"{path}, row {number} (line {line})",
            values if is_object else {},
            "" if is_object else "not a JSON object",
        )
        at = _after_blanks(text, at)
        if text.startswith(",", at):
            at += 1
        elif not text.startswith("]", at):
            raise DataError(
                f"{path}: neither a comma nor the list's end after row {number} (line {line})",
                remedy="the file is cut short or damaged: fetch or write it again.",
            )


def _after_blanks(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at


def _decoded_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: not UTF-8", remedy="save the file as UTF-8.") from error


def _separated(path: Path, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(_decoded_lines(path), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(f"{path}: the column '{repeated[0]}' is repeated", remedy="rename or remove one of them.")
        before = reader.line_num
        for fields in reader:
            line, before = before + 1, reader.line_num
            if not fields:
                continue
            if len(fields) > len(header):
                fault = f"{len(fields)} fields, but the header has {len(header)} columns; quote a text with a separator"
                yield _row(path, line, {}, fault)
            else:
                yield _row(path, line, dict(zip(header, fields, strict=False)))
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: {error}",
            remedy="close its quotes; very long texts are better kept as JSON Lines.",
        ) from error


def _bare_fields(path: Path, names: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(_decoded_lines(path), start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r\n").split("\t")
        if len(fields) == len(names):
            yield _row(path, number, dict(zip(names, fields, strict=True)))
        else:
            yield _row(path, number, {}, f"{len(fields)} fields between tabs, not {len(names)} ({', '.join(names)})")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path.stem}-{number}", f"{path}, row {number}", values)
    except pa.ArrowException as error:
        raise DataError(
            f"{path}, after row {number}: not readable as Parquet: {str(error).splitlines()[0]}",
            remedy="the file is cut short or damaged: fetch or write it again.",
        ) from error
