"""Loose pictures (Hugging Face's imagefolder, img2dataset's files): found, listed, read.

The index is a parquet file, a row a picture, in the order of their paths. Files and metadata
are joined in a database on the disk, so that memory does not grow with the number of pictures.
"""

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.curation.database import Database, open_database
from components.curation.metadata import METADATA, read_metadata
from components.curation.shards import PICTURES, Sample, finish, safe_key
from components.curation.tables import make_sample
from components.files import atomic_file

# Files that belong to a data set without being pictures of it.
BESIDE = (".md", ".txt", ".json", ".jsonl", ".csv")
BUFFER_ROWS = 4096
FOUND = [
    ("path", pa.string()),  # below the imagefolder
    ("key", pa.string()),
    ("size", pa.int64()),  # bytes
    ("mtime_ns", pa.int64()),
    ("listed_in", pa.string()),  # the metadata file that ought to list it, or ''
    ("error", pa.string()),
]
LISTED = [
    ("path", pa.string()),
    ("key", pa.string()),
    ("place", pa.string()),  # FILE:LINE
    ("number", pa.int64()),  # counts the rows of all metadata files
    ("caption", pa.string()),
    ("meta", pa.string()),
    ("error", pa.string()),
]
INDEX = """
WITH numbered AS (
    SELECT *, row_number() OVER (PARTITION BY path ORDER BY number) AS nth
    FROM listed WHERE error = ''
), joined AS (
    SELECT coalesce(f.path, l.path) AS path, coalesce(f.key, l.key) AS key,
        coalesce(l.caption, '') AS caption, coalesce(l.meta, '{}') AS meta,
        coalesce(f.size, 0) AS size, coalesce(f.mtime_ns, 0) AS mtime_ns,
        CASE WHEN f.path IS NULL THEN l.place || ': there is no file ' || l.path
             WHEN f.error <> '' THEN f.error
             WHEN l.path IS NULL AND f.listed_in <> '' THEN 'not listed in ' || f.listed_in
             ELSE '' END AS error
    FROM found f FULL OUTER JOIN (SELECT * FROM numbered WHERE nth = 1) l ON f.path = l.path
    UNION ALL
    SELECT path, key, '', '{}', 0, 0, place || ': lists ' || path || ' once more'
    FROM numbered WHERE nth > 1
    UNION ALL
    SELECT path, key, '', '{}', 0, 0, error FROM listed WHERE error <> ''
), named AS (
    SELECT *, row_number() OVER same AS nth, first_value(path) OVER same AS first
    FROM joined WINDOW same AS (PARTITION BY key ORDER BY error <> '', path, error)
)
SELECT key, path, caption, meta, size, mtime_ns,
    CASE WHEN error = '' AND nth > 1 THEN 'key ' || key || ' is taken by ' || first
         ELSE error END AS error
FROM named ORDER BY path, error
"""


@dataclass
class Found:
    """A file of the input."""

    path: str  # below the input's folder, with /
    kind: str  # tar | parquet | metadata | picture | other
    size: int = 0  # bytes
    mtime_ns: int = 0
    listed_in: str = ""  # the metadata file that ought to list it, or ''
    error: str = ""


def walk(source: Path) -> Iterator[Found]:
    """Yield the files below `source` in no order; hidden ones and known other files are left out.

    Links to folders are not followed. What cannot be read comes with `error` set.
    """
    root = source.resolve()
    waiting = [("", "")]
    while waiting:
        folder, listed_in = waiting.pop()
        own = (f"{folder}{name}" for name in METADATA)
        listed_in = next((p for p in own if (root / p).is_file() and _inside(root, p)), listed_in)
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append((f"{folder}{entry.name}/", listed_in))
                    elif (found := _look(root, folder, entry, listed_in)) is not None:
                        yield found
        except OSError as problem:
            yield Found(
                _utf8(folder) or ".", "other", error=f"folder unreadable: {problem.strerror}"
            )


def _utf8(name: str) -> str:
    """The name with what is no UTF-8 replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _look(root: Path, folder: str, entry: os.DirEntry[str], listed_in: str) -> Found | None:
    """What the file is, or None for one that is no part of the data."""
    path, suffix = folder + entry.name, Path(entry.name).suffix.lower()
    kind = {".tar": "tar", ".parquet": "parquet"}.get(suffix, "")
    if entry.name in METADATA:
        kind = "metadata"
    elif suffix.removeprefix(".") in PICTURES:
        kind = "picture"
    elif suffix in BESIDE or entry.name.upper().startswith("README"):
        return None
    try:
        path.encode()
        info = entry.stat()
    except UnicodeEncodeError:
        return Found(_utf8(path), "other", error="file name is not UTF-8")
    except OSError as problem:
        return Found(path, "other", error=f"file unreadable: {problem.strerror}")
    if stat.S_ISDIR(info.st_mode):
        return Found(path, "other", error="link to a folder, not followed")
    if not stat.S_ISREG(info.st_mode):
        return Found(path, "other", error="no regular file")
    found = Found(path, kind or "other", info.st_size, info.st_mtime_ns, listed_in)
    if not kind:
        found.error = f"{suffix or 'no extension'}: pictures are read as {', '.join(PICTURES)}"
    elif kind in ("picture", "metadata") and entry.is_symlink() and not _inside(root, path):
        found.kind, found.error = "other", "link that leads out of the folder"
    return found


def _inside(root: Path, path: str) -> bool:
    return (root / path).resolve().is_relative_to(root)


@contextlib.contextmanager
def open_index(path: Path, curation: Mapping[str, Any]) -> Iterator["Index"]:
    """Yield an index to fill and write; its rows lie beside `path` until the block ends.

    curation: `columns`, and of `limits` `shard` (rows a row group), `memory` ("512MB", the most
    that the database takes) and `text_bytes`. Raises UserError when that memory is too little.
    """
    work = path.with_name(f"{path.name}.tmp-{os.getpid()}.folder")
    with open_database(work, curation["limits"]["memory"]) as database:
        yield Index(path, database, curation)


class Index:
    """Rows gathered in a database on the disk, then written as an index."""

    def __init__(self, path: Path, database: Database, curation: Mapping[str, Any]) -> None:
        self.path, self.curation = path, curation
        self.pictures, self.filled = 0, False
        self._database = database
        self._numbers = 0
        self._rows: dict[str, list[tuple]] = {"found": [], "listed": []}
        for name, fields in (("found", FOUND), ("listed", LISTED)):
            self._database.register("rows", pa.schema(fields).empty_table())
            self._database.execute(f"CREATE TABLE {name} AS SELECT * FROM rows")
            self._database.unregister("rows")

    def add(self, found: Found) -> None:
        """Take up a file that lies in the folder."""
        self.pictures += found.kind == "picture"
        row = (found.path, safe_key(os.path.splitext(found.path)[0]), found.size)
        self._put("found", (*row, found.mtime_ns, found.listed_in, found.error))

    def list_file(self, source: Path, file: str) -> None:
        """Take up the rows of a metadata file, given by its path below `source`."""
        for row in read_metadata(source, file, self.curation):
            self._numbers += 1
            self.pictures += not row.error
            key = safe_key(row.path if row.error else os.path.splitext(row.path)[0])
            names = (row.path, key, row.place, self._numbers)
            self._put("listed", (*names, row.caption, row.meta, row.error))

    def _put(self, name: str, row: tuple) -> None:
        self.filled = True
        self._rows[name].append(row)
        if len(self._rows[name]) >= BUFFER_ROWS:
            self._flush(name)

    def _flush(self, name: str) -> None:
        if not self._rows[name]:
            return
        schema = pa.schema(FOUND if name == "found" else LISTED)
        columns = zip(zip(*self._rows[name], strict=True), schema.types, strict=True)
        arrays = [pa.array(values, kind) for values, kind in columns]
        self._database.register("rows", pa.Table.from_arrays(arrays, schema=schema))
        self._database.execute(f"INSERT INTO {name} SELECT * FROM rows")
        self._database.unregister("rows")
        self._rows[name].clear()

    def write(self) -> None:
        """Write the index: rows by path, `limits.shard` of them a row group."""
        self._flush("found")
        self._flush("listed")
        size = self.curation["limits"]["shard"]
        batches = self._database.sql(INDEX).to_arrow_reader(size)
        with (
            atomic_file(self.path) as temporary,
            pq.ParquetWriter(temporary, batches.schema) as writer,
        ):
            for table in _of_size(batches, size):
                writer.write_table(table, row_group_size=size)


def _of_size(batches: pa.RecordBatchReader, size: int) -> Iterator[pa.Table]:
    """The batches' rows again, `size` at a time."""
    rest = batches.schema.empty_table()
    for batch in batches:
        rest = pa.concat_tables([rest, pa.Table.from_batches([batch])])
        while rest.num_rows >= size:
            yield rest.slice(0, size)
            rest = rest.slice(size)
    if rest.num_rows:
        yield rest


def read_folder(
    folder: Path, index: Path, part: int, curation: Mapping[str, Any]
) -> Iterator[Sample]:
    """Yield the samples of one row group of the index, in its order."""
    limits, root = curation["limits"], folder.resolve()
    with pq.ParquetFile(index) as file:
        for batch in file.iter_batches(limits["batch"], [part]):
            for row in batch.to_pylist():
                if row["error"]:
                    yield Sample(row["key"], error=row["error"])
                else:
                    yield _sample(root, row, limits)


def _sample(root: Path, row: Mapping[str, Any], limits: Mapping[str, int]) -> Sample:
    key, path, limit = row["key"], row["path"], limits["picture_bytes"]
    if row["size"] > limit:
        return Sample(key, error=f"picture of {row['size']} bytes, limit {limit}")
    try:
        if not _inside(root, path):  # since the index was written, that is
            return Sample(key, error="link that leads out of the folder")
        with (root / path).open("rb") as file:
            data = file.read(limit)
    except OSError as problem:
        return Sample(key, error=f"file unreadable: {problem.strerror}")
    extension = Path(path).suffix.lower().removeprefix(".")
    caption, meta = row["caption"], json.loads(row["meta"])
    if not caption and not meta:
        try:
            beside = _beside(root, path, limits["text_bytes"])
        except ValueError as problem:
            return Sample(key, error=str(problem))
        read = finish(Sample(key, {extension: data} | beside))
        if read.error:
            return Sample(key, error=read.error)
        caption, meta = read.caption, read.meta
    return make_sample(key, data, caption, meta, extension)


def _beside(root: Path, path: str, limit: int) -> dict[str, bytes]:
    """The `txt` and `json` of a picture's name, as img2dataset writes them without shards.

    Raises ValueError for one of more than `limit` bytes, or that cannot be read.
    """
    found = {}
    for kind in ("txt", "json"):
        name = f"{os.path.splitext(path)[0]}.{kind}"
        if not (root / name).is_file() or not _inside(root, name):
            continue
        try:
            with (root / name).open("rb") as file:
                found[kind] = file.read(limit + 1)
        except OSError as problem:
            raise ValueError(f"{kind} unreadable: {problem.strerror}") from problem
        if len(found[kind]) > limit:
            raise ValueError(f"{kind} of more than {limit} bytes")
    return found
