"""Damaged inputs by the thousand: nothing crashes, nothing sound is lost, nothing is written.

Each input is a sound file with one region changed. What lies wholly outside the region must
come back as it was.
"""

import io
import itertools
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from components.curation.metadata import read_metadata
from components.curation.pictures import DamagedPicture, decode
from components.curation.shards import BLOCK, Sample, safe_key, write_shard
from components.curation.sources import Unit, find_units, read_unit

LIMITS = {"picture_bytes": 1 << 14, "text_bytes": 2048, "pixels": 1 << 14, "batch": 3}
CURATION: dict[str, Any] = {
    "columns": {"image": ["image"], "caption": ["text"], "key": ["key"]},
    "limits": LIMITS | {"shard": 4, "memory": "256MB"},
}
# Inputs of each kind; the short run is for every day.
SHORT = {"tar": 200, "picture": 150, "parquet": 60, "lines": 80, "folder": 10}
FULL = {"tar": 4000, "picture": 4000, "parquet": 1000, "lines": 1500, "folder": 100}
KINDS = list(SHORT)


@dataclass
class Edit:
    """One change to a file: where (a share of it), how much, and with what."""

    how: str
    place: float
    size: int
    payload: bytes

    def region(self, length: int) -> tuple[int, int]:
        """The bytes that are touched."""
        start = int(self.place * length)
        if self.how == "insert":
            return start, start
        return (
            (start, length) if self.how == "truncate" else (start, min(start + self.size, length))
        )

    def __call__(self, data: bytes) -> bytes:
        start, end = self.region(len(data))
        old = data[start:end]
        new = {
            "replace": (self.payload * (len(old) // max(len(self.payload), 1) + 1))[: len(old)],
            "flip": bytes(
                b ^ (1 << (self.size % 8)) if i % 7 == 0 else b for i, b in enumerate(old)
            ),
            "zero": b"\0" * len(old),
            "cut": b"",
            "truncate": b"",
            "insert": self.payload,
            "double": old + old,
        }[self.how]
        return data[:start] + new + data[end:]


HOWS = ["replace", "flip", "zero", "cut", "truncate", "insert", "double"]
edits = st.builds(
    Edit,
    how=st.sampled_from(HOWS),
    place=st.floats(0, 1, exclude_max=True),
    size=st.one_of(st.integers(1, 8), st.integers(1, 2000)),
    payload=st.binary(min_size=1, max_size=600),
)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


PNG = encoded(picture(0), "PNG")


# ---- tars


@dataclass
class Tar:
    """A sound tar: its bytes, where each sample lies, where each header does."""

    data: bytes
    spans: dict[str, tuple[int, int]]
    headers: list[int]
    members: dict[str, dict[str, bytes]]


def sound_tar(form: int) -> Tar:
    keys = ["000", "001", "a-b", "003", "004"]
    if form != tarfile.USTAR_FORMAT:
        keys[2:2] = ["long" * 30, "x.y"]
    data, spans, headers, members = b"", {}, [], {}
    for i, key in enumerate(keys):
        start = len(data)
        parts = {"png": encoded(picture(i), "PNG"), "txt": f"caption {i}".encode(), "json": b"{}"}
        members[safe_key(key)] = parts
        for extension, content in parts.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(content)
            blocks = info.tobuf(form)
            headers.append(len(data) + len(blocks) - BLOCK)
            data += blocks + content + b"\0" * (-len(content) % BLOCK)
        spans[safe_key(key)] = (start, len(data))
    return Tar(data + b"\0" * 2 * BLOCK, spans, headers, members)


LONG = safe_key("long" * 30)
TARS = [sound_tar(f) for f in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
FIELDS = {"name": (0, 100), "size": (124, 12), "kind": (156, 1), "link": (157, 100),
          "magic": (257, 8), "prefix": (345, 155), "mode": (100, 24)}  # fmt: skip
VALUES = [b"../x.png", b"/etc/passwd", b"000.png", b"004.txt", b"a/b.png", b"77777777777\0",
          b"\xff" * 12, b"\x80" + b"\xff" * 11, b"00000002000\0", b"00000000000\0",
          b"-0000000001\0", b"L", b"K", b"x", b"g", b"S", b"5", b"2", b"6", b"X",
          b"\0"]  # fmt: skip
header_edits = st.tuples(
    st.sampled_from(sorted(FIELDS)),
    st.one_of(st.sampled_from(VALUES), st.binary(max_size=40)),
    st.booleans(),
)


def edit_header(data: bytes, at: int, change: tuple[str, bytes, bool]) -> bytes:
    """The tar with one field of a header changed; the checksum made to fit, if so wanted."""
    field, value, fits = change
    header = bytearray(data[at : at + BLOCK])
    start, length = FIELDS[field]
    header[start : start + length] = value[:length].ljust(length, b"\0")
    if fits:
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + BLOCK :]


def check_tar(folder: Path) -> Callable[..., None]:
    @given(st.sampled_from(TARS), st.one_of(edits, st.tuples(st.integers(0, 99), header_edits)))
    def check(tar: Tar, change: Edit | tuple[int, tuple[str, bytes, bool]]) -> None:
        if isinstance(change, Edit):
            (low, high), data = change.region(len(tar.data)), change(tar.data)
        else:
            low = tar.headers[change[0] % len(tar.headers)]
            high, data = low + BLOCK, edit_header(tar.data, low, change[1])
        (folder / "0.tar").write_bytes(data)
        samples = list(read_unit(Unit("0", "tar", folder / "0.tar"), CURATION))
        plain(samples)
        repeated = {s.key for s in samples if "repeats" in s.error}
        whole = {s.key: s for s in samples if not s.error}
        for key, (start, end) in tar.spans.items():
            # A name may have been changed into that of a sample: then two claim it. A pax header
            # whose own member is lost names the next one: nothing tells whose it was.
            pax = tar is TARS[2] and key == "x_y" and high > tar.spans[LONG][0]
            if (end <= low or start >= high) and key not in repeated and not pax:
                assert whole[key].members == tar.members[key], key

    return check


def plain(samples: list[Sample]) -> None:
    """Assert that the samples can go into tables and shards."""
    for sample in samples:
        "".join((sample.key, sample.error, sample.caption)).encode()
        json.dumps(sample.meta, ensure_ascii=False).encode()
        assert sample.error or (safe_key(sample.key) == sample.key and sample.extension)


# ---- pictures


def sound_pictures() -> Iterator[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, mode in itertools.product(
        ("PNG", "JPEG", "WEBP", "GIF", "BMP"), ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")
    ):
        image = picture(1, "L").convert("I").convert("I;16") if mode == "I;16" else picture(1, mode)
        try:
            yield (
                encoded(image, kind, exif=exif) if kind in ("PNG", "JPEG") else encoded(image, kind)
            )
        except (OSError, ValueError):
            continue  # this format has no such mode
    for kind in ("GIF", "PNG", "WEBP", "MPO"):
        yield encoded(picture(2), kind, save_all=True, append_images=[picture(3), picture(4)])
    yield encoded(picture(5), "JPEG", progressive=True)
    yield encoded(picture(5), "WEBP", lossless=True)
    yield encoded(picture(5, "RGBA").quantize(8), "PNG", transparency=2)


def mend_png(data: bytes) -> bytes:
    """The PNG with checksums that fit, so that a change is not found by them."""
    at, out = 8, data[:8]
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        out += data[at:end] + zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return out + data[at:]


def check_picture(folder: Path) -> Callable[..., None]:
    @given(st.sampled_from(list(sound_pictures())), edits, st.booleans())
    def check(data: bytes, edit: Edit, mend: bool) -> None:
        data = edit(data)
        if mend and data.startswith(b"\x89PNG\r\n\x1a\n"):
            data = mend_png(data)
        try:
            pixels = decode(data, LIMITS)
        except DamagedPicture as problem:
            assert str(problem)
            return
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        assert 0 < pixels.shape[0] * pixels.shape[1] <= LIMITS["pixels"]

    return check


# ---- parquet files


def sound_tables() -> Iterator[bytes]:
    rows = {
        "key": [f"k{i}" for i in range(6)],
        "image": [{"bytes": encoded(picture(i), "PNG"), "path": None} for i in range(6)],
        "text": [f"caption {i}" for i in range(6)],
        "synthetic": [False] * 6,
        "error_message": [None] * 6,
    }
    for packing, dictionary in itertools.product(("none", "snappy", "zstd"), (True, False)):
        buffer = io.BytesIO()
        table = pa.table(rows)
        pq.write_table(table, buffer, 2, compression=packing, use_dictionary=dictionary)
        yield buffer.getvalue()


def check_parquet(folder: Path) -> Callable[..., None]:
    write_shard(folder / "0.tar", [("k0", {"png": PNG})])

    @given(st.sampled_from(list(sound_tables())), edits)
    def check(data: bytes, edit: Edit) -> None:
        (folder / "0.parquet").write_bytes(edit(data))
        samples = list(read_unit(Unit("0", "parquet", folder / "0.parquet"), CURATION))
        plain(samples)
        beside = list(read_unit(Unit("0", "tar", folder / "0.tar"), CURATION))
        plain(beside)
        assert beside[0].key == "k0" and beside[0].members == {"png": PNG}

    return check


# ---- metadata


ROWS = [(f"p{i}.png", f'a "{i}" of, {i}') for i in range(8)]
LINES = {
    "jsonl": [json.dumps({"file_name": n, "text": t}).encode() + b"\n" for n, t in ROWS],
    "csv": [b"file_name,text\n"]
    + ['{},"{}"\r\n'.format(n, t.replace('"', '""')).encode() for n, t in ROWS],
}


def check_lines(folder: Path) -> Callable[..., None]:
    @given(st.sampled_from(sorted(LINES)), edits)
    def check(kind: str, edit: Edit) -> None:
        lines = LINES[kind]
        head = len(lines[0]) if kind == "csv" else 0
        body = b"".join(lines)[head:]
        low, high = edit.region(len(body))
        (folder / f"metadata.{kind}").write_bytes(b"".join(lines)[:head] + edit(body))
        rows = list(read_metadata(folder, f"metadata.{kind}", CURATION))
        for row in rows:
            "".join((row.path, row.place, row.caption, row.error)).encode()
            assert isinstance(json.loads(row.meta), dict)
            assert not row.path.startswith("/") and ".." not in row.path.split("/")
        found = {(row.path, row.caption) for row in rows if not row.error}
        at = 0
        for (name, caption), line in zip(ROWS, lines[bool(head) :], strict=True):
            # What is put in front of a line, or takes the end of the line before, changes it.
            if at + len(line) <= low or at > high:
                assert (name, caption) in found, rows
            at += len(line)

    return check


def check_folder(folder: Path) -> Callable[..., None]:
    (folder / "in").mkdir()
    for name, _ in ROWS:
        (folder / "in" / name).write_bytes(PNG)

    @given(st.sampled_from(sorted(LINES)), edits)
    def check(kind: str, edit: Edit) -> None:
        for other in LINES:
            (folder / "in" / f"metadata.{other}").unlink(missing_ok=True)
        (folder / "in" / f"metadata.{kind}").write_bytes(edit(b"".join(LINES[kind])))
        units = find_units(folder / "in", folder / "index.parquet", CURATION)
        samples = [s for unit in units for s in read_unit(unit, CURATION)]
        plain(samples)
        # Every picture is a sample, with an error or without.
        assert {s.key for s in samples} >= {name[:-4] for name, _ in ROWS}

    return check


CHECKS = {
    "tar": check_tar,
    "picture": check_picture,
    "parquet": check_parquet,
    "lines": check_lines,
    "folder": check_folder,
}
WRITTEN = {"0.tar", "0.parquet", "in", "index.parquet", "metadata.jsonl", "metadata.csv"}


def run(kind: str, count: int, folder: Path) -> None:
    """Check `count` inputs of the kind, the same ones each time; look for strange files."""
    work = folder / "work"
    work.mkdir()
    rules = settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    tried = rules(CHECKS[kind](work))
    tried()
    assert [p.name for p in folder.iterdir()] == ["work"]
    assert {p.name for p in work.iterdir()} <= WRITTEN


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs(kind: str, tmp_path: Path) -> None:
    run(kind, SHORT[kind], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_inputs(kind: str, tmp_path: Path) -> None:
    run(kind, FULL[kind], tmp_path)
