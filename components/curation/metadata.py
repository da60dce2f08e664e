"""The metadata files of an imagefolder, read line by line without trust.

metadata.jsonl, metadata.csv and metadata.parquet name the pictures of their folder (and of the
folders below it) in a column `file_name` and say a row's worth about each.
"""

import csv
import json
import posixpath
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from components.curation.shards import BROKEN
from components.curation.tables import caption_column, is_scalar, rows_of, text_of

FILE_NAME = "file_name"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CSV_WORDS: dict[str, bool] = {"true": True, "false": False}


@dataclass
class Listed:
    """A row of a metadata file, or why it is none."""

    path: str  # of the picture below the imagefolder; of a row that is none, the row's place
    place: str  # FILE:LINE, or FILE:ROW of a parquet file
    caption: str = ""
    meta: str = "{}"  # JSON text
    error: str = ""


def read_metadata(root: Path, file: str, curation: Mapping[str, Any]) -> Iterator[Listed]:
    """Yield every row of the metadata file `root`/`file`, the broken ones with `error` set.

    file: path below the imagefolder `root`. curation: `columns` and `limits` (`text_bytes`,
    the most that a line may hold; `batch`, rows of a parquet file held at once).
    """
    kind = Path(file).suffix
    rows = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}[kind]
    try:
        for number, values, error in rows(root / file, curation["limits"]):
            yield _row(file, number, values, error, curation["columns"])
    except BROKEN as problem:
        yield Listed(file, file, error=f"{file} cannot be read on: {str(problem)[:160]}")


def _row(
    file: str, number: int, values: Any, error: str, columns: Mapping[str, list[str]]
) -> Listed:
    """The row as it goes into the index."""
    place = f"{file}:{number}"
    if not error:
        error = _unfit(values)
    if error:
        return Listed(place, place, error=f"{place}: {error}")
    name = posixpath.normpath(values[FILE_NAME])
    column = caption_column(values, columns["caption"])
    meta = {k: v for k, v in values.items() if k not in (FILE_NAME, column)}
    try:
        text = json.dumps(meta, ensure_ascii=False)
        # Half of a surrogate pair may be written in JSON, but in no table.
        (text + name).encode()
    except (ValueError, RecursionError) as problem:
        return Listed(place, place, error=f"{place}: {str(problem)[:120]}")
    path = posixpath.join(posixpath.dirname(file), name)
    return Listed(path, place, text_of(values.get(column)), text)


def _unfit(values: Any) -> str:
    """Why these values name no file of the folder, or ''."""
    if not isinstance(values, dict):
        return "no object"
    name = values.get(FILE_NAME)
    if not isinstance(name, str) or not name:
        return f"no {FILE_NAME}"
    if name.startswith("/") or ".." in name.split("/"):
        return f"{FILE_NAME} {name[:80]!r} leads out of the folder"
    return ""


def _lines(file: BinaryIO, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number from 1, line without its end), None for a line longer than `limit` bytes."""
    number = 0
    while line := file.readline(limit + 1):
        number += 1
        whole = len(line) <= limit or line.endswith(b"\n")
        while not line.endswith(b"\n") and (line := file.readline(limit + 1)):
            pass
        if number == 1 and whole:
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield number, line if whole else None


def _json_lines(path: Path, limits: Mapping[str, int]) -> Iterator[tuple[int, Any, str]]:
    limit = limits["text_bytes"]
    with path.open("rb") as file:
        for number, line in _lines(file, limit):
            if line is None:
                yield number, None, f"more than {limit} bytes in a line"
            elif line.strip():
                try:
                    yield number, json.loads(line.decode()), ""
                except (ValueError, RecursionError) as problem:
                    yield number, None, f"no JSON: {str(problem)[:120]}"


def _csv_rows(path: Path, limits: Mapping[str, int]) -> Iterator[tuple[int, Any, str]]:
    limit = limits["text_bytes"]
    with path.open("rb") as file:
        header: list[str] | None = None
        for number, fields, error in _csv_fields(_lines(file, limit), limit):
            if header is None:
                header = [name.strip() for name in fields]
                if error or FILE_NAME not in header:
                    yield number, None, error or f"no column {FILE_NAME} in the first line"
                    return
            elif error:
                yield number, None, error
            elif len(fields) != len(header):
                yield number, None, f"{len(fields)} fields, {len(header)} in the first line"
            else:
                values: dict[str, Any] = dict(zip(header, fields, strict=True))
                for name, text in values.items():
                    values[name] = CSV_WORDS.get(text.lower(), text)
                yield number, values | {FILE_NAME: fields[header.index(FILE_NAME)]}, ""


def _csv_fields(
    lines: Iterator[tuple[int, bytes | None]], limit: int
) -> Iterator[tuple[int, list[str], str]]:
    """Yield (line number, fields, error) a row; a quote that is not closed costs its own line."""
    waiting: deque[tuple[int, bytes | None]] = deque()
    while (row := _take(waiting, lines)) is not None:
        number, line = row
        if line is None:
            yield number, [], f"more than {limit} bytes in a line"
            continue
        if not line.strip():
            continue
        fields, error = _split(line)
        if error and line.count(b'"') % 2:
            # A field in quotes may hold line ends: lines are joined until the quotes pair up.
            joined, taken = line, deque[tuple[int, bytes | None]]()
            odd = True
            while odd and len(joined) <= limit and (row := _take(waiting, lines)) is not None:
                taken.append(row)
                joined += row[1] or b""
                odd ^= (row[1] or b"").count(b'"') % 2 == 1
            whole, wrong = _split(joined)
            if wrong:
                waiting.extendleft(reversed(taken))
            else:
                fields, error = whole, ""
        yield number, fields, error


def _take(
    waiting: deque[tuple[int, bytes | None]], lines: Iterator[tuple[int, bytes | None]]
) -> tuple[int, bytes | None] | None:
    return waiting.popleft() if waiting else next(lines, None)


def _split(line: bytes) -> tuple[list[str], str]:
    """The fields of a row, or why there are none."""
    try:
        text = line.decode()
        return next(csv.reader([text], strict=True)), ""
    except (ValueError, csv.Error, StopIteration) as problem:
        return [], f"no row of CSV: {str(problem)[:120]}"


def _parquet_rows(path: Path, limits: Mapping[str, int]) -> Iterator[tuple[int, Any, str]]:
    with pq.ParquetFile(path) as file:
        names = [f.name for f in file.schema_arrow if is_scalar(f.type)]
        if FILE_NAME not in names:
            yield 1, None, f"no column {FILE_NAME}"
            return
        number = 0
        for batch in file.iter_batches(limits["batch"], columns=names):
            for values, error in rows_of(batch):
                number += 1
                yield number, {k: v for k, v in values.items() if v is not None}, error
