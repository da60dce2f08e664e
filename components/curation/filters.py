"""Filters: each scores a batch of pictures and compares the score with its threshold.

A filter is a small typed stage: `setup` loads what it needs once a process, `score` gives one
number a picture, `keeps` holds it against the threshold, which comes from params. The quality
filters measure distortion (blur, noise, blankness), not beauty; each is named by what it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

BOX_5, BOX_9 = np.ones((5, 5), np.uint8), np.ones((9, 9), np.uint8)


@dataclass
class Picture:
    """A decoded sample as filters see it: pixels uint8 RGB (H, W, 3), caption, metadata."""

    key: str
    pixels: np.ndarray
    caption: str
    meta: dict[str, Any]

    @property
    def shorter(self) -> int:
        """The shorter side in pixels."""
        return int(min(self.pixels.shape[:2]))


class Filter(ABC):
    """A named score with a threshold. `keep_high`: scores from the threshold up are kept."""

    name: str
    keep_high: bool = False
    dear: bool = False  # runs a model: applied to survivors of the cheap filters only
    reason: str

    def __init__(self, threshold: float) -> None:
        self.threshold = float(threshold)

    def setup(self) -> None:  # noqa: B027 - most filters load nothing
        """Load models; called once in each worker process."""

    @abstractmethod
    def score(self, batch: Sequence[Picture]) -> np.ndarray:
        """Return one number a picture, float64 (B,); NaN where it was not looked at."""

    def keeps(self, scores: np.ndarray) -> np.ndarray:
        """Return bool (B,); a picture without a score is kept."""
        if self.keep_high:
            return np.isnan(scores) | (scores >= self.threshold)
        return np.isnan(scores) | (scores <= self.threshold)


class Measure(Filter):
    """A filter whose score is a plain function of one picture."""

    def __init__(
        self,
        name: str,
        function: Callable[[Picture], float],
        threshold: float,
        keep_high: bool,
        reason: str,
    ) -> None:
        super().__init__(threshold)
        self.name, self.function = name, function
        self.keep_high, self.reason = keep_high, reason

    def score(self, batch: Sequence[Picture]) -> np.ndarray:
        """Apply the function to each picture."""
        return np.array([self.function(p) for p in batch], np.float64)


def aspect(picture: Picture) -> float:
    """Longer side over shorter side, at least 1."""
    height, width = picture.pixels.shape[:2]
    return max(width, height) / min(width, height)


def caption_letters(picture: Picture) -> float:
    """Number of letters in the caption."""
    return float(sum(c.isalpha() for c in picture.caption))


def _luminance(pixels: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)


def contrast(picture: Picture) -> float:
    """Strongest local contrast in levels of 255; near 0 for a blank picture.

    Median-filtered first (noise is not content), then the range within 9 × 9 pixels, of the
    channel where it is widest; the 99th percentile over the picture. A smooth gradient across
    the picture stays blank.
    """
    calm = cv2.medianBlur(picture.pixels, 3)
    span = cv2.subtract(cv2.dilate(calm, BOX_9), cv2.erode(calm, BOX_9)).max(axis=2)
    return float(np.percentile(span, 99))


def noise(picture: Picture) -> float:
    """Standard deviation of pixel noise in levels of 255.

    Immerkær, "Fast noise variance estimation" (CVIU 1996): a Laplacian difference that is
    blind to planes; the median in place of his mean, so that edges do not count as noise.
    """
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    response = cv2.filter2D(_luminance(picture.pixels), cv2.CV_32F, kernel)
    return float(np.median(np.abs(response)) / (0.6745 * 6))


def sharpness(picture: Picture) -> float:
    """Steepness of the strongest edges, 0 to 1: one pixel's step over the whole step.

    At each pixel and channel the step to its neighbour is divided by the range within 9 × 9
    pixels; the 90th percentile over the steepest places of the strongest edges (range at least
    half of the picture's largest). 1 is an edge one pixel wide; a Gaussian blur of σ pixels
    gives about 0.4/σ. Independent of contrast and of how much of the picture is edge. Channels
    apart, because an object may differ from its ground in one of them only.
    """
    calm = cv2.medianBlur(picture.pixels, 3)
    span = cv2.subtract(cv2.dilate(calm, BOX_9), cv2.erode(calm, BOX_9))
    step = np.zeros_like(calm)
    step[:, :-1] = cv2.absdiff(calm[:, 1:], calm[:, :-1])
    step[:-1] = np.maximum(step[:-1], cv2.absdiff(calm[1:], calm[:-1]))
    least = max(1, int(span.max()) // 2)
    strong = (span >= least) & (step >= cv2.dilate(step, BOX_5))
    ratios = step[strong] / span[strong].astype(np.float32)
    return float(np.percentile(ratios, 90)) if ratios.size else 0.0


def cheap_filters(curation: Mapping[str, Any]) -> list[Filter]:
    """The filters that look at every decodable picture, cheapest first.

    curation: the params of this name. Names the thresholds are found under: caption.letters,
    resolution.shorter_side, aspect.ratio, contrast.levels, sharpness.ratio, noise.levels.
    """
    return [
        Measure("caption", caption_letters, curation["caption"]["letters"], True,
                "caption with {score:.0f} letters, at least {threshold:.0f} wanted"),
        Measure("resolution", lambda p: float(p.shorter), curation["resolution"]["shorter_side"],
                True, "shorter side {score:.0f} px, at least {threshold:.0f} wanted"),
        Measure("aspect", aspect, curation["aspect"]["ratio"], False,
                "sides 1:{score:.2f}, at most 1:{threshold:g} wanted"),
        Measure("contrast", contrast, curation["contrast"]["levels"], True,
                "blank: local contrast of {score:.0f} levels, at least {threshold:g} wanted"),
        Measure("noise", noise, curation["noise"]["levels"], False,
                "noisy: {score:.1f} levels, at most {threshold:g} wanted"),
        Measure("sharpness", sharpness, curation["sharpness"]["ratio"], True,
                "blurred: edge steepness {score:.3f}, at least {threshold:g} wanted"),
    ]  # fmt: skip
