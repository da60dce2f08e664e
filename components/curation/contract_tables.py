"""The curated set as tables of a SQLite file, so that the contract's memory does not grow with it.

manifest  a row a kept picture: the columns that the contract reads; shorter_side in px and
          aspect_ratio, worked out anew; shard_sha256, of the picture in the shard or null
notions   a row a notion column: notion, type (Arrow's name), captions
pictures  a row a key of a shard: key, shard, sha256 or null, error or null; manifest_sha256, of
          the manifest's row or null

The manifest is read a batch at a time and each shard once; no table is held in memory.
"""

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.curation.shards import read_shard

BATCH = 2048  # rows of the manifest in memory at a time
# SQL's names, which the contract's expectations on types know; other types have no name here.
TYPES = {
    pa.bool_(): "BOOLEAN",
    pa.int16(): "SMALLINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.string(): "TEXT",
}
WORDS = "notion_words"


def fill(
    database: Path, curated: Path, columns: Collection[str], limits: Mapping[str, int]
) -> tuple[int, list[str]]:
    """Write the tables of the folder that `curate` wrote to a new SQLite file.

    columns: the manifest's columns to copy; one that it lacks is lacking in the table too.
    limits: as `read_shard` takes them.
    Returns the manifest's rows and the names of all its columns. Raises OSError or ValueError
    where the manifest cannot be read.
    """
    # Without the buffer of a whole row group, whose size is not ours to choose.
    file = pq.ParquetFile(Path(curated) / "manifest.parquet", pre_buffer=False)
    names = list(file.schema_arrow.names)
    with file, closing(sqlite3.connect(database)) as connection:
        # A file that lives for one run needs no way back.
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        _manifest(connection, file, [n for n in columns if n in names])
        connection.execute("CREATE TABLE pictures (key TEXT, shard TEXT, sha256 TEXT, error TEXT)")
        connection.executemany(
            "INSERT INTO pictures VALUES (?, ?, ?, ?)", _pictures(Path(curated), limits)
        )
        if {"key", "shard", "sha256"} <= {*names}:
            _join(connection)
        connection.commit()
    return file.metadata.num_rows, names


def is_notion(name: str) -> bool:
    """Whether a column of the manifest tells which captions have a notion."""
    return name.startswith("notion_") and name != WORDS


def _manifest(connection: sqlite3.Connection, file: pq.ParquetFile, columns: list[str]) -> None:
    """Copy columns row by row, count the notion columns."""
    schema = file.schema_arrow
    declared = [f'"{n}" {TYPES.get(schema.field(n).type, "")}' for n in columns]
    if {"width", "height"} <= {*columns}:
        # Not from score columns: the thresholds are to hold of the sizes.
        declared.append("shorter_side INTEGER AS (min(width, height))")
        declared.append("aspect_ratio DOUBLE AS (max(width, height) * 1.0 / min(width, height))")
    connection.execute(f"CREATE TABLE manifest ({', '.join(declared)})")
    # Lists and the like have no place in a table; that the column is there is all one can ask.
    plain = [n for n in columns if schema.field(n).type in TYPES]
    notions = [n for n in schema.names if is_notion(n)]
    read = [*dict.fromkeys([*plain, *notions])]
    into = ", ".join(f'"{n}"' for n in plain)
    insert = f"INSERT INTO manifest ({into}) VALUES ({', '.join('?' * len(plain))})"
    captions: Counter[str] = Counter()
    for batch in file.iter_batches(BATCH, columns=read):
        if plain:
            values = (batch.column(n).to_pylist() for n in plain)
            connection.executemany(insert, zip(*values, strict=True))
        for name in notions:
            if schema.field(name).type == pa.bool_():
                captions[name] += pc.sum(batch.column(name)).as_py() or 0
    connection.execute("CREATE TABLE notions (notion TEXT, type TEXT, captions INTEGER)")
    connection.executemany(
        "INSERT INTO notions VALUES (?, ?, ?)",
        ((n, str(schema.field(n).type), captions[n]) for n in notions),
    )


def _pictures(
    curated: Path, limits: Mapping[str, int]
) -> Iterator[tuple[str, str, str | None, str | None]]:
    """Yield key, shard, the picture's SHA-256 and the error of every key in the shards."""
    for shard in sorted(curated.glob("*.tar")):
        for sample in read_shard(shard, limits):
            data = sample.members.get(sample.extension)
            digest = None if data is None else hashlib.sha256(data).hexdigest()
            yield sample.key, shard.stem, digest, sample.error or None


def _join(connection: sqlite3.Connection) -> None:
    """Put beside each row what the other side has under its shard and key."""
    for table in ("manifest", "pictures"):
        connection.execute(f"CREATE INDEX {table}_place ON {table} (shard, key)")
    for table, column, other in (
        ("manifest", "shard_sha256", "pictures"),
        ("pictures", "manifest_sha256", "manifest"),
    ):
        connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} TEXT")
        connection.execute(
            f"UPDATE {table} SET {column} = (SELECT sha256 FROM {other} AS other"
            f" WHERE other.shard = {table}.shard AND other.key = {table}.key)"
        )
    for column in ("key", "sha256"):  # held to be unique
        connection.execute(f"CREATE INDEX manifest_{column} ON manifest ({column})")
