"""Glyphs turned, recoloured and brought to a size.

A colour replaces hue and keeps light and shade: the glyph's own lightness, measured against that
of its body, becomes a shade of the colour, and black outlines stay black.
"""

from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from components.scenes.atlas import OPAQUE, atlas

Array = NDArray[np.float64]

OWN = "own"  # the colour of a glyph that is left as it is
OUTLINE = (24.0, 64.0)  # lightness 0–255: black below, body above, between them a soft edge
DARK, LIGHT = 0.6, 0.4  # darkest shade of a colour; how far towards white its lightest goes
WEIGHTS = np.array([0.299, 0.587, 0.114])  # lightness of red, green, blue (BT.601)
# White and black need other shades: of white only the darker, of black only the lighter.
ENDS = {"white": (0.84, 0.0), "black": (0.7, 0.22)}


@lru_cache(maxsize=256)
def turned(name: str, flipped: bool, degrees: float) -> Image.Image:
    """A glyph mirrored left to right, then turned counter-clockwise, cut to its box."""
    image = Image.fromarray(atlas()[name])
    if flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if degrees:
        image = image.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > OPAQUE)).getbbox()
    assert box is not None
    return image.crop(box)


@cache
def sides(name: str, flipped: bool, degrees: float) -> tuple[float, float]:
    """Width and height of a turned glyph, the longer one 1."""
    width, height = turned(name, flipped, degrees).size
    longer = max(width, height)
    return width / longer, height / longer


def at_size(name: str, flipped: bool, degrees: float, width: int, height: int) -> Array:
    """A turned glyph in its own colours, (height, width, 4) in 0–255."""
    image = turned(name, flipped, degrees).resize((width, height), Image.Resampling.BOX)
    return np.asarray(image, dtype=float)


@cache
def body(name: str) -> float:
    """Median lightness, 0–255, of a glyph without its outlines."""
    pixels = atlas()[name]
    light = pixels[..., :3] @ WEIGHTS
    return float(np.median(light[(pixels[..., 3] > OPAQUE) & (light > OUTLINE[1])]))


def recoloured(pixels: Array, rgb: tuple[int, int, int], color: str, middle: float) -> Array:
    """Pixels of a glyph in another colour.

    Args:
        pixels: (H, W, 4) from `at_size`.
        rgb: the colour that the body gets, 0–255.
        color: its name; white and black have shades of their own.
        middle: `body` of the glyph.

    Returns:
        (H, W, 4); the same opacity.
    """
    dark, light = ENDS.get(color, (DARK, LIGHT))
    own = (pixels[..., :3] @ WEIGHTS)[..., None]
    solid = np.clip((own - OUTLINE[0]) / (OUTLINE[1] - OUTLINE[0]), 0, 1)
    shade = dark + (1 - dark) * np.clip((own - OUTLINE[1]) / max(middle - OUTLINE[1], 1.0), 0, 1)
    tint = light * np.clip((own - middle) / max(255 - middle, 1.0), 0, 1)
    base = np.array(rgb, dtype=float)
    new = solid * (shade * base + tint * (255 - base))
    return np.concatenate([new, pixels[..., 3:]], axis=-1)
