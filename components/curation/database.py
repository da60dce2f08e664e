"""Databases on the disk, for what is compared or joined over a whole set."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.errors import UserError

Database = Any  # duckdb.DuckDBPyConnection, see open_database


@contextlib.contextmanager
def open_database(folder: Path, memory: str) -> Iterator[Database]:
    """Yield a new DuckDB database in `folder`, which is made anew and removed at the end.

    memory: its limit, e.g. "512MB"; beyond it, it sorts and joins on the disk. Raises UserError
    when that is too little even so.
    """
    # Imported where it is used: of a process that ends with modules still referred to, as the
    # workers of a pool do, it complains on stderr.
    import duckdb

    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir(parents=True)
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": memory,
        "temp_directory": str(folder / "spilled"),
        "threads": 1,
        "preserve_insertion_order": False,
        "autoinstall_known_extensions": False,  # nothing is fetched
        "autoload_known_extensions": False,
    }
    try:
        with duckdb.connect(str(folder / "rows.duckdb"), config=settings) as database:
            yield database
    except duckdb.OutOfMemoryException as problem:
        raise UserError(
            f"{folder} cannot be worked through within {memory}: raise curation.limits.memory "
            "in params/."
        ) from problem
    finally:
        shutil.rmtree(folder, ignore_errors=True)
