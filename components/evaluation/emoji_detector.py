"""The OpenMoji world's detector: cuts things from the background, compares each with templates.

Background: of each row, the line between the picture's left and right edge, where a world's
margin keeps things out. Foreground: what differs from it, holes filled; parts nearer than `joined`
are one thing. Class: that of the template (glyph, mirrored, turned, in its own and every other
colour) that agrees best with the thing; `none of them` competes. Colour: that of the same template;
of own colours the one of GenEval's ten that they look like, or "". Nothing is trained.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from components.errors import UserError
from components.evaluation.detector import Blob, Detections
from components.evaluation.geneval import found
from components.scenes import tasks
from components.scenes.atlas import catalogue
from components.scenes.emoji import UNCOLORED, EmojiObject, look
from components.scenes.glyphs import OWN, WEIGHTS, sides
from components.scenes.world import World

Array = NDArray[np.float32]

SIDE = 24  # px that things and templates are compared at, whatever their shape
GREY = 128.0  # around things, in both
EDGE = 0.025  # share of the width at either edge that tells the background
MOST = 0.94  # share of the picture's width or height that no thing has
AROUND = 5  # px of the SIDE that lightness is compared with


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
        self.detail_cost = float(settings["detail"])

    def about(self) -> dict[str, Any]:
        """See `Detector`."""
        return {"detector": "embedded, OpenMoji", "post_processing": dict(self.settings)}

    def detect(self, image: Image.Image, colored: Collection[str] = ()) -> Detections:
        """See `Detector`. A thing is given to its best class alone, and every one has a colour."""
        seen: Detections = {}
        for blob in sorted(self.blobs(image), key=lambda b: -b.score):
            seen.setdefault(blob.shape, []).append([*blob.box, blob.score, blob.color])
        return seen

    def blobs(self, image: Image.Image) -> list[Blob]:
        """Every thing that stands out, those that look like no object (low score) included."""
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
        solid = self._foreground(pixels)
        shorter = min(solid.shape)
        reach = ndimage.distance_transform_edt(~solid) if solid.any() else np.ones(solid.shape)
        groups, n = ndimage.label(reach <= self.joined * shorter / 2, np.ones((3, 3)))
        blobs = []
        for i, window in enumerate(ndimage.find_objects(groups, n), start=1):
            whole = solid[window] & (groups[window] == i)
            if whole.sum() < self.least_area * shorter**2:
                continue
            blob = self._classify(pixels, whole, window)
            parts = [] if blob.score > 0.5 else self._parts(pixels, whole, window, shorter)
            # What is nothing as a whole may be things that stand too near each other.
            known = [part for part in parts if part.score > 0.5]
            blobs += known or [blob]
        return blobs

    def _parts(
        self, pixels: Array, whole: NDArray[np.bool_], window: tuple[slice, ...], shorter: int
    ) -> list[Blob]:
        labels, n = ndimage.label(whole, np.ones((3, 3)))
        blobs = []
        for i, inner in enumerate(ndimage.find_objects(labels, n), start=1):
            mask = labels[inner] == i
            if n > 1 and mask.sum() >= self.least_area * shorter**2:
                outer = tuple(
                    slice(w.start + p.start, w.start + p.stop)
                    for w, p in zip(window, inner, strict=True)
                )
                blobs.append(self._classify(pixels, mask, outer))
        return blobs

    def _foreground(self, pixels: Array) -> NDArray[np.bool_]:
        """What differs from the background in some channel, holes filled."""
        away = np.abs(pixels - background(pixels)).max(-1)
        return ndimage.binary_fill_holes(away > self.contrast)

    def _classify(self, pixels: Array, mask: NDArray[np.bool_], window: tuple[slice, ...]) -> Blob:
        rows, columns = np.nonzero(mask)
        inner = (
            slice(rows.min(), rows.max() + 1),
            slice(columns.min(), columns.max() + 1),
        )
        mask, size = mask[inner], pixels.shape
        silhouette, paint = compared(pixels[window][inner], mask)
        costs = self._costs(silhouette, paint, mask.shape[1] / mask.shape[0])
        if mask.shape[1] > MOST * size[1] or mask.shape[0] > MOST * size[0]:
            costs += 1.0  # from edge to edge: no thing, the background was none
        of_class = np.full(len(self.world.shapes), np.inf)
        np.minimum.at(of_class, self._owner, costs)
        rival = np.append(of_class, self.none_cost)
        chance = np.exp(-(rival - rival.min()) / self.temperature)
        best = int(of_class.argmin())
        nearest = int(np.where(self._owner == best, costs, np.inf).argmin())
        top, left = window[0].start + inner[0].start, window[1].start + inner[1].start
        return Blob(
            self.world.shapes[best],
            float(chance[best] / chance.sum()),
            float(max(0.0, 1 - of_class[best])),
            self._named(best, int(self._color[nearest])),
            (
                float(left),
                float(top),
                float(left + mask.shape[1]),
                float(top + mask.shape[0]),
            ),
        )

    def _named(self, shape: int, color: int) -> str:
        """A template's colour; of one in its own colours what the catalogue says it looks like."""
        if color >= 0:
            return list(self.world.colors)[color]
        return str(catalogue()["objects"][self.world.shapes[shape]].get("looks", ""))

    def _costs(self, silhouette: Array, paint: Array, aspect: float) -> Array:
        """Of every template: 1 − overlap, wrong aspect ratio, wrong colours, wrong lines."""
        silhouettes, paints, aspects, squares, details = self._templates
        both = silhouettes @ silhouette
        overlap = both / ((silhouettes**2).sum(1) + (silhouette**2).sum() - both)
        apart = squares + (paint**2).sum() - 2 * (paints @ paint)
        paint_off = np.sqrt(np.maximum(apart, 0) / (3 * SIDE**2)) / 255
        wrong = np.maximum(np.abs(np.log(aspect / aspects)) - 0.1, 0)
        shapes = 1 - overlap + self.aspect_cost * wrong
        unlike = 1 - details @ detail(paint[None])[0]
        return shapes[self._silhouette_of] + self.paint_cost * paint_off + self.detail_cost * unlike

    @property
    def _owner(self) -> NDArray[np.int64]:
        return self._index[:, 0]

    @property
    def _color(self) -> NDArray[np.int64]:
        return self._index[:, 1]

    @property
    def _silhouette_of(self) -> NDArray[np.int64]:
        return self._index[:, 2]

    @cached_property
    def _drawn(self) -> tuple[Any, ...]:
        world = self.world
        turns = sorted({float(d) for d in world.data["degrees"]})
        mirrored = [False, True] if float(world.data["mirrored"]) else [False]
        silhouettes, aspects, paints, index = [], [], [], []
        for number, name in enumerate(world.shapes):
            thing = catalogue()["objects"][name]
            colors = [OWN] if name in UNCOLORED else [OWN, *world.colors]
            for glyph in thing["glyphs"]:
                for flipped in mirrored if thing.get("mirrored", True) else [False]:
                    for degrees in turns:
                        shown = sides(glyph, flipped, degrees)
                        for color in colors:
                            one = EmojiObject(
                                name, color, world.colors.get(color, (0, 0, 0)),
                                0.0, 0.0, 1.0, glyph, flipped, degrees, shown,
                            )  # fmt: skip
                            pixels = look(one, *(round(2 * SIDE * s) for s in shown))
                            solid = ndimage.binary_fill_holes(pixels[..., 3] > 100)
                            alpha = np.maximum(pixels[..., 3:] / 255, 0)
                            flat = GREY + alpha * (pixels[..., :3] - GREY)
                            silhouette, paint = compared(flat.astype(np.float32), solid)
                            if color == OWN:
                                silhouettes.append(silhouette)
                                aspects.append(shown[0] / shown[1])
                            paints.append(paint)
                            which = -1 if color == OWN else list(world.colors).index(color)
                            index.append((number, which, len(silhouettes) - 1))
        return np.stack(silhouettes), np.array(aspects), np.stack(paints), np.array(index)

    @property
    def _index(self) -> NDArray[np.int64]:
        return self._drawn[3]

    @cached_property
    def _templates(self) -> tuple[Array, ...]:
        silhouettes, aspects, paints, _ = self._drawn
        return silhouettes, paints, aspects, (paints**2).sum(1), detail(paints)

    def self_test(self, width: int, height: int) -> None:
        """See `Detector`: every object in a colour and every number of it, drawn by the world.

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
        wrong = []
        for metadata in prompts:
            scene = world.scene_for(metadata, rng, aspect=width / height)
            picture = Image.fromarray(world.draw(scene, width, height, rng))
            objects = found(metadata, self.detect(picture))
            seen = sorted((name, item[5]) for name, items in objects.items() for item in items)
            asked = sorted((o.shape, o.color) for o in scene.objects)
            if not same(asked, seen):
                wrong.append(f"'{scene.caption}' was seen as {seen}")
        blank = self.detect(Image.new("RGB", (width, height), (128, 128, 128)))
        if blank:
            wrong.append("a blank picture was seen as " + ", ".join(blank))
        if len(wrong) > 0.05 * len(prompts) or blank:
            raise UserError(
                f"The detector failed its self-test at {width}x{height} on {len(wrong)} of "
                f"{len(prompts) + 1} known pictures (e.g. {wrong[0]}); no score is reported. Check "
                "the colours and sizes in params/data, and evaluation.size: things of a few pixels "
                "cannot be told apart."
            )


def same(drawn: Sequence[tuple[str, str]], seen: Sequence[tuple[str, str]]) -> bool:
    """Whether sorted (object, colour) agree; an own colour may be called anything."""
    if [name for name, _ in drawn] != [name for name, _ in seen]:
        return False
    return all(a in (OWN, b) for (_, a), (_, b) in zip(drawn, seen, strict=True))


def background(pixels: Array) -> Array:
    """(H, W, 3): in each row the line between the medians of its two ends."""
    height, width = pixels.shape[:2]
    edge = max(round(EDGE * width), 2)
    left, right = pixels[:, :edge].mean(1), pixels[:, -edge:].mean(1)
    # A lone row is not the background's.
    left, right = (ndimage.median_filter(side, (5, 1)) for side in (left, right))
    at = ((np.arange(width) + 0.5) / width)[None, :, None]
    return left[:, None] + at * (right - left)[:, None]


def compared(pixels: Array, mask: NDArray[np.bool_]) -> tuple[Array, Array]:
    """A thing as SIDE × SIDE: its silhouette (0…1) and its colours on grey, flat."""
    size = (SIDE, SIDE)
    shown = np.where(mask[..., None], pixels, GREY)
    silhouette = Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BOX)
    channels = [
        np.asarray(
            Image.fromarray(shown[..., c].astype(np.float32)).resize(size, Image.Resampling.BOX)
        )
        for c in range(3)
    ]
    return np.asarray(silhouette).ravel(), np.stack(channels, -1).ravel() - GREY


def detail(paints: Array) -> Array:
    """Lines and edges alone, (N, SIDE²) of length 1: lightness less its mean around each pixel."""
    light = paints.reshape(-1, SIDE, SIDE, 3) @ WEIGHTS.astype(np.float32)
    # Two pixels around: the outline against the grey is part of it.
    light = np.pad(light, ((0, 0), (2, 2), (2, 2)))
    lines = light - ndimage.uniform_filter(light, (0, AROUND, AROUND))
    lines = lines.reshape(len(lines), -1)
    return lines / np.maximum(np.linalg.norm(lines, axis=1, keepdims=True), 1e-3)
