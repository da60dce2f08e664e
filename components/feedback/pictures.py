"""Training prompts, and the current model's pictures of them with GenEval's verdict."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from components.errors import UserError
from components.evaluation.detector import Detector
from components.evaluation.drawing import draw_pictures
from components.evaluation.geneval import score_image
from components.scenes.world import World

BATCH = 16  # pictures drawn at once by each process

Metadata = dict[str, Any]


@dataclass
class Judged:
    """A picture that the model drew, and GenEval's word on it."""

    prompt_index: int
    metadata: Metadata
    seed: int
    image: Image.Image
    correct: bool
    reason: str


def training_prompts(world: World) -> list[Metadata]:
    """The prompts that training may use. UserError if a held-out combination is among them."""
    prompts = world.training_prompts()
    leaked = [m["prompt"] for m in prompts if world.is_held_out(m)]
    if leaked:
        raise UserError(
            f"{len(leaked)} training prompts ask for held-out combinations ({leaked[0]!r}, …); "
            "correct data.held_out in params/data."
        )
    return prompts


def cover(
    prompts: Sequence[Metadata], notions: Sequence[str], count: int, seed: int
) -> list[Metadata]:
    """Choose `count` different prompts, as many of each task, that cover the notions evenly.

    Task by task in turn, of a few prompts drawn at random the one whose notions were chosen
    least so far. Fewer when there are no more.
    """
    rng = np.random.default_rng([seed, len(prompts)])
    left: dict[str, list[Metadata]] = {}
    for i in rng.permutation(len(prompts)):
        left.setdefault(prompts[i]["tag"], []).append(prompts[i])
    times = dict.fromkeys(notions, 0)

    def among(metadata: Metadata) -> list[str]:
        # From the beginning of a word, so that a plural counts as its noun.
        return [word for word in times if f" {word}" in f" {metadata['prompt'].lower()}"]

    chosen: list[Metadata] = []
    while len(chosen) < count and left:
        for tag in sorted(left):
            if len(chosen) == count:
                break
            pool = left[tag][:32]

            def seldom(metadata: Metadata) -> float:
                found = [times[word] for word in among(metadata)]
                return float(np.mean(found)) if found else np.inf

            best = min(range(len(pool)), key=lambda i: seldom(pool[i]))
            metadata = left[tag].pop(best)
            chosen.append(metadata)
            for word in among(metadata):
                times[word] += 1
            if not left[tag]:
                del left[tag]
    return chosen


def draw_and_judge(
    model: Path,
    detector: Detector,
    prompts: Sequence[Metadata],
    images: int,
    size: tuple[int, int],
    first_seed: int,
    what: str,
    sampler: Mapping[str, Any],
    workers: int,
) -> Iterator[Judged]:
    """Draw `images` pictures of each prompt at size (W, H) px with seeds counted from `first_seed`.

    `model` is a saved pipeline, `sampler` replaces settings of its sampler, `workers` processes
    draw. Yields in the prompts' order. Raises UserError as `draw_pictures` does.
    """
    jobs = [(i, m) for i, m in enumerate(prompts) for _ in range(images)]
    seeds = range(first_seed, first_seed + len(jobs))
    wanted = [(m["prompt"], seed) for (_, m), seed in zip(jobs, seeds, strict=True)]
    drawn = draw_pictures(model, wanted, size, BATCH, sampler, workers, what)
    for (i, metadata), seed, image in zip(jobs, seeds, drawn, strict=True):
        detections = detector.detect(image)
        correct, reason = score_image(metadata, detections)
        yield Judged(i, metadata, seed, image, bool(correct), reason)
