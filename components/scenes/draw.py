"""Draws a scene: muted background, then each object in its colour, anti-aliased."""

import math

import numpy as np
from numpy.typing import NDArray

from components.scenes.shapes import coverage
from components.scenes.world import Scene


def background(scene: Scene, width: int, height: int, rng: np.random.Generator) -> NDArray:
    """A muted grey with a slight tint and a linear gradient, (height, width, 3) floats in 0–255."""
    style = scene.style
    low, high = style["grey"]
    base = rng.uniform(low, high) + rng.uniform(-1, 1, size=3) * style["tint"]
    gx, gy = rng.uniform(-1, 1, size=(2, 3)) * style["gradient"]
    x = (np.arange(width) + 0.5) / width - 0.5
    y = (np.arange(height) + 0.5) / height - 0.5
    return base + gx * x[None, :, None] + gy * y[:, None, None]


def draw_scene(scene: Scene, width: int, height: int, rng: np.random.Generator) -> NDArray:
    """Draw `scene`; any size whose aspect is near the scene's own.

    Args:
        scene: from `World.sample_scene` or `World.scene_for`.
        width, height: pixels.
        rng: draws the background and the slight variation of each colour.

    Returns:
        (height, width, 3) uint8.
    """
    canvas = background(scene, width, height, rng)
    for thing, box in zip(scene.objects, scene.boxes(width, height), strict=True):
        color = np.array(thing.rgb) + rng.uniform(-1, 1, size=3) * scene.style["color_jitter"]
        # Only the object's own window is touched.
        x1, y1 = max(math.floor(box[0]) - 1, 0), max(math.floor(box[1]) - 1, 0)
        x2, y2 = min(math.ceil(box[2]) + 1, width), min(math.ceil(box[3]) + 1, height)
        local = (box[0] - x1, box[1] - y1, box[2] - x1, box[3] - y1)
        alpha = coverage(thing.shape, local, x2 - x1, y2 - y1)[..., None]
        window = canvas[y1:y2, x1:x2]
        canvas[y1:y2, x1:x2] = window + alpha * (color - window)
    canvas += 0.5
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)
