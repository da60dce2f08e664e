"""Parquet tables written and read a stretch at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from components.files import atomic_file

ROWS = 1024  # of a table in memory at a time


class Rows:
    """Writes rows to a parquet file as they come; the file is whole or absent."""

    def __init__(self, path: Path, fields: Sequence[tuple[str, pa.DataType]]) -> None:
        self.schema, self.held = pa.schema(fields), []  # type: ignore[var-annotated]
        self.file = atomic_file(path)

    def __enter__(self) -> Self:
        self.writer = pq.ParquetWriter(self.file.__enter__(), self.schema)
        return self

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows as mappings; missing columns are null, others are left out."""
        self.held += rows
        if len(self.held) >= ROWS:
            self._write()

    def _write(self) -> None:
        self.writer.write_table(pa.Table.from_pylist(self.held, schema=self.schema))
        self.held = []

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None and self.held:
            self._write()
        self.writer.close()
        self.file.__exit__(kind, error, trace)


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
