"""A scene: what a picture shows, where, and its caption."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from components.scenes.shapes import BOX
from components.scenes.tasks import Metadata

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class SceneObject:
    """One object: centre and size in units of the picture's shorter side."""

    shape: str
    color: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    size: float

    def box(self) -> Box:
        """x1, y1, x2, y2 in units of the shorter side."""
        w, h = BOX[self.shape]
        w, h = w * self.size / 2, h * self.size / 2
        return (self.x - w, self.y - h, self.x + w, self.y + h)

    def at(self, x: float, y: float) -> "SceneObject":
        """The same thing with its centre elsewhere."""
        return replace(self, x=x, y=y)


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and its caption. `aspect` is width / height."""

    metadata: Metadata
    objects: tuple[SceneObject, ...]
    aspect: float
    source: str
    style: Mapping[str, Any] = field(repr=False)

    @property
    def caption(self) -> str:
        """The caption, in GenEval's wording."""
        return self.metadata["prompt"]

    @property
    def task(self) -> str:
        """One of GenEval's six."""
        return self.metadata["tag"]

    def boxes(self, width: int, height: int) -> list[Box]:
        """The objects' boxes in a picture of this many pixels."""
        unit_w, unit_h = max(self.aspect, 1.0), max(1 / self.aspect, 1.0)
        sx, sy = width / unit_w, height / unit_h
        # Slightly another aspect than the scene's: objects keep theirs.
        unit = min(sx, sy)
        boxes = []
        for thing in self.objects:
            x1, y1, x2, y2 = thing.box()
            cx, cy = thing.x * sx, thing.y * sy
            w, h = (x2 - x1) * unit / 2, (y2 - y1) * unit / 2
            boxes.append((cx - w, cy - h, cx + w, cy + h))
        return boxes

    def truth(self, width: int, height: int) -> dict[str, Any]:
        """Exact ground truth in pixels, as the raw JSON keeps it."""
        return {
            "task": self.task,
            "objects": [
                {"class": o.shape, "color": o.color, "box": [round(v, 2) for v in box]}
                for o, box in zip(self.objects, self.boxes(width, height), strict=True)
            ],
        }
