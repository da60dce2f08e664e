"""Exact and near duplicates.

Two pictures are near duplicates when their perceptual hashes (imagehash.phash, DCT of the
luminance) differ in few bits *and* their colour thumbnails are alike: flat scenes that differ
in colour only have near hashes.
"""

from collections.abc import Iterator
from itertools import pairwise

import cv2
import imagehash
import numpy as np
from PIL import Image

HASH_SIDE = 16  # hash of 16 × 16 bits: 8 × 8 takes different flat scenes for the same
HASH_BYTES = HASH_SIDE * HASH_SIDE // 8
THUMB_SIDE = 8
THUMB_BYTES = THUMB_SIDE * THUMB_SIDE * 3


def perceptual_hash(pixels: np.ndarray) -> bytes:
    """Return the 32 bytes of the 256-bit perceptual hash of an RGB picture (H, W, 3)."""
    bits = imagehash.phash(Image.fromarray(pixels), hash_size=HASH_SIDE).hash
    return np.packbits(bits.ravel()).tobytes()


def thumbnail(pixels: np.ndarray) -> bytes:
    """Return the 8 × 8 RGB area means of a picture (H, W, 3), 192 bytes."""
    small = cv2.resize(pixels, (THUMB_SIDE, THUMB_SIDE), interpolation=cv2.INTER_AREA)
    return small.astype(np.uint8).tobytes()


def near_pairs(hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield index arrays (i, j), i < j, of all pairs at Hamming distance ≤ `distance`.

    hashes: uint8 (n, bytes). Exact, without comparing all pairs: of distance + 1 bands that
    share out the bits, two such hashes agree in at least one (pigeonhole), so only hashes that
    share a band's value are compared. A pair may come more than once.
    """
    n, width = hashes.shape
    bits = np.unpackbits(hashes, axis=1)
    for band in np.array_split(np.arange(width * 8), distance + 1):
        _, group = np.unique(np.packbits(bits[:, band], axis=1), axis=0, return_inverse=True)
        order = np.argsort(group, kind="stable")
        starts = np.flatnonzero(np.diff(group[order], prepend=-1, append=n + 1))
        for first, last in pairwise(starts):
            members = order[first:last]
            for row in range(0, len(members) if len(members) > 1 else 0, 512):
                block = members[row : row + 512]
                unlike = hashes[block][:, None, :] ^ hashes[members][None, :, :]
                near = np.bitwise_count(unlike).sum(axis=2, dtype=np.int64) <= distance
                a, b = np.nonzero(near & (block[:, None] < members[None, :]))
                if len(a):
                    yield block[a], members[b]


def near_duplicates(
    hashes: np.ndarray, thumbs: np.ndarray, distance: int, colour: float
) -> dict[int, tuple[int, int]]:
    """Return {index: (index of the earlier picture that is kept, Hamming distance)}.

    hashes: uint8 (n, 32); thumbs: uint8 (n, 192); colour: the most that two thumbnails may
    differ on average, in levels of 255. A picture is compared with kept ones only, in order,
    so that a chain of small steps does not end in nothing.
    """
    rivals: dict[int, set[int]] = {}
    for a, b in near_pairs(hashes, distance):
        alike = np.abs(thumbs[a].astype(np.int16) - thumbs[b]).mean(axis=1) <= colour
        for i, j in zip(a[alike].tolist(), b[alike].tolist(), strict=True):
            rivals.setdefault(j, set()).add(i)
    dropped: dict[int, tuple[int, int]] = {}
    for j in sorted(rivals):
        kept = [i for i in sorted(rivals[j]) if i not in dropped]
        if kept:
            bits = int(np.bitwise_count(hashes[j] ^ hashes[kept[0]]).sum())
            dropped[j] = (kept[0], bits)
    return dropped
