"""Exact and near duplicates, in sets of any size.

Two pictures are near duplicates when their perceptual hashes (imagehash.phash, DCT of the
luminance) differ in few bits *and* their colour thumbnails are alike: flat scenes that differ
in colour only have near hashes. All pictures are compared with each other, so what is needed
of each lies in a database on the disk (database.py), which sorts and joins within a limit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import imagehash
import numpy as np
import pyarrow as pa
from PIL import Image

from components.curation.database import Database

HASH_SIDE = 16  # hash of 16 × 16 bits: 8 × 8 takes different flat scenes for the same
HASH_BYTES = HASH_SIDE * HASH_SIDE // 8
THUMB_SIDE = 8
THUMB_BYTES = THUMB_SIDE * THUMB_SIDE * 3
GROUP = 8192  # rows of a stretch of the table of repeats, of which one is read at a time
WORDS = HASH_BYTES // 8  # 64-bit words of a hash


def perceptual_hash(pixels: np.ndarray) -> bytes:
    """Return the 32 bytes of the 256-bit perceptual hash of an RGB picture (H, W, 3)."""
    bits = imagehash.phash(Image.fromarray(pixels), hash_size=HASH_SIDE).hash
    return np.packbits(bits.ravel()).tobytes()


def thumbnail(pixels: np.ndarray) -> bytes:
    """Return the 8 × 8 RGB area means of a picture (H, W, 3), 192 bytes."""
    small = cv2.resize(pixels, (THUMB_SIDE, THUMB_SIDE), interpolation=cv2.INTER_AREA)
    return small.astype(np.uint8).tobytes()


def bands(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Cut each hash into distance + 1 bands: uint8 (n, 32) -> uint32 (n, distance + 1).

    Two hashes that differ in at most `distance` bits agree in at least one band (pigeonhole).
    Of a band longer than 32 bits the first 32 are taken, which agree too.
    """
    bits = np.unpackbits(hashes, axis=1).astype(np.uint32)
    out = np.zeros((len(hashes), distance + 1), np.uint32)
    for number, places in enumerate(np.array_split(np.arange(bits.shape[1]), distance + 1)):
        places = places[:32]
        out[:, number] = bits[:, places] @ (np.uint32(1) << np.arange(len(places), dtype=np.uint32))
    return out


class Comparison:
    """Compares the pictures added to it, in the order they were added; the first one stays.

    database: where they lie, empty. distance: most bits of 256 that near duplicates differ in.
    """

    def __init__(self, database: Database, distance: int) -> None:
        self.db, self.distance, self.count = database, distance, 0
        words = ", ".join(f"h{i} ubigint" for i in range(WORDS))
        cuts = ", ".join(f"b{i} uinteger" for i in range(distance + 1))
        self.db.execute(
            f"create table seen (id bigint, unit varchar, row bigint, key varchar, sha256 varchar, "
            f"thumb blob, {words}, {cuts})"
        )
        self.db.execute("create table repeats (id bigint, kind varchar, first bigint, bits int)")

    def add(
        self,
        unit: str,
        rows: Sequence[int],
        keys: Sequence[str],
        shas: Sequence[str],
        hashes: Sequence[bytes],
        thumbs: Sequence[bytes],
    ) -> None:
        """Add pictures of one unit: places in it, keys, SHA-256 in hex, hashes, thumbnails."""
        if not keys:
            return
        whole = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH_BYTES)
        columns: dict[str, Any] = {
            "id": np.arange(self.count, self.count + len(keys)),
            "unit": [unit] * len(keys),
            "row": list(rows),
            "key": list(keys),
            "sha256": list(shas),
            "thumb": list(thumbs),
        }
        for number, word in enumerate(whole.view(np.uint64).T):
            columns[f"h{number}"] = np.ascontiguousarray(word)
        for number, band in enumerate(bands(whole, self.distance).T):
            columns[f"b{number}"] = np.ascontiguousarray(band)
        self.db.register("part", pa.table(columns))
        self.db.execute("insert into seen by name select * from part")
        self.db.unregister("part")
        self.count += len(keys)

    def find(self, colour: float) -> None:
        """Find what repeats an earlier picture's key, its bytes, or nearly its look.

        colour: the most that two thumbnails may differ on average, in levels of 255. Each
        kind is looked for among what the one before left. A near duplicate is compared with
        kept pictures only, so that a chain of small steps does not end in nothing. Memory:
        DuckDB's limit and a byte a picture.
        """
        for kind in ("key", "sha256"):
            self.db.execute(
                f"insert into repeats select id, '{kind}', first, 0 from (select id, "
                f"first_value(id) over same as first from seen anti join repeats using (id) "
                f"window same as (partition by {kind} order by id)) where first != id"
            )
        self.db.execute("create table rest as select * from seen anti join repeats using (id)")
        self.db.execute("create table pairs (i bigint, j bigint, bits int)")
        bits = " + ".join(f"bit_count(xor(a.h{i}, b.h{i}))::int" for i in range(WORDS))
        for number in range(self.distance + 1):
            self.db.execute(
                f"insert into pairs select a.id, b.id, {bits} as bits from rest a join rest b "
                f"on a.b{number} = b.b{number} and a.id < b.id where bits <= {self.distance}"
            )
        self._drop_near(colour)

    def _drop_near(self, colour: float) -> None:
        found = self.db.sql(
            "select p.i, p.j, p.bits, a.thumb as ti, b.thumb as tj from "
            "(select distinct i, j, bits from pairs) p join rest a on a.id = p.i "
            "join rest b on b.id = p.j order by p.j, p.i"
        ).to_arrow_reader(4096)
        dropped = np.zeros(self.count, bool)
        near: dict[str, list[Any]] = {"id": [], "first": [], "bits": []}
        for batch in found:
            ti, tj = (
                np.frombuffer(b"".join(batch[name].to_pylist()), np.uint8).reshape(-1, THUMB_BYTES)
                for name in ("ti", "tj")
            )
            alike = np.abs(ti.astype(np.int16) - tj).mean(axis=1) <= colour
            pairs = zip(*(batch[n].to_numpy()[alike].tolist() for n in "ij"), strict=True)
            for (i, j), bits in zip(pairs, batch["bits"].to_numpy()[alike].tolist(), strict=True):
                if not dropped[i] and not dropped[j]:
                    dropped[j] = True
                    near["id"].append(j)
                    near["first"].append(i)
                    near["bits"].append(bits)
        self.db.register("near", pa.table(near))
        self.db.execute("insert into repeats select id, 'near', first, bits from near")
        self.db.unregister("near")

    def write(self, path: Path) -> None:
        """Write the repeats as parquet: unit, row, kind (key, sha256, near), first (key), bits."""
        self.db.execute(
            "copy (select s.unit, s.row, r.kind, f.key as first, r.bits from repeats r "
            "join seen s on s.id = r.id join seen f on f.id = r.first order by r.id) "
            f"to '{path}' (format parquet, row_group_size {GROUP})"
        )
