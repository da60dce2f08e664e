"""The embedded world: which scenes exist, how often, and which are held out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.errors import UserError
from components.evaluation.geneval import relative_position
from components.scenes import tasks
from components.scenes.heldout import HeldOut
from components.scenes.scene import Box, Scene, SceneObject
from components.scenes.shapes import DISTANCE
from components.scenes.tasks import Metadata

PLACES = 12  # tried for one object before the whole scene is begun anew


class World:
    """Shapes × colours × counts × relations, with a held-out set of combinations."""

    TASKS = tasks.TASKS

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.shapes: list[str] = list(data["shapes"])
        self.colors: dict[str, tuple[int, int, int]] = {
            name: (int(rgb[0]), int(rgb[1]), int(rgb[2])) for name, rgb in data["colors"].items()
        }
        self.counts: list[int] = [int(c) for c in data["counts"]]
        self.relations: list[str] = list(data["relations"])
        self._check()
        self.held_out = self._hold_out()

    @staticmethod
    def from_params(data: Mapping[str, Any]) -> "World":
        """The world of `params["data"]`: of shapes, or of pictures where `glyphs` is openmoji.

        Raises:
            UserError: an unknown kind of glyphs, shape, colour, count or relation.
        """
        glyphs = data.get("glyphs", "shapes")
        if glyphs == "openmoji":
            from components.scenes.emoji import EmojiWorld

            return EmojiWorld(data)
        if glyphs != "shapes":
            raise UserError(f"data.glyphs is {glyphs!r}: set it to shapes or openmoji in params/.")
        return World(data)

    def _known_shapes(self) -> list[str]:
        return list(DISTANCE)

    def _hold_out(self) -> HeldOut:
        return HeldOut.choose(
            self.shapes, list(self.colors), self.counts, self.relations, self.data["held_out"]
        )

    @property
    def official(self) -> list[Metadata]:
        """GenEval's official prompts, where the world has its objects; else none."""
        return []

    def _check(self) -> None:
        place = "in params/data (data.{})"
        for what, given, known in (
            ("shapes", self.shapes, self._known_shapes()),
            ("colors", list(self.colors), list(tasks.OFFICIAL_COLORS)),
            ("counts", self.counts, list(tasks.NUMBER_WORDS)),
            ("relations", self.relations, list(tasks.RELATIONS)),
        ):
            unknown = [str(v) for v in given if v not in known]
            if unknown or not given:
                raise UserError(
                    f"Unknown or no value among {what}, {place.format(what)}: "
                    f"{', '.join(unknown) or 'empty'}; choose from "
                    f"{', '.join(str(k) for k in known)}."
                )

    # Drawing at random ---------------------------------------------------------------------

    def _zipf(self, rng: np.random.Generator, items: list[Any], n: int = 1) -> list[Any]:
        """`n` different items, the i-th with a weight of i^-zipf."""
        weights = [(i + 1) ** -float(self.data["zipf"]) for i in range(len(items))]
        chosen = []
        for _ in range(n):
            i = _weighted(rng, weights)
            chosen.append(items[i])
            weights[i] = 0.0
        return chosen

    def _sample_metadata(self, rng: np.random.Generator) -> Metadata:
        names = list(self.data["tasks"])
        task = names[_weighted(rng, [float(self.data["tasks"][name]) for name in names])]
        colors = list(self.colors)
        while True:
            if task in ("two_object", "position", "color_attr"):
                a, b = self._zipf(rng, self.shapes, 2)
            else:
                (a,) = self._zipf(rng, self.shapes)
            if task == "single_object":
                metadata = tasks.single_object(a)
            elif task == "two_object":
                metadata = tasks.two_object(a, b)
            elif task == "counting":
                metadata = tasks.counting(a, self._zipf(rng, self.counts)[0])
            elif task == "colors":
                metadata = tasks.colors(a, self._zipf(rng, colors)[0])
            elif task == "position":
                metadata = tasks.position(a, self._zipf(rng, self.relations)[0], b)
            else:
                color_a, color_b = self._zipf(rng, colors, 2)
                metadata = tasks.color_attr(a, color_a, b, color_b)
            if not self.is_held_out(metadata):
                return metadata

    def sample_scene(self, rng: np.random.Generator, aspect: float = 1.0) -> Scene:
        """A training scene: never a held-out combination, captioned or not."""
        return self.scene_for(self._sample_metadata(rng), rng, aspect, training=True)

    def scene_for(
        self,
        metadata: Metadata,
        rng: np.random.Generator,
        aspect: float = 1.0,
        training: bool = False,
    ) -> Scene:
        """A scene that is true of a prompt.

        Args:
            metadata: a prompt of this world, see components/scenes/tasks.py.
            rng: draws what the prompt leaves open.
            aspect: width / height.
            training: also what the prompt leaves open must not be held out, so that
                `two_object` never shows a held-out colour or arrangement.
        """
        names = list(self.data["sources"])
        source = names[_weighted(rng, [float(self.data["sources"][n]["share"]) for n in names])]
        for attempt in range(10_000):
            if attempt % 50 == 0:
                # One colour for all of a clause: three circles are three alike.
                colors = [
                    c.get("color") or self._free_color(rng, c["class"]) for c in metadata["include"]
                ]
            # A crowded scene that does not fit is tried again a little smaller.
            objects = self._place(metadata, colors, rng, aspect, 0.98 ** (attempt // 50))
            if objects is None:
                continue
            scene = Scene(metadata, objects, aspect, source, self.data["sources"][source])
            if not training or not self.is_held_out(scene):
                return scene
        raise UserError(
            f"No place for the objects of '{metadata['prompt']}': make data.size, data.gap or "
            "data.margin in params/data smaller, or hold out fewer combinations."
        )

    def _place(
        self,
        metadata: Metadata,
        colors: list[str],
        rng: np.random.Generator,
        aspect: float,
        shrink: float,
    ) -> tuple[SceneObject, ...] | None:
        total = sum(clause["count"] for clause in metadata["include"])
        low, high = self.data["size"][str(total) if str(total) in self.data["size"] else total]
        gap, margin = float(self.data["gap"]), float(self.data["margin"])
        span_x, span_y = max(aspect, 1.0), max(1 / aspect, 1.0)
        placed: list[SceneObject] = []
        groups: list[list[SceneObject]] = []
        for clause, color in zip(metadata["include"], colors, strict=True):
            group: list[SceneObject] = []
            for _ in range(clause["count"]):
                size = self._snap((low + (high - low) * rng.random()) * shrink, "size_lattice")
                still = self._thing(rng, clause["class"], color, size)
                w, h = (margin + half for half in still.box()[2:])
                for at_x, at_y in rng.random((PLACES, 2)):
                    x = self._snap(w + (span_x - 2 * w) * at_x, "lattice")
                    y = self._snap(h + (span_y - 2 * h) * at_y, "lattice")
                    thing = still.at(x, y)
                    inside = w <= x <= span_x - w and h <= y <= span_y - h
                    if inside and not any(_too_near(thing.box(), o.box(), gap) for o in placed):
                        break
                else:
                    return None
                group.append(thing)
                placed.append(thing)
            if "position" in clause:
                relation, index = clause["position"]
                if relation not in relative_position(group[0].box(), groups[index][0].box()):
                    return None
            groups.append(group)
        return tuple(placed)

    def _free_color(self, rng: np.random.Generator, shape: str) -> str:
        """A colour for what a prompt gives none to."""
        return self._zipf(rng, list(self.colors))[0]

    def _thing(self, rng: np.random.Generator, shape: str, color: str, size: float) -> SceneObject:
        """One object around the origin."""
        return SceneObject(shape, color, self.colors[color], 0.0, 0.0, size)

    def draw(self, scene: Scene, width: int, height: int, rng: np.random.Generator) -> NDArray:
        """See `components.scenes.draw.draw_scene`."""
        from components.scenes.draw import draw_scene

        return draw_scene(scene, width, height, rng)

    def _snap(self, length: float, lattice: str) -> float:
        """A length to the nearest multiple of 1/lattice of the shorter side; 0 leaves it."""
        cells = int(self.data[lattice])
        return round(length * cells) / cells if cells else length

    # Held out ------------------------------------------------------------------------------

    def is_held_out(self, what: Metadata | Scene) -> bool:
        """Whether a prompt asks for, or a scene shows, a held-out combination."""
        if isinstance(what, Scene):
            return self.held_out.scene([(o.shape, o.color, o.box()) for o in what.objects])
        return self.held_out.prompt(what)

    def all_prompts(self, task: str) -> list[Metadata]:
        """Every prompt of a task that the world knows, in a fixed order."""
        shapes, colors = self.shapes, list(self.colors)
        pairs = [(a, b) for a in shapes for b in shapes if a != b]
        if task == "single_object":
            return [tasks.single_object(a) for a in shapes]
        if task == "two_object":
            return [tasks.two_object(a, b) for a, b in pairs]
        if task == "counting":
            return [tasks.counting(a, n) for a in shapes for n in self.counts]
        if task == "colors":
            return [tasks.colors(a, c) for a in shapes for c in colors]
        if task == "position":
            return [tasks.position(a, r, b) for a, b in pairs for r in self.relations]
        if task == "color_attr":
            return [
                tasks.color_attr(a, c, b, d)
                for a, b in pairs
                for c in colors
                for d in colors
                if c != d
            ]
        raise UserError(f"No task '{task}': choose from {', '.join(tasks.TASKS)}.")

    def prompts(self, split: str, task: str) -> list[Metadata]:
        """The prompts of a task that are `seen` or `held_out`."""
        if split not in ("seen", "held_out"):
            raise UserError(f"No split '{split}': choose seen or held_out.")
        wanted = split == "held_out"
        return [m for m in self.all_prompts(task) if self.is_held_out(m) == wanted]

    def benchmark_prompts(self, split: str, task: str) -> list[Metadata]:
        """The prompts of `prompts` that a model is scored on."""
        return self.prompts(split, task)

    def training_prompts(self) -> list[Metadata]:
        """Every prompt that training, references and preference pairs may use."""
        return [m for task in tasks.TASKS for m in self.prompts("seen", task)]


def _weighted(rng: np.random.Generator, weights: list[float]) -> int:
    """An index, drawn in proportion to the weights."""
    at = rng.random() * sum(weights)
    for i, weight in enumerate(weights):
        at -= weight
        if at < 0:
            return i
    return max(i for i, weight in enumerate(weights) if weight > 0)


def _too_near(a: Box, b: Box, gap: float) -> bool:
    apart_x = max(a[0] - b[2], b[0] - a[2])
    apart_y = max(a[1] - b[3], b[1] - a[3])
    return max(apart_x, apart_y) < gap
