"""How fast boxes are scored by GenEval's rules: `python benchmarks/geneval.py`, one thread.

The official 553 prompts, four pictures each, with made-up boxes: the classes asked for and three
others, one to three of each. CPU seconds, best of five, each part on its own.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from components.compose import load
from components.evaluation.boxes import read_detections
from components.evaluation.folder import Sample
from components.evaluation.geneval import score_image
from components.evaluation.prompts import COCO, geneval_prompts
from components.evaluation.scoring import result, score_samples
from components.scenes.tasks import OFFICIAL_COLORS

IMAGES = 4


def made_up() -> tuple[list[Sample], list[dict[str, list[list[Any]]]]]:
    """Samples of the official prompts and boxes for each."""
    rng = np.random.default_rng(0)
    samples, detections = [], []
    for index, metadata in enumerate(geneval_prompts()):
        asked = {clause["class"] for clause in metadata["include"]}
        for number in range(IMAGES):
            names = asked | {COCO[i] for i in rng.choice(len(COCO), 3).tolist()}
            samples.append(Sample(f"{index:05d}/samples/{number:04d}.png", metadata, Path()))
            detections.append(
                {
                    name: [
                        [
                            *(512 * rng.random(4)).tolist(),
                            float(rng.random()),
                            OFFICIAL_COLORS[int(rng.integers(len(OFFICIAL_COLORS)))],
                        ]
                        for _ in range(int(rng.integers(1, 4)))
                    ]
                    for name in sorted(names)
                }
            )
    return samples, detections


def best(work: Callable[[], Any]) -> float:
    """CPU seconds of the fastest of five."""
    times = []
    for _ in range(5):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def main() -> None:
    settings = load()["evaluation"]
    samples, detections = made_up()
    scored = score_samples(samples, detections, settings, None)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "boxes.jsonl"
        pairs = zip(samples, detections, strict=True)
        file.write_text(
            "".join(json.dumps({"filename": s.filename, "detections": d}) + "\n" for s, d in pairs)
        )
        parts = {
            "rules alone": lambda: [
                score_image(s.metadata, d) for s, d in zip(samples, detections, strict=True)
            ],
            "rules and chance floor": lambda: score_samples(samples, detections, settings, None),
            "means and intervals": lambda: result(scored, settings),
            "reading the boxes": lambda: read_detections(file),
        }
        seconds = {name: best(work) for name, work in parts.items()}
    for name, taken in seconds.items():
        print(f"{name}: {1e6 * taken / len(samples):.1f} us a picture")
    whole = seconds["rules and chance floor"] + seconds["means and intervals"]
    print(f"a whole result: {len(samples) / whole:,.0f} pictures/s of {len(samples)}")
    print(f"with reading: {len(samples) / (whole + seconds['reading the boxes']):,.0f} pictures/s")


if __name__ == "__main__":
    main()
