"""The embedded world's detector: segments by colour, then fits each shape to each blob.

Background: a plane a channel, fitted robustly. Foreground: pixels moved at least half way from
the background towards a colour of the world. Class: the shape whose own drawing, placed by the
blob's moments, agrees best with the blob; `none of them` competes.
"""

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from components.errors import UserError
from components.scenes.shapes import BOX, coverage
from components.scenes.tasks import Metadata
from components.scenes.world import Box, World

Array = NDArray[np.float64]
Detections = dict[str, list[list[Any]]]
Named = Sequence[tuple[str, str]]  # class and colour of each thing, sorted


class Detector(Protocol):
    """Finds objects in a picture."""

    def detect(self, image: Image.Image, colored: Collection[str] = ()) -> Detections:
        """Class → [[x1, y1, x2, y2, score in 0…1, colour name or ""], …], best first, pixels.

        colored: classes whose colours are asked for; those of others may be "".
        """

    def self_test(self, width: int, height: int) -> None:
        """Detect what is known, at this size; UserError where too much of it is wrong."""

    def about(self) -> dict[str, Any]:
        """What made the boxes, for a result file: `detector`, weights, post-processing, …."""


@dataclass(frozen=True)
class Blob:
    """One connected patch of foreground.

    shape: the best class. score: its probability, 0…1. fit: overlap with its ideal drawing, 0…1.
    """

    shape: str
    score: float
    fit: float
    color: str
    box: Box


def realism(blobs: Sequence[Blob]) -> float:
    """Mean overlap of the drawn things with ideal ones, 0…1; 0 where there is none."""
    return sum(b.fit for b in blobs) / len(blobs) if blobs else 0.0


class SceneDetector:
    """Detects the shapes and colours of a world.

    settings: `evaluation.detector`; with others, scores would mean something else.
    """

    def __init__(self, world: World, settings: Mapping[str, float]) -> None:
        self.world, self.settings = world, settings
        self.contrast, self.cosine = float(settings["contrast"]), float(settings["cosine"])
        self.purity, self.least_area = float(settings["purity"]), float(settings["least_area"])
        self.temperature = float(settings["temperature"])
        self.none_cost, self.aspect_cost = float(settings["none"]), float(settings["aspect"])
        self.shapes = world.shapes
        self.color_names = list(world.colors)
        self.palette = np.array([world.colors[name] for name in self.color_names], dtype=float)

    def about(self) -> dict[str, Any]:
        """See `Detector`."""
        return {"detector": "embedded", "post_processing": dict(self.settings)}

    def self_test(self, width: int, height: int) -> None:
        """See `Detector`: scenes of the world, drawn by its renderer."""
        self_test(self.world, self, width, height)

    def detect(self, image: Image.Image, colored: Collection[str] = ()) -> Detections:
        """See `Detector`. A blob is given to its best class alone, and every one has a colour."""
        found: Detections = {}
        for blob in sorted(self.blobs(image), key=lambda b: -b.score):
            found.setdefault(blob.shape, []).append([*blob.box, blob.score, blob.color])
        return found

    def blobs(self, image: Image.Image) -> list[Blob]:
        """Every patch of foreground, those that look like no shape (low score) included."""
        pixels = np.asarray(image.convert("RGB"), dtype=float)
        alpha, color = self._foreground(pixels)
        labels, n = ndimage.label(alpha > self.contrast)
        least = self.least_area * min(pixels.shape[:2]) ** 2
        blobs = []
        for i, window in enumerate(ndimage.find_objects(labels, n), start=1):
            mask = labels[window] == i
            if mask.sum() < least:
                continue
            votes = np.bincount(color[window][mask], minlength=len(self.palette))
            if votes.max() >= self.purity * mask.sum():
                blobs.append(self._classify(alpha, labels == i, window, int(votes.argmax())))
                continue
            # Two colours: things that touch, told apart by colour.
            for c in np.flatnonzero(votes >= least):
                parts, m = ndimage.label((labels == i) & (color == c))
                for j, part in enumerate(ndimage.find_objects(parts, m), start=1):
                    if (parts[part] == j).sum() >= least:
                        blobs.append(self._classify(alpha, parts == j, part, int(c)))
        return blobs

    def _foreground(self, pixels: Array) -> tuple[Array, NDArray[np.int64]]:
        """Share of the way from the background to the nearest colour, and which colour."""
        away = pixels - _background(pixels)  # H W 3
        to = self.palette - (pixels - away).mean((0, 1))  # C 3, from the mean background
        length = np.sqrt((to**2).sum(-1))
        along = away @ (to / length[:, None]).T  # H W C
        norm = np.sqrt((away**2).sum(-1))
        color = along.argmax(-1)
        best = np.take_along_axis(along, color[..., None], -1)[..., 0]
        alpha = np.clip(best / length[color], 0, 1)
        alpha[best < self.cosine * norm] = 0
        return alpha, color

    def _classify(
        self, alpha: Array, mask: NDArray[np.bool_], window: tuple[slice, ...], color: int
    ) -> Blob:
        # One pixel more on each side: the soft edge belongs to the blob.
        rows = slice(max(window[0].start - 1, 0), window[0].stop + 1)
        cols = slice(max(window[1].start - 1, 0), window[1].stop + 1)
        near = ndimage.binary_dilation(mask[rows, cols])
        patch = np.where(near, alpha[rows, cols], 0.0)
        patch = np.clip(patch / np.quantile(patch[mask[rows, cols]], 0.75), 0, 1)
        moments = _moments(patch)
        fits = {shape: self._fit(shape, patch, moments) for shape in self.shapes}
        costs = np.array([cost for cost, _, _ in fits.values()] + [self.none_cost])
        chance = np.exp(-(costs - costs.min()) / self.temperature)
        chance /= chance.sum()
        best = int(costs[:-1].argmin())
        _, overlap, (x1, y1, x2, y2) = fits[self.shapes[best]]
        dx, dy = cols.start, rows.start
        return Blob(
            self.shapes[best],
            float(chance[best]),
            float(overlap),
            self.color_names[color],
            (
                max(x1 + dx, 0.0),
                max(y1 + dy, 0.0),
                min(x2 + dx, float(alpha.shape[1])),
                min(y2 + dy, float(alpha.shape[0])),
            ),
        )

    def _fit(
        self, shape: str, patch: Array, moments: tuple[float, float, float, float]
    ) -> tuple[float, float, Box]:
        """Cost, overlap and box of `shape` when its moments are the patch's."""
        height, width = patch.shape
        x, y, sx, sy = moments
        mx, my, ux, uy = self._unit_moments[shape]
        w, h = sx / ux, sy / uy
        box = (x - mx * w, y - my * h, x - mx * w + w, y - my * h + h)
        drawn = coverage(shape, box, width, height)
        overlap = np.minimum(drawn, patch).sum() / np.maximum(drawn, patch).sum()
        nominal = BOX[shape][0] / BOX[shape][1]
        wrong = max(abs(np.log(w / h / nominal)) - 0.1, 0.0)
        return 1 - overlap + self.aspect_cost * wrong, float(overlap), box

    @cached_property
    def _unit_moments(self) -> dict[str, tuple[float, float, float, float]]:
        """Mean and deviation of each shape, in units of its box from the top left."""
        side = 400
        return {
            shape: (x / side, y / side, sx / side, sy / side)
            for shape in self.shapes
            for x, y, sx, sy in [_moments(coverage(shape, (0, 0, side, side), side, side))]
        }


def _moments(patch: Array) -> tuple[float, float, float, float]:
    """Mean x, mean y, deviation x, deviation y of a patch's mass, in pixels."""
    height, width = patch.shape
    columns, rows = patch.sum(0), patch.sum(1)
    mass = patch.sum()
    xs, ys = np.arange(width) + 0.5, np.arange(height) + 0.5
    x, y = float((columns * xs).sum() / mass), float((rows * ys).sum() / mass)
    sx = float(np.sqrt((columns * (xs - x) ** 2).sum() / mass))
    sy = float(np.sqrt((rows * (ys - y) ** 2).sum() / mass))
    return x, y, max(sx, 0.3), max(sy, 0.3)


@cache
def _plane_basis(height: int, width: int) -> Array:
    """1, x and y of each pixel, (height·width, 3)."""
    x = np.arange(width) / width - 0.5
    y = np.arange(height) / height - 0.5
    ones = np.ones((height, width))
    return np.stack([ones, ones * x, ones * y[:, None]], -1).reshape(-1, 3)


def _background(pixels: Array) -> Array:
    """A plane for each channel, fitted to the pixels near it; starts from the border's median."""
    height, width = pixels.shape[:2]
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    basis = _plane_basis(height, width)
    flat = pixels.reshape(-1, 3)
    away = flat - np.median(border, axis=0)
    plane = flat - away
    for reach in (48.0, 28.0):
        inside = np.einsum("nc,nc->n", away, away) < reach**2
        if inside.sum() < 0.1 * len(flat):
            break
        a = basis[inside]
        plane = basis @ np.linalg.solve(a.T @ a + 1e-6 * np.eye(3), a.T @ flat[inside])
        away = flat - plane
    return plane.reshape(pixels.shape)


def self_test(
    world: World,
    detector: Detector,
    width: int,
    height: int,
    prompts: Sequence[Metadata] | None = None,
    agree: Callable[[Named, Named], bool] = operator.eq,
) -> None:
    """Detect known scenes at the size that is to be scored; refuse when answers are wrong.

    Scenes of the prompts, drawn by the world; a blank picture must give nothing.

    Args:
        prompts: None: every shape in every colour, and every count of the world.
        agree: whether what was drawn and what was seen, both sorted, are the same.

    Raises:
        UserError: below 95 % right, with an example.
    """
    from components.evaluation.geneval import found

    rng = np.random.default_rng(0)
    if prompts is None:
        prompts = [m for task in ("colors", "counting") for m in world.all_prompts(task)]
    wrong = []
    for metadata in prompts:
        scene = world.scene_for(metadata, rng, aspect=width / height)
        picture = Image.fromarray(world.draw(scene, width, height, rng))
        objects = found(metadata, detector.detect(picture))
        seen = sorted((name, item[5]) for name, items in objects.items() for item in items)
        if not agree(sorted((o.shape, o.color) for o in scene.objects), seen):
            wrong.append(f"'{scene.caption}' was seen as {seen}")
    blank = detector.detect(Image.new("RGB", (width, height), (128, 128, 128)))
    if blank:
        wrong.append("a blank picture was seen as " + ", ".join(blank))
    if len(wrong) > 0.05 * len(prompts) or blank:
        raise UserError(
            f"The detector failed its self-test at {width}x{height} on {len(wrong)} of "
            f"{len(prompts) + 1} known pictures (e.g. {wrong[0]}); no score is reported. Check "
            "the shapes, colours and sizes in params/data, and evaluation.size: objects of a few "
            "pixels cannot be told apart."
        )
