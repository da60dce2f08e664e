"""The shapes: signed distances, so that edges are anti-aliased at any size.

Only + − × ÷ √ min max are used. Those are exact on every machine, so the raw pictures
have the same bytes everywhere.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Width and height of a shape's box, in its `size`; chosen so that the six weigh about the same.
BOX: dict[str, tuple[float, float]] = {
    "circle": (1.0, 1.0),
    "square": (0.92, 0.92),
    "triangle": (1.1, 1.0),
    "cross": (1.06, 1.06),
    "ring": (1.06, 1.06),
    "bar": (1.24, 0.5),
}


def _ellipse(x: Array, y: Array, w: float, h: float) -> Array:
    # First-order distance to the ellipse; exact for a circle's edge.
    r = np.sqrt((x / w) ** 2 + (y / h) ** 2)
    slope = np.sqrt((x / (w * w)) ** 2 + (y / (h * h)) ** 2)
    return (r - 1.0) * r / np.maximum(slope, 1e-9)


def _circle(x: Array, y: Array, w: float, h: float) -> Array:
    return _ellipse(x, y, w, h)


def _square(x: Array, y: Array, w: float, h: float) -> Array:
    return np.maximum(np.abs(x) - w, np.abs(y) - h)


def _triangle(x: Array, y: Array, w: float, h: float) -> Array:
    # Apex at (0, −h), base from (−w, h) to (w, h); image y runs downwards.
    length = (4 * h * h + w * w) ** 0.5
    side = (2 * h * np.abs(x) - w * (y + h)) / length
    return np.maximum(side, y - h)


def _cross(x: Array, y: Array, w: float, h: float) -> Array:
    arm = 0.33
    return np.minimum(_square(x, y, w, arm * h), _square(x, y, arm * w, h))


def _ring(x: Array, y: Array, w: float, h: float) -> Array:
    hole = 0.5
    return np.maximum(_ellipse(x, y, w, h), -_ellipse(x, y, hole * w, hole * h))


DISTANCE: dict[str, Callable[[Array, Array, float, float], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
    "bar": _square,
}


def coverage(shape: str, box: tuple[float, float, float, float], width: int, height: int) -> Array:
    """Share of each pixel that `shape`, stretched over `box`, covers.

    Args:
        shape: a key of `DISTANCE`.
        box: x1, y1, x2, y2 in pixels, may be fractional and may leave the picture.
        width, height: of the picture, pixels.

    Returns:
        (height, width) array in [0, 1].
    """
    x1, y1, x2, y2 = box
    x = np.arange(width) + 0.5 - (x1 + x2) / 2
    y = np.arange(height) + 0.5 - (y1 + y2) / 2
    half_w, half_h = max((x2 - x1) / 2, 1e-6), max((y2 - y1) / 2, 1e-6)
    distance = DISTANCE[shape](np.asarray(x)[None, :], np.asarray(y)[:, None], half_w, half_h)
    return np.clip(0.5 - distance, 0.0, 1.0)
