"""Scores a folder of pictures by GenEval: tasks, chance floor, standard errors, splits."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.errors import UserError
from components.evaluation.boxes import check_detections, check_names, read_detections
from components.evaluation.checks import check_pictures, check_samples
from components.evaluation.detector import Detections, Detector
from components.evaluation.embedded import detector_of
from components.evaluation.folder import Sample, read_folder
from components.evaluation.geneval import found, meets, reasons
from components.evaluation.statistics import spreads, task_means
from components.files import atomic_file
from components.progress import Progress
from components.scenes.tasks import TASKS, Metadata, meaning
from components.scenes.world import World


@dataclass(frozen=True)
class Scored:
    """One scored picture. `chance`: mean score under other prompts. `split`: "" without a world."""

    sample: Sample
    detections: Detections
    correct: bool
    reason: str
    chance: float
    split: str

    def line(self) -> dict[str, Any]:
        """The official result line; its details are the boxes that count, by class."""
        counted = found(self.sample.metadata, self.detections)
        return {
            "filename": self.sample.filename,
            "tag": self.sample.metadata["tag"],
            "prompt": self.sample.metadata["prompt"],
            "correct": self.correct,
            "reason": self.reason,
            "metadata": json.dumps(self.sample.metadata),
            "details": json.dumps(
                {name: [item[:5] for item in items] for name, items in counted.items()}
            ),
        }


def detect_all(samples: Sequence[Sample], detector: Detector, what: str) -> list[Detections]:
    """Detect every picture, after the detector's self-test at each size.

    Args:
        samples: from `read_folder`.
        detector: see `Detector`.
        what: named in the progress lines.

    Raises:
        UserError: damaged pictures, a failed self-test, or classes under other names.
    """
    check_pictures(samples)
    tested: set[tuple[int, int]] = set()
    progress = Progress(f"detecting {what}", len(samples), "pictures")
    found = []
    for i, sample in enumerate(samples):
        image = sample.open()
        if image.size not in tested:
            detector.self_test(*image.size)
            tested.add(image.size)
        colored = {c["class"] for c in sample.metadata["include"] if "color" in c}
        found.append(detector.detect(image, colored))
        progress.at(i + 1)
    check_names(f"The detector {detector.about().get('detector', '')}", samples, found)
    return found


def score_samples(
    samples: Sequence[Sample],
    detections: Sequence[Detections],
    settings: Mapping[str, Any],
    world: World | None,
) -> list[Scored]:
    """Score each picture under its own prompt and under others of its task.

    Chance floor: the mean score of the same picture under `settings["other_prompts"]` other
    prompts of the same task that mean something else, drawn with a fixed seed; from the world's
    prompts, without a world from the folder's own.
    """
    rng, most = np.random.default_rng(int(settings["seed"])), int(settings["other_prompts"])
    # Pictures of one prompt share its metadata: what depends on that alone is found once.
    prompts = {id(s.metadata): s.metadata for s in samples}
    others = dict(zip(prompts, _unlike(list(prompts.values()), world), strict=True))
    scored = []
    for sample, seen in zip(samples, detections, strict=True):
        pool = others[id(sample.metadata)]
        order = rng.permutation(len(pool))[:most].tolist()
        counted, held = found(sample.metadata, seen), 0
        classes = counted.keys()
        for i in order:
            other, wanted = pool[i]
            # Most are told from the classes alone.
            if wanted <= classes and meets(other, counted):
                held += 1
        reason = reasons(sample.metadata, counted)
        split = ""
        if world is not None:
            split = "held_out" if world.is_held_out(sample.metadata) else "seen"
        floor = held / len(order) if len(order) else 0.0
        scored.append(Scored(sample, seen, not reason, reason, floor, split))
    return scored


def _unlike(
    prompts: Sequence[Metadata], world: World | None
) -> list[list[tuple[Metadata, frozenset[str]]]]:
    """For each prompt those of its task that mean something else, with the classes they need."""
    pools: dict[str, list[Metadata]] = {}
    for metadata in {json.dumps(m): m for m in prompts}.values():
        pools.setdefault(metadata["tag"], []).append(metadata)
    if world is not None:
        pools = {task: world.all_prompts(task) for task in pools}
    told = {
        task: [(m, frozenset(clause["class"] for clause in m["include"])) for m in pool]
        for task, pool in pools.items()
    }
    same: dict[tuple[Any, ...], list[int]] = {}  # a meaning begins with its task
    for pool in pools.values():
        for i, metadata in enumerate(pool):
            same.setdefault(meaning(metadata), []).append(i)
    unlike: dict[tuple[Any, ...], list[tuple[Metadata, frozenset[str]]]] = {}
    meanings = [meaning(metadata) for metadata in prompts]
    for metadata, own in zip(prompts, meanings, strict=True):
        if own not in unlike:
            unlike[own] = list(told[metadata["tag"]])
            for i in reversed(same.get(own, [])):
                del unlike[own][i]
    return [unlike[own] for own in meanings]


def summary(scored: Sequence[Scored], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Overall and by task, with chance floor, standard errors and the paired difference.

    Overall is the unweighted mean of the tasks. `difference` is picture by picture the score
    minus its chance floor, with a 95 % interval; bootstrap clustered by prompt throughout.
    """
    names = [s.sample.metadata["tag"] for s in scored]
    prompts = [s.sample.metadata["prompt"] for s in scored]
    right = [float(s.correct) for s in scored]
    floor = [s.chance for s in scored]
    resamples, seed = int(settings["bootstrap"]), int(settings["seed"])
    difference = [a - b for a, b in zip(right, floor, strict=True)]
    score, chance, gain = spreads([right, floor, difference], names, prompts, resamples, seed)
    means, floors = task_means(right, names), task_means(floor, names)
    order = [t for t in TASKS if t in means] + [t for t in means if t not in TASKS]
    return {
        "overall": round(score.mean, 4),
        "tasks": {task: round(means[task], 4) for task in order},
        "n": len(scored),
        "prompts": len(set(prompts)),
        "stderr": round(score.stderr, 4),
        "chance": round(chance.mean, 4),
        "chance_stderr": round(chance.stderr, 4),
        "chance_tasks": {task: round(floors[task], 4) for task in order},
        "difference": gain.interval(),
    }


def result(scored: Sequence[Scored], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON result. With a world the headline is held-out, `seen` and `all` beside it.

    A task whose every prompt is seen (single_object: one shape alone is no combination) stands
    in both splits, is named under `shared`, and `combinations` is the mean without it.
    """
    everything = summary(scored, settings)
    if not scored or not scored[0].split:
        return everything
    tasks = {s.sample.metadata["tag"] for s in scored}
    with_held_out = {s.sample.metadata["tag"] for s in scored if s.split == "held_out"}
    shared = sorted(tasks - with_held_out)
    if not with_held_out:
        return everything | {"seen": everything, "all": everything, "shared": shared}
    parts = {}
    for split in ("seen", "held_out"):
        part = [s for s in scored if s.split == split or s.sample.metadata["tag"] in shared]
        parts[split] = summary(part, settings)
        own = [v for task, v in parts[split]["tasks"].items() if task not in shared]
        parts[split]["combinations"] = round(float(np.mean(own)), 4)
    return parts["held_out"] | {
        "seen": parts["seen"],
        "held_out": parts["held_out"],
        "all": everything,
        "shared": shared,
    }


def write_results(file: Path, scored: Sequence[Scored]) -> None:
    """Write the official result lines, all or nothing."""
    with atomic_file(file) as temporary:
        temporary.write_text("".join(json.dumps(s.line()) + "\n" for s in scored))


def score_folder(
    folder: Path,
    settings: Mapping[str, Any],
    world: World | None,
    detections: Path | None = None,
    detector: Detector | None = None,
) -> tuple[dict[str, Any], list[Scored]]:
    """Score pictures in GenEval's official layout.

    Args:
        folder: holds 00000/metadata.jsonl, 00000/samples/0000.png, …. Where detections are given
            the pictures need not be there.
        settings: `params["evaluation"]`.
        world: its detector is used and its held-out set splits the result, if the prompts are its.
        detections: a file of detections made elsewhere, instead of a detector.
        detector: another than the world's; not beside detections.

    The result says under `scored_by` what made the boxes.

    Raises:
        UserError: no detector; a folder or detections that would be scored
            wrongly (see `checks`), or a failed self-test.
    """
    by_name = {} if detections is None else read_detections(detections)
    samples = read_folder(folder, by_name)
    check_samples(samples)
    foreign = sorted(
        {c["class"] for s in samples for c in s.metadata["include"]}
        - set(world.shapes if world else [])
    )
    if foreign:
        world = None  # another world's prompts: no held-out set, and no detector of ours
    if detections is not None:
        check_detections(detections, by_name, samples)
        found = [by_name[s.filename] for s in samples]
        scored_by: dict[str, Any] = {"detections": str(detections)}
    else:
        if detector is None and world is not None:
            detector = detector_of(world, settings["detector"])
        if detector is None:
            raise UserError(
                f"The embedded detector does not know {', '.join(foreign[:5])} in {folder}; choose "
                "--detector mask2former, or give detections made elsewhere with --detections FILE."
            )
        found = detect_all(samples, detector, folder.name.split(".tmp-")[0])
        scored_by = detector.about()
    scored = score_samples(samples, found, settings, world)
    return result(scored, settings) | {"scored_by": scored_by}, scored
