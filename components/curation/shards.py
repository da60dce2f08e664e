"""Webdataset shards (img2dataset's layout) read without trust and written without chance.

A shard is a hostile file: nothing is extracted to disk, only regular members with plain names
and a size below the limits are read, and a damaged stretch costs what lies in it, not what
comes after it. `tarfile`'s reader stops without a word at a broken header, so the blocks are
walked here (POSIX ustar: a 512-byte header, data padded to 512 bytes).
"""

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from components.errors import UserError

BLOCK = 512
PICTURES = ("jpg", "jpeg", "png", "webp")
NAME = re.compile(r"^([A-Za-z0-9_-][A-Za-z0-9_.-]*?)\.([A-Za-z0-9]{1,8})$")
LONG_NAME_BYTES = 65536


@dataclass
class Sample:
    """One key of a shard: its members as bytes, and why it cannot be used if so."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    error: str = ""  # empty: readable
    caption: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def extension(self) -> str:
        """The picture member's extension, or an empty string."""
        return next((e for e in PICTURES if e in self.members), "")


def list_shards(folder: Path) -> list[Path]:
    """Return the folder's `*.tar` in name order. Raises UserError when there is none."""
    folder = Path(folder)
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise UserError(f"No shard in {folder}: put webdataset files (00000.tar, …) there.")
    for shard in shards:
        if not NAME.match(shard.name):
            raise UserError(f"Shard name {shard.name!r} in {folder}: use letters, digits, - and _.")
    return shards


def read_shard(path: Path, limits: Mapping[str, int]) -> Iterator[Sample]:
    """Yield every key of the shard in file order, the unusable ones with `error` set.

    limits: `picture_bytes` and `text_bytes`, the most a member may hold. Damaged stretches
    come as samples whose key names the place (`@offset`), keys of the parquet beside the shard
    that the tar lacks as samples with no members, so that nothing is lost without a line.
    """
    seen: set[str] = set()
    group: Sample | None = None
    for name, data, error in _members(Path(path), limits):
        match = NAME.match(name)
        if match is None:
            yield Sample(key=name[:80] or "@", error=error or f"member name {name[:80]!r} refused")
            continue
        key, extension = match.group(1), match.group(2).lower()
        if group is None or key != group.key:
            if group is not None:
                yield _finish(group)
            group = Sample(key=key, error=f"key {key} repeats in the shard" if key in seen else "")
            seen.add(key)
        if extension in group.members:
            error = error or f"member {name} repeats"
        group.error = group.error or error
        if not error:
            group.members[extension] = data
    if group is not None:
        yield _finish(group)
    yield from (s for s in _listed(Path(path).with_suffix(".parquet")) if s.key not in seen)


def _finish(sample: Sample) -> Sample:
    """Parse caption and JSON; set `error` on what does not parse."""
    if sample.error:
        return sample
    if not sample.extension:
        sample.error = "no picture member (" + ", ".join(PICTURES) + ")"
        return sample
    try:
        meta = json.loads(sample.members.get("json", b"{}"))
        caption = sample.members["txt"].decode() if "txt" in sample.members else ""
    except (ValueError, RecursionError) as problem:
        sample.error = f"caption or JSON does not parse: {str(problem)[:120]}"
        return sample
    if not isinstance(meta, dict):
        sample.error = "JSON member is not an object"
        return sample
    listed = meta.get("caption")
    sample.meta = meta
    sample.caption = (caption or (listed if isinstance(listed, str) else "")).strip()
    return sample


def _listed(table: Path) -> Iterator[Sample]:
    """Yield the keys that img2dataset's parquet lists, as samples that lack their members."""
    if not table.is_file():
        return
    try:
        file = pq.ParquetFile(table)
        names = [n for n in ("key", "error_message") if n in file.schema_arrow.names]
        rows = file.read(columns=names).to_pylist() if "key" in names else []
    except (OSError, ValueError) as problem:
        yield Sample(key=table.name, error=f"parquet beside the shard unreadable: {problem}")
        return
    for row in rows:
        why = row.get("error_message") or "listed in the shard's parquet, absent from the tar"
        yield Sample(key=str(row["key"])[:80], error=str(why)[:200])


def _members(path: Path, limits: Mapping[str, int]) -> Iterator[tuple[str, bytes, str]]:
    """Yield (name, data, error) for each member; a name starting with @ is a damaged stretch."""
    size = path.stat().st_size
    long_name, damaged_from = "", -1
    if not size:
        yield "@0", b"", "the shard is an empty file"
    with path.open("rb") as file:
        at = 0
        while at + BLOCK <= size:
            file.seek(at)
            header = file.read(BLOCK)
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
            except tarfile.HeaderError:
                if header.strip(b"\0") and damaged_from < 0:
                    damaged_from = at
                at += BLOCK
                continue
            if damaged_from >= 0:
                yield f"@{damaged_from}", b"", f"{at - damaged_from} damaged bytes in the shard"
                damaged_from = -1
            start, end = at + BLOCK, at + BLOCK + max(info.size, 0)
            at = start + -(-max(info.size, 0) // BLOCK) * BLOCK
            if info.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
                extra = file.read(min(info.size, LONG_NAME_BYTES))
                long_name = _long_name(extra, info.type)
                continue
            if info.type in (tarfile.XGLTYPE, tarfile.DIRTYPE):
                continue
            name, long_name = long_name or info.name, ""
            text = name.lower().endswith((".txt", ".json"))
            limit = limits["text_bytes" if text else "picture_bytes"]
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                yield name, b"", f"member {name[:80]} is a link or a special file"
            elif end > size:
                yield name, b"", f"member {name[:80]} is cut off by the shard's end"
            elif info.size > limit:
                yield name, b"", f"member {name[:80]} has {info.size} bytes, limit {limit}"
            else:
                yield name, file.read(info.size), ""
    if damaged_from >= 0:
        yield f"@{damaged_from}", b"", f"{size - damaged_from} damaged bytes in the shard"
    elif size % BLOCK and at < size:
        yield f"@{at}", b"", f"shard ends inside a block, {size - at} bytes left over"


def _long_name(extra: bytes, kind: bytes) -> str:
    """Return the name that a GNU long-name or a pax header gives the next member, or ''."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return extra.rstrip(b"\0").decode("utf-8", "replace")
    found = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", extra)
    return found.group(1).decode("utf-8", "replace") if found else ""


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write (key, members) as a tar whose bytes depend on them alone: no time, no owner."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
