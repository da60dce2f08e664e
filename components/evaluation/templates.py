"""What the things of the OpenMoji world look like, at one small size, to compare pictures with."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from components.scenes.atlas import OPAQUE, catalogue
from components.scenes.emoji import UNCOLORED, EmojiObject, look
from components.scenes.glyphs import OWN, WEIGHTS, sides
from components.scenes.world import World

Array = NDArray[np.float32]

SIDE = 24  # px, whatever a thing's shape
GREY = 128.0  # around things
AROUND = 5  # px of the SIDE that lightness is compared with, to find lines
SLACK = 0.1  # of the aspect ratio's natural logarithm, free


@dataclass(frozen=True)
class Templates:
    """Every glyph, mirrored and turned (S silhouettes), in its own and each colour (T templates).

    silhouettes: (S, SIDE²). aspects: (S,), width / height. paints: (T, SIDE² · 3).
    lines: (T, ·) of length 1. of: (T, 3) object, colour (−1: its own), silhouette.
    """

    silhouettes: Array
    aspects: NDArray[np.float64]
    paints: Array
    lines: Array
    of: NDArray[np.int64]

    @classmethod
    def draw(cls, world: World) -> "Templates":
        """Draw them all; seconds."""
        colors = list(world.colors)
        silhouettes, aspects, paints, of = [], [], [], []
        for number, name in enumerate(world.shapes):
            for glyph, flipped, degrees in _views(world, name):
                shown = sides(glyph, flipped, degrees)
                for which in range(-1, 0 if name in UNCOLORED else len(colors)):
                    color = colors[which] if which >= 0 else OWN
                    rgb = world.colors.get(color, (0, 0, 0))
                    thing = EmojiObject(
                        name, color, rgb, 0.0, 0.0, 1.0, glyph, flipped, degrees, shown
                    )
                    pixels = look(thing, *(round(2 * SIDE * side) for side in shown))
                    solid = ndimage.binary_fill_holes(pixels[..., 3] > OPAQUE)
                    on_grey = GREY + pixels[..., 3:] / 255 * (pixels[..., :3] - GREY)
                    silhouette, paint = reduced(on_grey, solid)
                    if which < 0:
                        silhouettes.append(silhouette)
                        aspects.append(shown[0] / shown[1])
                    paints.append(paint)
                    of.append((number, which, len(silhouettes) - 1))
        stacked = np.stack(paints)
        return cls(np.stack(silhouettes), np.array(aspects), stacked, lines(stacked), np.array(of))

    @cached_property
    def _squares(self) -> tuple[Array, Array]:
        return (self.silhouettes**2).sum(1), (self.paints**2).sum(1)

    def unlike(
        self, pixels: Array, mask: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
        """How a thing differs from every template, (T,) each, 0 for not at all.

        Silhouette: 1 − overlap. Aspect: natural logarithm beyond `SLACK`. Paint: root mean square
        of the colours' differences, a share of full range. Lines: 1 − cosine.

        Args:
            pixels: (h, w, 3), the thing's box in a picture.
            mask: (h, w), where it is.
        """
        silhouette, paint = reduced(pixels, mask)
        both = self.silhouettes @ silhouette
        areas, squares = self._squares
        either = areas + (silhouette**2).sum() - both
        ratio = mask.shape[1] / mask.shape[0]
        aspect = np.maximum(np.abs(np.log(ratio / self.aspects)) - SLACK, 0)
        apart = squares + (paint**2).sum() - 2 * (self.paints @ paint)
        paints = np.sqrt(np.maximum(apart, 0) / paint.size) / 255
        cosine = self.lines @ lines(paint[None])[0]
        which = self.of[:, 2]
        return (1 - both / either)[which], aspect[which], paints, 1 - cosine


def _views(world: World, name: str) -> list[tuple[str, bool, float]]:
    """Every glyph of an object, mirrored or not, at every turn the world has."""
    thing = catalogue()["objects"][name]
    mirrored = thing.get("mirrored", True) and float(world.data["mirrored"]) > 0
    turns = sorted({float(degrees) for degrees in world.data["degrees"]})
    return [
        (glyph, flipped, degrees)
        for glyph in thing["glyphs"]
        for flipped in ([False, True] if mirrored else [False])
        for degrees in turns
    ]


def reduced(pixels: NDArray[Any], mask: NDArray[np.bool_]) -> tuple[Array, Array]:
    """A thing at SIDE × SIDE: its silhouette (0…1) and its colours on grey, flat."""
    shown = np.where(mask[..., None], pixels, GREY) - GREY

    def small(channel: NDArray[Any]) -> NDArray[Any]:
        image = Image.fromarray(channel.astype(np.float32))
        return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))

    return small(mask).ravel(), np.stack([small(shown[..., c]) for c in range(3)], -1).ravel()


def lines(paints: Array) -> Array:
    """Lines and edges alone, (N, ·) of length 1: lightness less its mean around each pixel."""
    light = paints.reshape(-1, SIDE, SIDE, 3) @ WEIGHTS.astype(np.float32)
    # With some of the grey around: an outline against it is a line too.
    edge = AROUND // 2
    light = np.pad(light, ((0, 0), (edge, edge), (edge, edge)))
    light -= ndimage.uniform_filter(light, (0, AROUND, AROUND))
    flat = light.reshape(len(light), -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-3)
