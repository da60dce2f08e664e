"""Curated pictures as small square arrays, shard by shard, for the critic."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from components.curation.pictures import DamagedPicture, decode
from components.curation.shards import read_shard
from components.errors import UserError


def small_pictures(
    shard: Path, size: int, limits: Mapping[str, int], wanted: Collection[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (key, uint8 (size, size, 3)) of a shard's pictures, of the `wanted` keys if given.

    Squeezed to the square, so that nothing is cut off. `limits` as in curation. UserError
    names what cannot be read: curation lets no such picture through, so the shard is damaged.
    """
    for sample in read_shard(shard, limits):
        if wanted is not None and sample.key not in wanted and not sample.error:
            continue
        try:
            if sample.error:
                raise DamagedPicture(sample.error)
            pixels = decode(sample.members[sample.extension], limits)
        except DamagedPicture as problem:
            raise UserError(
                f"{shard}: picture {sample.key} cannot be read ({problem}); "
                "run the curate stage again."
            ) from problem
        image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BOX)
        yield sample.key, np.asarray(image)
