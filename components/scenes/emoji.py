"""The world of GenEval's own objects, drawn as OpenMoji's pictures (data.glyphs: openmoji).

Captions are GenEval's. What a caption gives a colour is recoloured; other things mostly have
their own colours. Backgrounds, sizes, turns and mirror images vary.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from components.errors import UserError
from components.scenes import tasks
from components.scenes.atlas import catalogue
from components.scenes.draw import background
from components.scenes.glyphs import OWN, WEIGHTS, at_size, body, recoloured, sides
from components.scenes.heldout import HeldOut
from components.scenes.official import hold_out, official_prompts
from components.scenes.scene import Box, Scene, SceneObject
from components.scenes.tasks import Metadata, meaning
from components.scenes.world import World

UNCOLORED = ("person",)  # GenEval asks for no colour of these


@dataclass(frozen=True)
class EmojiObject(SceneObject):
    """One object; `size` is its longer side. `sides`: width and height, the longer one 1."""

    glyph: str
    flipped: bool
    degrees: float
    sides: tuple[float, float]

    def box(self) -> Box:
        """See `SceneObject.box`."""
        w, h = (side * self.size / 2 for side in self.sides)
        return (self.x - w, self.y - h, self.x + w, self.y + h)


class EmojiWorld(World):
    """GenEval's objects that OpenMoji has × its ten colours × counts × relations."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        things = catalogue()["objects"]
        # All there are, unless fewer are named.
        shapes = list(data["shapes"]) or list(things)
        super().__init__({**data, "shapes": shapes})
        self.looks = {name: things[name].get("looks", "") for name in shapes}

    def _known_shapes(self) -> list[str]:
        return list(catalogue()["objects"])

    def _hold_out(self) -> HeldOut:
        looks = {
            (thing["looks"], name)
            for name, thing in catalogue()["objects"].items()
            if "looks" in thing
        }
        return hold_out(
            self.official,
            self.shapes,
            list(self.colors),
            self.counts,
            self.relations,
            looks,
            self.data["held_out"],
        )

    @cached_property
    def official(self) -> list[Metadata]:
        """GenEval's official prompts of this world's objects, colours and counts."""
        return official_prompts(self.shapes, list(self.colors), self.counts, self.relations)

    # Drawing at random ---------------------------------------------------------------------

    def _sample_metadata(self, rng: np.random.Generator) -> Metadata:
        while True:
            metadata = super()._sample_metadata(rng)
            if not any(c.get("color") and c["class"] in UNCOLORED for c in metadata["include"]):
                return metadata

    def _free_color(self, rng: np.random.Generator, shape: str) -> str:
        if shape in UNCOLORED or rng.random() < float(self.data["own_colors"]):
            return OWN
        return super()._free_color(rng, shape)

    def _thing(self, rng: np.random.Generator, shape: str, color: str, size: float) -> SceneObject:
        known = catalogue()["objects"][shape]
        glyph = known["glyphs"][int(rng.integers(len(known["glyphs"])))]
        flipped = rng.random() < float(self.data["mirrored"]) and known.get("mirrored", True)
        turns = self.data["degrees"]
        degrees = float(turns[int(rng.integers(len(turns)))])
        rgb = self.colors.get(color, (0, 0, 0))
        shown = sides(glyph, flipped, degrees)
        return EmojiObject(shape, color, rgb, 0.0, 0.0, size, glyph, flipped, degrees, shown)

    def draw(self, scene: Scene, width: int, height: int, rng: np.random.Generator) -> NDArray:
        """See `components.scenes.draw.draw_scene`."""
        canvas = backdrop(scene, width, height, rng)
        for thing, box in zip(scene.objects, scene.boxes(width, height), strict=True):
            assert isinstance(thing, EmojiObject)
            x1, y1 = round(box[0]), round(box[1])
            x2, y2 = max(round(box[2]), x1 + 1), max(round(box[3]), y1 + 1)
            pixels = look(thing, x2 - x1, y2 - y1)
            jitter = rng.uniform(-1, 1, size=3) * scene.style["color_jitter"]
            pixels = pixels[max(-y1, 0) : height - y1, max(-x1, 0) : width - x1]
            # Outlines stay black.
            color = pixels[..., :3] + jitter * (pixels[..., :3] @ WEIGHTS)[..., None] / 255
            window = canvas[max(y1, 0) : y2, max(x1, 0) : x2]
            window += pixels[..., 3:] / 255 * (color - window)
        return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)

    # Prompts -------------------------------------------------------------------------------

    def all_prompts(self, task: str) -> list[Metadata]:
        """See `World.all_prompts`; of color_attr's hundred thousands the official ones and a few
        of each two objects, always the same."""
        if task == "color_attr":
            prompts = [m for m in self.official if m["tag"] == task]
            known = {meaning(m) for m in prompts}
            prompts += [m for m in self._pairs_of_colors() if meaning(m) not in known]
        else:
            prompts = super().all_prompts(task)
        return [
            m
            for m in prompts
            if not any(c.get("color") and c["class"] in UNCOLORED for c in m["include"])
        ]

    def _pairs_of_colors(self) -> list[Metadata]:
        rng = np.random.default_rng(int(self.data["held_out"]["seed"]))
        colors = list(self.colors)
        prompts = []
        for a, b in itertools.permutations(self.shapes, 2):
            first, second = rng.permutation(len(colors))[:2]
            prompts.append(tasks.color_attr(a, colors[int(first)], b, colors[int(second)]))
        return prompts

    def benchmark_prompts(self, split: str, task: str) -> list[Metadata]:
        """GenEval's official prompts of a task that are `seen` or `held_out`."""
        if split not in ("seen", "held_out"):
            raise UserError(f"No split '{split}': choose seen or held_out.")
        wanted = split == "held_out"
        return [m for m in self.official if m["tag"] == task and self.is_held_out(m) == wanted]


def look(thing: EmojiObject, width: int, height: int) -> NDArray:
    """A thing at a size in pixels, (height, width, 4) in 0–255."""
    pixels = at_size(thing.glyph, thing.flipped, thing.degrees, width, height)
    if thing.color == OWN:
        return pixels
    return recoloured(pixels, thing.rgb, thing.color, body(thing.glyph))


def backdrop(scene: Scene, width: int, height: int, rng: np.random.Generator) -> NDArray:
    """What is behind the things, (height, width, 3) floats in 0–255.

    A wall with a gradient, in a share `floor` of the pictures a floor of another shade (at most
    `step` levels away) below, and soft blotches of `texture` levels.
    """
    style = scene.style
    canvas = background(scene, width, height, rng)
    floor, horizon = rng.random() < style["floor"], rng.uniform(0.4, 0.85)
    step = rng.uniform(-1, 1, size=3) * style["tint"] + rng.uniform(-1, 1) * style["step"]
    if floor:
        canvas[round(horizon * height) :] += step
    grain = (rng.uniform(-1, 1, size=(5, 5)) * 127 + 128).astype(np.uint8)
    blotches = Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC)
    return canvas + (np.asarray(blotches, dtype=float)[..., None] - 128) / 127 * style["texture"]
