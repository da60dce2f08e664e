"""Webdataset shards (img2dataset's layout) read without trust and written without chance.

A shard is a hostile file: nothing is extracted to disk, only regular members with plain names
and a size below the limits are read, and a damaged stretch costs what lies in it, not what
comes after it. `tarfile`'s reader stops without a word at a broken header, so the blocks are
walked here (POSIX ustar: a 512-byte header, data padded to 512 bytes).
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from components.errors import UserError

BLOCK = 512
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
NAME = re.compile(r"^([A-Za-z0-9_-][A-Za-z0-9_.-]*?)\.([A-Za-z0-9]{1,8})$")
KEY_LENGTH = 90  # a ustar header holds names of 100 bytes
MAGIC, MAGIC_AT = b"ustar", 257  # in every header but those of the seventies
LONG_NAME = "././@LongLink"
LONG_NAME_BYTES = 65536
SCAN_BYTES = 1 << 20
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
# Their size field, if any, is not followed by data.
WITHOUT_DATA = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)  # fmt: skip
# What pyarrow raises on damaged bytes.
BROKEN = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError)


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


def safe_key(text: object) -> str:
    """Return a key of letters, digits, - and _, at most 90 of them, that a shard's names can hold.

    Every other character becomes _. A text that is too long, or not ASCII, gets a hash of itself
    behind it, so that two such texts do not fall together.
    """
    text = str(text)
    key = re.sub(r"[^A-Za-z0-9_-]", "_", text)
    if text.isascii() and 0 < len(key) <= KEY_LENGTH:
        return key
    digits = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{key[: KEY_LENGTH - 17]}-{digits}"


def read_shard(path: Path, limits: Mapping[str, int], listed: bool = True) -> Iterator[Sample]:
    """Yield every key of the shard in file order, the unusable ones with `error` set.

    limits: `picture_bytes` and `text_bytes`, the most a member may hold.
    listed: whether the parquet beside the shard is img2dataset's list of its keys.

    Damaged stretches come as samples whose key names the place (`@offset`), keys that the list
    has and the tar lacks as samples with no members, so that nothing is lost without a line. A
    key of the tar that the list lacks is a sample like any other: its bytes are there. A dot in
    a key becomes _, because readers of shards end the key at the first dot. Where a key or a
    member repeats, the first is the one that counts.
    """
    seen: set[str] = set()
    group: Sample | None = None
    for name, data, error in _members(Path(path), limits):
        match = NAME.match(name)
        if match is None:
            yield Sample(key=name[:80] or "@", error=error or f"member name {name[:80]!r} refused")
            continue
        key, extension = safe_key(match.group(1)), match.group(2).lower()
        if group is None or key != group.key or extension in group.members:
            if group is not None:
                yield finish(group)
            group = Sample(key=key, error=f"key {key} repeats in the shard" if key in seen else "")
            seen.add(key)
        group.error = group.error or error
        if not error:
            group.members[extension] = data
    if group is not None:
        yield finish(group)
    if listed:
        table = Path(path).with_suffix(".parquet")
        yield from (s for s in _listed(table) if s.key not in seen)


def finish(sample: Sample) -> Sample:
    """Parse caption and JSON; set `error` on what does not parse."""
    if sample.error:
        return sample
    if not sample.extension:
        sample.error = "no picture member (" + ", ".join(PICTURES) + ")"
        return sample
    try:
        meta = json.loads(sample.members.get("json", b"{}"))
        # Half of a surrogate pair may be written in JSON, but in no table.
        json.dumps(meta, ensure_ascii=False).encode()
        caption = sample.members.get("txt", b"").decode("utf-8-sig")
    except (ValueError, RecursionError) as problem:
        sample.error = f"caption or JSON does not parse: {str(problem)[:120]}"
        return sample
    if not isinstance(meta, dict):
        sample.error = "JSON member is not an object"
        return sample
    listed = meta.get("caption")
    sample.meta = meta
    sample.caption = (caption.strip() or (listed if isinstance(listed, str) else "")).strip()
    return sample


def _listed(table: Path) -> Iterator[Sample]:
    """Yield the keys that img2dataset's parquet lists, as samples that lack their members."""
    if not table.is_file():
        return
    try:
        with pq.ParquetFile(table) as file:
            names = [n for n in ("key", "error_message") if n in file.schema_arrow.names]
            if "key" not in names:
                return
            for batch in file.iter_batches(columns=names):
                for row in batch.to_pylist():
                    why = row.get("error_message") or "in the shard's parquet, absent from the tar"
                    yield Sample(key=safe_key(row["key"]), error=str(why)[:200])
    except BROKEN as problem:
        words = str(problem)[:160]
        yield Sample(key=table.name, error=f"parquet beside the shard unreadable: {words}")


def _members(path: Path, limits: Mapping[str, int]) -> Iterator[tuple[str, bytes, str]]:
    """Yield (name, data, error) for each member; a name starting with @ is a damaged stretch."""
    size = path.stat().st_size
    if not size:
        yield "@0", b"", "the shard is an empty file"
    long_name, gnu, at = "", False, 0
    with path.open("rb") as file:
        while at < size:
            file.seek(at)
            header = file.read(BLOCK)
            if not header.strip(b"\0"):
                long_name, at = "", at + BLOCK
                continue
            info = _parse(header)
            if info is None:
                # The place that follows may be shifted, where bytes were lost or put in.
                after = _next_header(file, at + 1, size)
                yield f"@{at}", b"", f"{after - at} damaged bytes in the shard"
                long_name, at = "", after
                continue
            start = at + BLOCK
            end = start + (0 if info.type in WITHOUT_DATA else info.size)
            padded = start + -(-(end - start) // BLOCK) * BLOCK
            # A wrong size must not swallow the members that come after this one.
            at = _next_header(file, start, min(padded, size))
            if info.type in (*PAX, tarfile.GNUTYPE_LONGNAME):
                file.seek(start)
                extra = file.read(min(info.size, LONG_NAME_BYTES, max(at - start, 0)))
                long_name, gnu = _long_name(extra, info), info.type == tarfile.GNUTYPE_LONGNAME
                continue
            if info.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
                # What is called so may stand between a long name and its member; a member that
                # was damaged into one of these takes its name along.
                long_name = long_name if info.name == LONG_NAME else ""
                continue
            if gnu and not long_name.startswith(_name_field(header)):
                long_name = ""  # of a member that was lost: its own bears its beginning
            name, long_name = (long_name or info.name).removeprefix("./"), ""
            if info.type == tarfile.DIRTYPE:
                continue
            text = name.lower().endswith((".txt", ".json"))
            limit = limits["text_bytes" if text else "picture_bytes"]
            if info.type not in REGULAR:
                yield name, b"", f"member {name[:80]} is a link or a special file"
            elif end > size and at >= size:
                yield name, b"", f"member {name[:80]} is cut off by the shard's end"
            elif at < end:
                yield name, b"", f"member {name[:80]} runs into the next one"
            elif info.size > limit:
                yield name, b"", f"member {name[:80]} has {info.size} bytes, limit {limit}"
            else:
                file.seek(start)
                yield name, file.read(info.size), ""


def _parse(header: bytes) -> tarfile.TarInfo | None:
    """The header of a member, or None for bytes that are none."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
    except tarfile.HeaderError:
        return None
    return info if info.size >= 0 else None


def _next_header(file: BinaryIO, start: int, end: int) -> int:
    """Offset of the first header that begins in [start, end), on any byte; `end` without one."""
    at = start
    while at < end:
        file.seek(at)
        chunk = file.read(min(SCAN_BYTES, end - at) + BLOCK)
        place = chunk.find(MAGIC, MAGIC_AT)
        while place >= 0:
            begin = place - MAGIC_AT
            if at + begin >= end:
                return end
            if _parse(chunk[begin : begin + BLOCK]) is not None:
                return at + begin
            place = chunk.find(MAGIC, place + 1)
        at += SCAN_BYTES
    return end


def _name_field(header: bytes) -> str:
    return header[:100].split(b"\0")[0].decode("ascii", "replace")


def _long_name(extra: bytes, info: tarfile.TarInfo) -> str:
    """Return the name that a GNU long-name or a pax header gives the next member, or ''."""
    if info.type == tarfile.GNUTYPE_LONGNAME:
        # A member whose kind was damaged into this one has a name of its own.
        own = info.name == LONG_NAME
        return extra.rstrip(b"\0").decode("utf-8", "replace") if own else ""
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
