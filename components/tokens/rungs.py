"""Resolution rungs: the sizes that pictures are encoded at, and which pictures reach them."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from components.errors import UserError


def rung_size(name: str) -> tuple[int, int]:
    """Width and height in pixels of a rung's name. UserError if it is no such name."""
    width, _, height = name.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise UserError(f"The rung {name!r} is not a size; write it as 32x24 in params.training.")
    return int(width), int(height)


def rungs_of(names: Iterable[str], patch: int) -> dict[str, tuple[int, int]]:
    """Sizes in pixels by name. UserError for a rung that is no whole number of tokens."""
    rungs = {name: rung_size(name) for name in names}
    for name, (width, height) in rungs.items():
        if width % patch or height % patch:
            near = f"{max(width // patch, 1) * patch}x{max(height // patch, 1) * patch}"
            raise UserError(
                f"The rung {name} in params.training is no multiple of the {patch} pixels of a "
                f"token of this tokeniser: take {near} instead, or another tokeniser."
            )
    return rungs


def reaching(
    widths: np.ndarray, heights: np.ndarray, size: tuple[int, int], most_cropped: float
) -> np.ndarray:
    """Rows (int64, ascending) of the pictures that reach a rung.

    widths, heights: of the pictures in pixels. A picture reaches a rung of `size` if it is at
    least as large and a centre crop to the rung's aspect takes away at most this share of it.
    """
    width, height = widths.astype(np.float64), heights.astype(np.float64)
    scale = np.minimum(width / size[0], height / size[1])
    cropped = 1 - (size[0] * scale) * (size[1] * scale) / (width * height)
    return np.flatnonzero((scale >= 1) & (cropped <= most_cropped))


def fitted(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture (H, W, 3) uint8 cut to the aspect of a rung it reaches and reduced to it."""
    height, width = pixels.shape[:2]
    scale = min(width / size[0], height / size[1])
    crop_w, crop_h = size[0] * scale, size[1] * scale
    left, top = (width - crop_w) / 2, (height - crop_h) / 2
    box = (left, top, left + crop_w, top + crop_h)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX, box=box))


def as_tensor(pixels: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) in [−1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def phase_rungs(params: Mapping[str, Any], patch: int) -> dict[str, tuple[int, int]]:
    """The rungs of both training phases; see `rungs_of`."""
    phases = (params["training"]["phase1"], params["training"]["phase2"])
    return rungs_of([name for phase in phases for name in phase["rungs"]], patch)
