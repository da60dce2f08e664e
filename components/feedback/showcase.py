"""A picture of what the critic learned: what it is surest of both ways, and its calibration."""

from pathlib import Path
from typing import Any

import numpy as np

from components.files import atomic_file


class Showcase:
    """The pictures that the critic is surest of, both ways."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.easy: list[tuple[float, np.ndarray]] = []
        self.hard: list[tuple[float, np.ndarray]] = []

    def offer(self, pixels: np.ndarray, score: float) -> None:
        """Keep uint8 (s, s, 3) if it is among the surest so far."""
        for kept, sign in ((self.easy, -1.0), (self.hard, 1.0)):
            kept.append((sign * score, pixels))
            kept.sort(key=lambda item: item[0])
            del kept[self.count :]

    def draw(self, out: Path, report: dict[str, Any]) -> None:
        """Write a PNG: hardest above, easiest below, calibration at the right."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(12, 3.2), dpi=100, width_ratios=[3, 1], layout="constrained"
        )
        rows = [np.concatenate([p for _, p in kept], axis=1) for kept in (self.hard, self.easy)]
        left.imshow(np.concatenate(rows, axis=0), interpolation="nearest")
        left.axis("off")
        left.set_title(
            f"surest: hard for the model (scores from {self.hard[0][0]:.2f}) above, "
            f"done well (to {-self.easy[0][0]:.2f}) below",
            fontsize=9,
        )
        table = report["calibration"]
        right.plot([0, 1], [0, 1], "k--", lw=1)
        right.plot([r["score"] for r in table], [r["positive"] for r in table], "o-")
        auroc = "none" if report["auroc"] is None else f"{report['auroc']:.3f}"
        right.set_title(f"calibration, held out; AUROC {auroc}", fontsize=9)
        right.set_xlabel("score")
        right.set_ylabel("share positive")
        with atomic_file(out) as temporary:
            figure.savefig(temporary, format="png")
        pyplot.close(figure)
