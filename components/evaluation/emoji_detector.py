"""The OpenMoji world's detector: cuts things from the background, compares each with templates.

Background: of each row, the line between the picture's left and right edge, where a world's
margin keeps things out. Foreground: what differs from it, holes filled; parts nearer than `joined`
are one thing. Class: that of the template (components/evaluation/templates.py) that agrees best
with the thing; `none of them` competes. Colour: that of the same template; of own colours the one
of GenEval's ten that they look like, or "". Nothing is trained.
"""

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from components.evaluation.detector import Blob, Detections, Named, self_test
from components.evaluation.templates import Array, Templates
from components.scenes import tasks
from components.scenes.atlas import catalogue
from components.scenes.emoji import UNCOLORED
from components.scenes.glyphs import OWN
from components.scenes.world import World

Mask = NDArray[np.bool_]
Window = tuple[slice, slice]

EDGE = 0.025  # share of the width at either edge that tells the background
MOST = 0.94  # share of the picture's width or height that no thing has
KNOWN = 0.5  # score above which a thing is not looked at in parts
EIGHT = np.ones((3, 3))  # neighbours that hang together


class EmojiDetector:
    """Detects the objects and colours of an OpenMoji world.

    settings: `evaluation.detector`; with others, scores would mean something else.
    """

    def __init__(self, world: World, settings: Mapping[str, float]) -> None:
        self.world, self.settings = world, settings
        self.contrast, self.least_area = float(settings["contrast"]), float(settings["least_area"])
        self.joined = float(settings["joined"])
        self.temperature, self.none_cost = float(settings["temperature"]), float(settings["none"])
        self.aspect_cost, self.paint_cost = float(settings["aspect"]), float(settings["paint"])
        self.lines_cost = float(settings["lines"])

    @cached_property
    def templates(self) -> Templates:
        """Drawn when the first thing is to be named."""
        return Templates.draw(self.world)

    def about(self) -> dict[str, Any]:
        """See `Detector`."""
        return {"detector": "embedded, OpenMoji", "post_processing": dict(self.settings)}

    def detect(self, image: Image.Image, colored: Collection[str] = ()) -> Detections:
        """See `Detector`. A thing is given to its best class alone."""
        seen: Detections = {}
        for blob in sorted(self.blobs(image), key=lambda b: -b.score):
            seen.setdefault(blob.shape, []).append([*blob.box, blob.score, blob.color])
        return seen

    def blobs(self, image: Image.Image) -> list[Blob]:
        """Every thing that stands out, those that look like no object (low score) included."""
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
        away = np.abs(pixels - background(pixels)).max(-1)
        solid = ndimage.binary_fill_holes(away > self.contrast)
        blobs = []
        for mask, window in self._things(solid):
            blob = self._classify(pixels, mask, window)
            if blob.score <= KNOWN:
                # What is nothing as a whole may be things that stand too near each other.
                whole = np.zeros_like(solid)
                whole[window] = mask
                parts = [self._classify(pixels, *part) for part in self._things(whole, 0.0)]
                known = [part for part in parts if part.score > KNOWN]
                blobs += known or [blob]
            else:
                blobs.append(blob)
        return blobs

    def _things(self, solid: Mask, joined: float | None = None) -> list[tuple[Mask, Window]]:
        """Masks and windows of what hangs together but for gaps of `joined`."""
        if not solid.any():
            return []
        shorter = min(solid.shape)
        gap = (self.joined if joined is None else joined) * shorter
        near = ndimage.distance_transform_edt(~solid) <= gap / 2
        labels, n = ndimage.label(near, EIGHT)
        things = []
        for i in range(1, n + 1):
            # The window of the thing itself, without what joined its parts.
            rows, columns = np.nonzero(solid & (labels == i))
            if len(rows) >= self.least_area * shorter**2:
                window = (
                    slice(int(rows.min()), int(rows.max()) + 1),
                    slice(int(columns.min()), int(columns.max()) + 1),
                )
                things.append((solid[window] & (labels[window] == i), window))
        return things

    def _classify(self, pixels: Array, mask: Mask, window: Window) -> Blob:
        templates = self.templates
        silhouette, aspect, paint, lines = templates.unlike(pixels[window], mask)
        costs = (
            silhouette
            + self.aspect_cost * aspect
            + self.paint_cost * paint
            + self.lines_cost * lines
        )
        if any(part > MOST * all_ for part, all_ in zip(mask.shape, pixels.shape, strict=False)):
            costs += 1.0  # from edge to edge: no thing
        of_class = np.full(len(self.world.shapes), np.inf)
        np.minimum.at(of_class, templates.of[:, 0], costs)
        rivals = np.append(of_class, self.none_cost)
        chance = np.exp(-(rivals - rivals.min()) / self.temperature)
        best = int(of_class.argmin())
        nearest = int(np.where(templates.of[:, 0] == best, costs, np.inf).argmin())
        return Blob(
            self.world.shapes[best],
            float(chance[best] / chance.sum()),
            float(max(0.0, 1 - of_class[best])),
            self._named(best, int(templates.of[nearest, 1])),
            (
                float(window[1].start),
                float(window[0].start),
                float(window[1].stop),
                float(window[0].stop),
            ),
        )

    def _named(self, shape: int, color: int) -> str:
        """A template's colour; of one in its own colours what the catalogue says it looks like."""
        if color >= 0:
            return list(self.world.colors)[color]
        return str(catalogue()["objects"][self.world.shapes[shape]].get("looks", ""))

    def self_test(self, width: int, height: int) -> None:
        """See `Detector`: of every object a number and a colour, drawn by the world.

        Raises:
            UserError: below 95 % right, or something seen in a blank picture, with an example.
        """
        world, rng = self.world, np.random.default_rng(0)
        colors = list(world.colors)
        prompts = [tasks.counting(name, int(rng.choice(world.counts))) for name in world.shapes]
        prompts += [
            tasks.colors(name, colors[int(rng.integers(len(colors)))])
            for name in world.shapes
            if name not in UNCOLORED
        ]
        self_test(world, self, width, height, prompts, same)


def same(drawn: Named, seen: Named) -> bool:
    """Whether sorted (object, colour) agree; an own colour may be called anything."""
    if [name for name, _ in drawn] != [name for name, _ in seen]:
        return False
    return all(a in (OWN, b) for (_, a), (_, b) in zip(drawn, seen, strict=True))


def background(pixels: Array) -> Array:
    """(H, W, 3): in each row the line between the means of its two ends."""
    width = pixels.shape[1]
    edge = max(round(EDGE * width), 2)
    ends = pixels[:, :edge].mean(1), pixels[:, -edge:].mean(1)
    # A lone row is not the background's.
    left, right = (ndimage.median_filter(end, (5, 1)) for end in ends)
    at = ((np.arange(width) + 0.5) / width)[None, :, None]
    return left[:, None] + at * (right - left)[:, None]
