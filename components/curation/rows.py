"""Parquet tables written and read a stretch at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.files import atomic_file

ROWS = 1024  # of a table in memory at a time


class Rows:
    """Writes rows to a parquet file as they come."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self.writer = writer
        self.held: list[Mapping[str, Any]] = []

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows as mappings; missing columns are null, others are left out."""
        self.held += rows
        if len(self.held) >= ROWS:
            self.write()

    def write(self) -> None:
        """Write what is held."""
        self.writer.write_table(pa.Table.from_pylist(self.held, schema=self.writer.schema))
        self.held = []


@contextmanager
def write_rows(path: Path, fields: Sequence[tuple[str, pa.DataType]]) -> Iterator[Rows]:
    """Yield what takes the rows of a new parquet file, which is whole or absent."""
    with (
        atomic_file(path) as temporary,
        pq.ParquetWriter(temporary, pa.schema(fields)) as writer,
    ):
        rows = Rows(writer)
        yield rows
        if rows.held:
            rows.write()


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield a table's rows as dictionaries, in order, a stretch of it in memory at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS, columns=columns):
            yield from batch.to_pylist()


def in_batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` items, the last one shorter."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
