"""The detector that an embedded world brings, whichever world it is."""

from collections.abc import Mapping
from typing import Protocol

from PIL import Image

from components.evaluation.detector import Blob, Detector, SceneDetector
from components.scenes.world import World


class WorldDetector(Detector, Protocol):
    """A detector that also tells of what it could not name."""

    def blobs(self, image: Image.Image) -> list[Blob]:
        """Every patch of foreground, those that look like nothing known (low score) included."""


def detector_of(world: World, settings: Mapping[str, float]) -> WorldDetector:
    """The detector of a world; settings: `evaluation.detector`."""
    if world.data.get("glyphs") == "openmoji":
        from components.evaluation.emoji_detector import EmojiDetector

        return EmojiDetector(world, settings)
    return SceneDetector(world, settings)
