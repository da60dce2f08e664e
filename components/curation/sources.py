"""What `curate` reads: webdataset shards, parquet files with pictures, an imagefolder.

The three may lie in one folder, at any depth. Each tar and each parquet file is a unit of work;
the loose pictures are one imagefolder, listed in an index and cut into units of equal size.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from components.curation.folder import open_index, read_folder, walk
from components.curation.shards import Sample, read_shard, safe_key
from components.curation.tables import has_pictures, read_table
from components.errors import UserError
from components.files import hash_of

NAME_LENGTH = 150  # a file name holds 255 bytes, and the passes put their endings behind


@dataclass(frozen=True)
class Unit:
    """A part of the input that becomes one curated shard. Picklable."""

    name: str  # name of the curated shard: letters, digits, - _ . ; unique over the input
    kind: str  # tar | parquet | folder
    path: Path  # the tar, the parquet file; for a folder the imagefolder itself
    part: int = 0  # folder: which row group of the index
    index: Path | None = None  # folder: the index file (parquet)


def find_units(source: Path, index: Path, curation: Mapping[str, Any]) -> list[Unit]:
    """Return the units of everything below the folder `source`, in name order.

    index: where the index of the loose pictures is written, if there are any.
    curation: of it are read `columns` (image, caption, key: names in the order in which they
    are looked for) and of `limits` `shard` (pictures a unit of loose ones), `memory` (the most
    that writing the index takes, "512MB"), `text_bytes` and `batch`.

    Hidden files are passed over. A parquet file without pictures beside a tar of the same stem
    is img2dataset's list and no unit. Files that would give one name twice are numbered.
    Raises UserError when there is no such folder or nothing readable in it.
    """
    source, index = Path(source), Path(index)
    if not source.is_dir():
        raise UserError(f"No folder {source}: name the one that holds the shards or pictures.")
    files: list[tuple[str, str]] = []
    with open_index(index, curation) as rows:
        for found in walk(source):
            path = source / found.path
            if found.kind in ("tar", "parquet"):
                files.append((found.path, found.kind))
            elif found.kind != "metadata":
                rows.add(found)
            elif path.suffix == ".parquet" and has_pictures(path, curation["columns"]["image"]):
                files.append((found.path, "parquet"))
            else:
                rows.list_file(source, found.path)
        if not files and not rows.pictures:
            raise UserError(
                f"Nothing to curate in {source}: put webdataset shards (.tar), parquet files with "
                "pictures, or pictures (.jpg, .png, .webp, .gif, .bmp) there."
            )
        units = _file_units(source, files, curation)
        if rows.filled:
            rows.write()
            with pq.ParquetFile(index) as file:
                parts = file.num_row_groups
            units += [Unit(f"folder-{i:05d}", "folder", source, i, index) for i in range(parts)]
    return _numbered(units)


def _file_units(
    source: Path, files: Sequence[tuple[str, str]], curation: Mapping[str, Any]
) -> list[Unit]:
    """The units of tars and parquet files, given by path below `source` and kind."""
    units = []
    for path, kind in sorted(files):
        tar = (source / path).with_suffix(".tar")
        if kind == "parquet" and tar.is_file() and _is_list(source / path, curation):
            continue
        units.append(Unit(_name(path), kind, source / path))
    return units


def _is_list(table: Path, curation: Mapping[str, Any]) -> bool:
    """Whether the parquet file beside a tar is img2dataset's list of its keys."""
    return not has_pictures(table, curation["columns"]["image"])


def _name(path: str) -> str:
    """The name that a file gives its unit: the path with - for /, without the extension."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", path.rpartition(".")[0].replace("/", "-"))
    if path.isascii() and len(name) <= NAME_LENGTH:
        return name
    return f"{name[:NAME_LENGTH]}-{hashlib.sha256(path.encode()).hexdigest()[:16]}"


def _numbered(units: Sequence[Unit]) -> list[Unit]:
    """The units in name order; the second and further of a name get a number behind it."""
    taken: set[str] = {unit.name for unit in units}
    seen: set[str] = set()
    named = []
    for unit in units:
        name, number = unit.name, 2
        while name in seen or (name != unit.name and name in taken):
            name, number = f"{unit.name}-{number}", number + 1
        seen.add(name)
        named.append(replace(unit, name=name))
    return sorted(named, key=lambda unit: unit.name)


def fingerprint(units: Sequence[Unit]) -> str:
    """Sixteen hex digits that change when a file's name, size or time of change does.

    img2dataset's parquet beside a tar counts as well. Of loose pictures and their captions the
    index knows it all.
    """
    stated: list[Any] = []
    for unit in units:
        files = [unit.path]
        if unit.kind == "tar" and (table := unit.path.with_suffix(".parquet")).is_file():
            files.append(table)
        if unit.kind != "folder":
            states = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
            stated.append([unit.name, unit.kind, states])
    for index in sorted({unit.index for unit in units if unit.index is not None}):
        with index.open("rb") as file:
            stated.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hash_of(stated)


def read_unit(unit: Unit, curation: Mapping[str, Any]) -> Iterator[Sample]:
    """Yield every sample of the unit in order, the unusable ones with `error` set.

    Of a folder or a parquet file a sample has the members that a shard's would have: the
    picture under the extension that its bytes say, `txt` the caption, `json` the other columns.
    Bad data raises nothing; memory holds one sample or `limits.batch` rows at a time.
    """
    try:
        if unit.kind == "tar":
            table = unit.path.with_suffix(".parquet")
            listed = table.is_file() and _is_list(table, curation)
            yield from read_shard(unit.path, curation["limits"], listed)
        elif unit.kind == "parquet":
            yield from read_table(unit.path, safe_key(unit.name), curation)
        elif unit.index is not None:
            yield from read_folder(unit.path, unit.index, unit.part, curation)
    except OSError as problem:
        yield Sample(unit.path.name, error=f"{unit.path.name} unreadable: {problem.strerror}")
