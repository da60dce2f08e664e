"""Curated pictures read one by one from where they lie in their shards."""

import hashlib
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from components.curation.pictures import DamagedPicture, decode
from components.curation.shards import PICTURES
from components.errors import UserError

SUFFIXES = tuple(f".{extension}" for extension in PICTURES)
AGAIN = "run the stage curate again."


def read_manifest(curated: Path) -> pd.DataFrame:
    """The curated set's manifest by shard and key. UserError when missing, empty or damaged.

    The samples of a shard follow one another, as the coverage ledger counts them. The columns of
    single notions are left out: `notion_words` has the same, without a number a notion and sample.
    """
    path = curated / "manifest.parquet"
    try:
        names = pq.read_schema(path).names
        kept = [name for name in names if not name.startswith("notion_") or name == "notion_words"]
        manifest = pd.read_parquet(path, columns=kept)
        manifest = manifest.sort_values(["shard", "key"], kind="stable").reset_index(drop=True)
        manifest[["shard", "caption", "width", "height"]]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); {AGAIN}") from error
    if manifest.empty or manifest["key"].duplicated().any():
        raise UserError(f"{path} is empty or names a key twice; {AGAIN}")
    return manifest


def keys_hash(keys: Iterable[str]) -> str:
    """A short hash of the keys in their order: two tables with the same one go row by row."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key.encode() + b"\n")
    return digest.hexdigest()[:16]


def locate(curated: Path, manifest: pd.DataFrame) -> pd.DataFrame:
    """Where each picture of the manifest lies: shard (file name), offset and size in bytes.

    A row a picture, in the manifest's order. Only the shards' headers are read. UserError for
    a damaged shard and for a picture that is in none.
    """
    row_of = {key: row for row, key in enumerate(manifest["key"].astype(str))}
    offsets, sizes = (np.full(len(manifest), -1, np.int64) for _ in range(2))
    shards = sorted(curated.glob("*.tar"))
    shard = np.zeros(len(manifest), np.int64)
    for number, path in enumerate(shards):
        for key, offset, size in _members(path):
            row = row_of.get(key)
            if row is not None:
                shard[row], offsets[row], sizes[row] = number, offset, size
    missing = manifest["key"][offsets < 0].tolist()
    if missing:
        raise UserError(
            f"{len(missing)} pictures of {curated}/manifest.parquet are in no shard, "
            f"{missing[0]} the first; {AGAIN}"
        )
    names = pd.Categorical.from_codes(shard, categories=pd.Index([path.name for path in shards]))
    return pd.DataFrame({"shard": names, "offset": offsets, "size": sizes})


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Key, offset and size in bytes of each picture in a shard."""
    try:
        with tarfile.open(path) as shard:
            for member in shard:
                key, dot, extension = Path(member.name).name.partition(".")
                if member.isfile() and dot + extension in SUFFIXES:
                    yield key, member.offset_data, member.size
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"The shard {path} is damaged ({error}); {AGAIN}") from error


class CuratedPictures:
    """Random access to a curated set's pictures by their row in the manifest."""

    def __init__(self, curated: Path, manifest: pd.DataFrame, places: pd.DataFrame) -> None:
        """`places` as `locate` gives them, for this manifest."""
        self.curated = curated
        self.keys = manifest["key"].astype(str).to_numpy()
        self.widths = manifest["width"].to_numpy()
        self.heights = manifest["height"].to_numpy()
        self._names = places["shard"].cat.categories
        self._shard = places["shard"].cat.codes.to_numpy()
        self._offset, self._size = places["offset"].to_numpy(), places["size"].to_numpy()
        self._open: tuple[int, BinaryIO] | None = None

    def in_file_order(self) -> np.ndarray:
        """All rows in the order in which they lie on the disk."""
        return np.lexsort((self._offset, self._shard))

    def pixels(self, row: int) -> np.ndarray:
        """A picture (H, W, 3) uint8, turned and on white as curation saw it.

        UserError when it is not what the manifest says.
        """
        data = self._bytes(row)
        width, height = int(self.widths[row]), int(self.heights[row])
        try:
            pixels = decode(data, {"pixels": width * height})
        except DamagedPicture as error:
            raise UserError(
                f"The picture {self.keys[row]} cannot be read ({error}); {AGAIN}"
            ) from error
        if pixels.shape[:2] != (height, width):
            found = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise UserError(
                f"The picture {self.keys[row]} has {found} pixels, {width}x{height} in "
                f"{self.curated}/manifest.parquet; {AGAIN}"
            )
        return pixels

    def _bytes(self, row: int) -> bytes:
        shard, size = int(self._shard[row]), int(self._size[row])
        path = self.curated / self._names[shard]
        try:
            if self._open is None or self._open[0] != shard:
                self.close()
                self._open = (shard, path.open("rb"))
            self._open[1].seek(int(self._offset[row]))
            data = self._open[1].read(size)
        except OSError as error:
            raise UserError(f"The shard {path} cannot be read ({error}); {AGAIN}") from error
        if len(data) < size:
            raise UserError(f"The shard {path} is cut off at {self.keys[row]}; {AGAIN}")
        return data

    def close(self) -> None:
        """Close the shard that is open, if any."""
        if self._open is not None:
            self._open[1].close()
            self._open = None
