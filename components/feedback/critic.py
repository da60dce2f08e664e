"""The critic: what does the model already do well? (paper, section 3.2)

Direction: score = probability that the model already does a picture's content well; the
second phase drops a sample with that probability. The paper's text explains the score once
the other way round; only this way fits what it does with it.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from components.errors import UserError
from components.feedback.labels import Labelled, label
from components.feedback.retrieval import folds, labelled_pictures
from components.files import atomic_file, atomic_folder, write_json
from components.processes import spread
from components.progress import Progress
from components.tokens.pictures import keys_hash, read_manifest
from components.tracking import Tracker

AT_ONCE = 1024  # pictures read and scored together
LABELLED_BY = {
    "auto": "the benchmark's rule",
    "simulated": "a simulated rater: ground truth plus noise, no person",
    "human": "people",
}
FIGURES = ("labelled", "positive_share", "auroc", "ece", "brier", "mean_score", "score_seconds",
           "score_microseconds", "labels_disagree", "drops")  # fmt: skip


def critic(
    references: Path,
    curated: Path,
    previous: Path | None,
    labels: Path,
    out: Path,
    metrics_out: Path,
    round_name: str,
    params: dict[str, Any],
    tracker: Tracker,
) -> dict[str, Any]:
    """Train round `round_name`'s critic and score every curated picture.

    `references` is what `references.references` wrote, `previous` the critics folder of the
    round before or None, `labels` the JSON lines of people's labels (read only if the round's
    labels are theirs). Writes into `out` config.json, report.json, scores.npy (float32, in the
    order of `read_manifest`) and scores.parquet (key, score), and of a critic that is used
    critic.safetensors and critic.png; returns the report, also in `metrics_out`. With
    `feedback.critic: none` no scores and no weights.

    When the labels are all of one class or too few, or the critic is no better than chance on
    labels held out, every score is the share of positive labels, config.json says `drops: false`
    and why, and nothing is dropped.

    Raises:
        UserError: labels by people that cannot be read, a curated set that is damaged, or a
            critic that there is none of.
    """
    kind = params["feedback"]["critic"]
    if kind not in ("none", "resnet18"):
        raise UserError(
            f"feedback.critic is {kind!r}; set it to resnet18 or none in params/feedback."
        )
    with atomic_folder(out) as folder:
        if kind == "none":
            report: dict[str, Any] = {
                "critic": "none",
                "drops": False,
                "why": "feedback.critic: none",
            }
            write_json(folder / "config.json", report)
        else:
            said = params["feedback"]["rounds"][round_name]["labels"]
            rater = params["feedback"]["simulated_rater"]
            labelled = label(Path(references), said, labels, rater, int(params["seed"]))
            if "fallback" in labelled.facts:
                print(f"critic: automatic labels for {labels}: {labelled.facts['fallback']}")
            report = _critic(
                Path(references), Path(curated), previous, labelled, folder, round_name, params
            )
        # Without times: they would make another output of the same critic.
        timed = ("score_seconds", "score_microseconds")
        write_json(folder / "report.json", {k: v for k, v in report.items() if k not in timed})
    write_json(Path(metrics_out), report)
    if kind != "none":
        _track(tracker, Path(out), report)
    return report


def _track(tracker: Tracker, out: Path, report: Mapping[str, Any]) -> None:
    figures = {name: report[name] for name in FIGURES if report.get(name) is not None}
    figures["labels_fell_back"] = "fallback" in report
    tracker.log_metrics({f"critic/{name}": float(value) for name, value in figures.items()})
    tags = {"labels": report["labels"], "labelled_by": report["labelled_by"]}
    for name in ("fallback", "why"):
        if name in report:
            tags[f"critic.{name}"] = report[name]
    tracker.set_tags(tags)
    for name in ("report.json", "config.json", "critic.png"):
        if (out / name).is_file():
            tracker.log_artifact(out / name, "critic")


@dataclass(frozen=True)
class CuratedSet:
    """The curated pictures as the critic sees them: small and square."""

    folder: Path
    keys: pd.Index  # in the order of `read_manifest`
    size: int  # px
    limits: Mapping[str, int]

    @staticmethod
    def open(folder: Path, size: int, limits: Mapping[str, int]) -> "CuratedSet":
        """Read the manifest's keys."""
        return CuratedSet(folder, pd.Index(read_manifest(folder)["key"].astype(str)), size, limits)

    def pictures(self, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows (m,) and uint8 pictures (m, size, size, 3) of the rows `wanted`, part by part.

        UserError when one of them is in no shard.
        """
        # Not before it is needed: a critic that is not trained must not pay for their import.
        from components.curation.shards import list_shards
        from components.feedback.pixels import small_pictures

        row_of = dict(zip(self.keys[wanted], wanted.tolist(), strict=True))
        seen = np.zeros(len(self.keys), bool)
        rows: list[int] = []
        arrays: list[np.ndarray] = []
        for shard in list_shards(self.folder):
            for key, array in small_pictures(shard, self.size, self.limits, row_of):
                if key in row_of:  # unreadable ones are not asked for, but come
                    rows.append(row_of[key])
                    arrays.append(array)
                if len(rows) == AT_ONCE:
                    seen[rows] = True
                    yield np.array(rows), np.stack(arrays)
                    rows, arrays = [], []
        if rows:
            seen[rows] = True
            yield np.array(rows), np.stack(arrays)
        missing = wanted[~seen[wanted]]
        if len(missing):
            raise UserError(
                f"{self.folder}: {len(missing)} pictures of the manifest are in no shard "
                f"({self.keys[missing[0]]}, …); run the curate stage again."
            )


def _critic(
    references: Path,
    curated: Path,
    previous: Path | None,
    said: Labelled,
    folder: Path,
    round_name: str,
    params: dict[str, Any],
) -> dict[str, Any]:
    feedback, settings = params["feedback"], params["feedback"]["critic_training"]
    threshold = float(feedback["similarity"][said.threshold])
    labelled, counts = labelled_pictures(references, said.table, threshold)
    positive = float(labelled["label"].mean()) if len(labelled) else 0.0
    whole = CuratedSet.open(curated, int(settings["size"]), params["curation"]["limits"])
    report: dict[str, Any] = {
        "critic": "resnet18",
        "round": round_name,
        "labels": feedback["rounds"][round_name]["labels"],
        "labelled_by": LABELLED_BY[said.by],
        **said.facts,
        "threshold": threshold,
        **counts,
        "labelled": len(labelled),
        "positive_share": positive,
    }
    config: dict[str, Any] = {
        "critic": "resnet18",
        "architecture": "timm resnet18, 1 output",
        "round": round_name,
        "previous": feedback["rounds"][round_name]["critic"],
        "size": whole.size,
        "keys": keys_hash(whole.keys),
    }
    why = _too_few(labelled, int(settings["least"]), int(settings["folds"]))
    if why:
        return _refuse(why, folder, whole, report | {"started_from": None}, config)

    # Torch only from here on: an empty set must not pay for its import.
    from components.feedback import classifier
    from components.feedback.quality import no_better_than_chance, quality
    from components.feedback.showcase import Showcase

    seed = int(params["seed"])
    places = whole.keys.get_indexer(pd.Index(labelled["key"]))
    if (places < 0).any():
        raise UserError(
            f"{references} names {labelled['key'][places < 0].iloc[0]}, which {curated} has not; "
            "run the references stage again on this curated set."
        )
    small = {
        int(row): array
        for rows, arrays in whole.pictures(places)
        for row, array in zip(rows, arrays, strict=True)
    }
    pictures = np.stack([small[int(row)] for row in places])
    truth, whose = labelled["label"].to_numpy(bool), labelled["reference"].to_numpy()
    print(f"critic: {len(labelled)} labelled pictures, {positive:.2f} positive")
    # Judged by critics that each learned without a part of the references, on that part: of a
    # few hundred labels one part alone says next to nothing. The one that is kept learns all.
    parts = folds(truth, whose, int(settings["folds"]), seed)
    judged = [(f"critic without part {i}", *part) for i, part in enumerate(parts, 1)]
    kept, *judges = spread(
        partial(classifier.learner, pictures, truth, previous, settings, seed),
        [("critic", np.arange(len(truth)), np.arange(0)), *judged],  # what takes longest first
        int(feedback["workers"]),
        "A process that trained a critic ended by itself, most often for want of memory: set "
        "feedback.workers to 1 and run the stage again.",
    )
    held = np.empty(len(truth), np.float32)
    for (_, out), judge in zip(parts, judges, strict=True):
        held[out] = judge.held
    print(f"critic: learned from {kept.started}")
    report |= {"started_from": kept.started, **quality(truth, held, whose, seed)}
    why = no_better_than_chance(report)
    if why:
        return _refuse(why, folder, whole, report, config)
    network, report["losses"] = kept.network, kept.losses

    showcase, began, done = Showcase(int(settings["shown"])), time.monotonic(), 0
    scores = np.empty(len(whole.keys), np.float32)
    progress = Progress("critic scores", len(scores), "pictures")
    for rows, arrays in whole.pictures(np.arange(len(scores))):
        values = scores[rows] = classifier.score(network, arrays)
        for array, value in zip(arrays, values.tolist(), strict=True):
            showcase.offer(array, value)
        done += len(rows)
        progress.at(done)
    seconds = time.monotonic() - began
    report |= {
        "drops": True,
        "mean_score": float(scores.mean()),
        # Of reading, decoding and scoring, in one thread; phase 2 pays nothing of it.
        "score_seconds": round(seconds, 2),
        "score_microseconds": round(1e6 * seconds / len(scores), 1),
    }
    classifier.save(folder, network, config | {"drops": True, "started_from": kept.started})
    _write_scores(folder, whole.keys, scores)
    showcase.draw(folder / "critic.png", report)
    return report


def _too_few(labelled: pd.DataFrame, least: int, parts: int) -> str | None:
    """Why no critic can be learned from these labels, or None."""
    classes = [labelled[labelled["label"] == word] for word in (True, False)]
    pictures = min(len(mine) for mine in classes)
    references = min(mine["reference"].nunique() for mine in classes)
    if pictures >= least and references >= parts:
        return None
    return (
        f"of {len(labelled)} labelled pictures the smaller class has {pictures}, with the labels "
        f"of {references} reference pictures; {least} and {parts} are needed"
    )


def _refuse(
    reason: str,
    folder: Path,
    whole: CuratedSet,
    report: dict[str, Any],
    config: dict[str, Any],
) -> dict[str, Any]:
    """Write a critic that drops nothing, and no weights, so that no later one starts from them."""
    positive = report["positive_share"]
    why = (
        f"No critic is used: {reason}. Every score is the share of positive labels "
        f"({positive:.3f}) and nothing is dropped."
    )
    print(f"critic: {why}", flush=True)
    _write_scores(folder, whole.keys, np.full(len(whole.keys), positive, np.float32))
    write_json(folder / "config.json", config | {"drops": False, "why": why})
    return report | {"drops": False, "why": why, "mean_score": positive}


def _write_scores(folder: Path, keys: pd.Index, scores: np.ndarray) -> None:
    with atomic_file(folder / "scores.npy") as temporary, temporary.open("wb") as file:
        np.save(file, scores, allow_pickle=False)
    with atomic_file(folder / "scores.parquet") as temporary:
        pd.DataFrame({"key": keys, "score": scores}).to_parquet(temporary, index=False)
