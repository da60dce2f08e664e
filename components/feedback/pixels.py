"""Curated pictures as small square arrays, shard by shard, for the critic."""

import io
import tarfile
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from components.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def squared(image: Image.Image, size: int) -> np.ndarray:
    """Picture to uint8 (size, size, 3), squeezed to the square: nothing is cut off."""
    if image.format == "JPEG":
        image.draft("RGB", (2 * size, 2 * size))  # decodes a smaller picture where it can
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BOX))


def shards(curated: Path) -> list[Path]:
    """The shards of a curated set in order. UserError when there are none."""
    found = sorted(Path(curated).glob("*.tar"))
    if not found:
        raise UserError(f"{curated} holds no shards (*.tar); run the curate stage first.")
    return found


def read_shard(
    shard: Path, size: int, wanted: Collection[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (key, uint8 (size, size, 3)) of a shard's pictures, of the `wanted` keys if given.

    Members are read in memory, none is written. UserError names a picture that cannot be
    decoded: curation lets none through, so the shard is damaged.
    """
    with tarfile.open(shard) as archive:
        for member in archive:
            key, _, suffix = Path(member.name).name.partition(".")
            if f".{suffix.lower()}" not in SUFFIXES or not member.isfile():
                continue
            if wanted is not None and key not in wanted:
                continue
            stream = archive.extractfile(member)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", Image.DecompressionBombWarning)
                    assert stream is not None
                    with Image.open(io.BytesIO(stream.read())) as image:
                        pixels = squared(image, size)
            except (OSError, ValueError, Image.DecompressionBombError, Warning) as problem:
                raise UserError(
                    f"{shard}: picture {member.name} cannot be decoded ({problem}); "
                    "run the curate stage again."
                ) from problem
            yield key, pixels
