"""Databases on the disk, for what is compared or joined over a whole set."""

import shutil
from pathlib import Path

import duckdb


def open_database(path: Path, memory: str) -> duckdb.DuckDBPyConnection:
    """Make the DuckDB file anew. Beyond `memory` ("512MB") it sorts and joins on the disk."""
    spilled = path.with_name(f"{path.name}.spilled")
    path.unlink(missing_ok=True)
    shutil.rmtree(spilled, ignore_errors=True)  # of a process that was killed
    return duckdb.connect(
        str(path),
        config={
            "memory_limit": memory,
            "temp_directory": str(spilled),
            "threads": 1,
            "preserve_insertion_order": False,
            "autoinstall_known_extensions": False,  # nothing is fetched
            "autoload_known_extensions": False,
        },
    )
