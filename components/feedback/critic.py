"""The critic: what does the model already do well? (paper, section 3.2)

Direction: score = probability that the model already does a picture's content well; the
second phase drops a sample with that probability. The paper's text explains the score once
the other way round; only this way fits what it does with it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from components.errors import UserError
from components.feedback.retrieval import inherit, read_human_labels, unit
from components.files import atomic_file, atomic_folder, write_json
from components.progress import Progress
from components.tracking import Tracker

SCORES = pd.DataFrame({"key": pd.Series([], dtype=str), "score": pd.Series([], dtype=np.float32)})


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a parquet file, whole or not at all."""
    with atomic_file(path) as temporary:
        table.to_parquet(temporary, index=False)


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
    round before or None, `labels` the JSON lines of human labels (read only if the round's
    labels are human). Writes into `out` critic.safetensors, config.json, scores.parquet
    (key, score), report.json and critic.png; returns the report, also in `metrics_out`. With
    `feedback.critic: none` an empty set. When the labels are all of one class or too few,
    every score is the share of positive labels, config.json says `drops: false` and why, and
    nothing is dropped.
    """
    feedback = params["feedback"]
    with atomic_folder(out) as folder:
        if feedback["critic"] == "none":
            write_table(folder / "scores.parquet", SCORES)
            report: dict[str, Any] = {
                "critic": "none",
                "drops": False,
                "why": "feedback.critic: none",
            }
            write_json(folder / "config.json", report)
        elif feedback["critic"] == "resnet18":
            report = _critic(
                Path(references), Path(curated), previous, labels, folder, round_name, params
            )
            flat = {
                f"critic/{key}": float(report[key])
                for key in ("labelled", "positive_share", "auroc", "mean_score")
                if report.get(key) is not None
            }
            tracker.log_metrics(flat)
            if (folder / "critic.png").is_file():
                tracker.log_artifact(folder / "critic.png")
        else:
            raise UserError(
                f"feedback.critic is {feedback['critic']!r}; set it to resnet18 or none "
                "in params/feedback/default.yaml."
            )
        write_json(folder / "report.json", report)
    write_json(Path(metrics_out), report)
    return report


def _critic(
    references: Path,
    curated: Path,
    previous: Path | None,
    labels: Path,
    folder: Path,
    round_name: str,
    params: dict[str, Any],
) -> dict[str, Any]:
    settings = params["feedback"]["critic_training"]
    kind = params["feedback"]["rounds"][round_name]["labels"]
    threshold = float(params["feedback"]["similarity"][kind])
    labelled, counts = labelled_pictures(references, kind, labels, threshold)
    size, seed = int(settings["size"]), int(params["seed"])
    keys = pd.read_parquet(curated / "manifest.parquet", columns=["key"])["key"].astype(str)
    positive = float(labelled["label"].mean()) if len(labelled) else 0.0
    report: dict[str, Any] = {
        "critic": "resnet18",
        "round": round_name,
        "labels": kind,
        "threshold": threshold,
        **counts,
        "labelled": len(labelled),
        "positive_share": positive,
    }
    config: dict[str, Any] = {
        "critic": "resnet18",
        "architecture": "timm resnet18, 1 output",
        "size": size,
    }
    least = int(labelled["label"].value_counts().reindex([True, False], fill_value=0).min())
    if least < int(settings["least"]):
        why = (
            f"The smaller class has {least} of {len(labelled)} labelled pictures, fewer than "
            f"{settings['least']}: no critic is trained, every score is the share of positive "
            f"labels ({positive:.3f}) and nothing is dropped."
        )
        print(f"critic: {why}", flush=True)
        report |= {"drops": False, "why": why, "started_from": None, "mean_score": positive}
        write_json(folder / "config.json", config | {"drops": False, "why": why})
        scores = pd.DataFrame({"key": keys, "score": np.full(len(keys), positive, np.float32)})
        write_table(folder / "scores.parquet", scores)
        return report

    # Torch only from here on: an empty set must not pay for its import.
    from components.curation.shards import list_shards
    from components.feedback import classifier
    from components.feedback.pixels import small_pictures
    from components.feedback.quality import quality

    wanted, limits = set(labelled["key"]), params["curation"]["limits"]
    small = {
        key: array
        for shard in list_shards(curated)
        for key, array in small_pictures(shard, size, limits, wanted)
    }
    _all_there(wanted, small, curated)
    pictures = np.stack([small[key] for key in labelled["key"]])
    truth = labelled["label"].to_numpy(bool)
    held_out = _held_out(truth, float(settings["held_out"]), seed)
    network, started = classifier.start(previous, seed)
    print(f"critic: {len(labelled)} labelled pictures, {positive:.2f} positive, from {started}")
    losses = classifier.train(network, pictures[~held_out], truth[~held_out], settings, seed)
    report |= {"drops": True, "started_from": started, "losses": losses}
    report |= quality(truth[held_out], classifier.score(network, pictures[held_out]), seed)
    classifier.save(folder, network, config | {"drops": True, "started_from": started})

    scored: dict[str, float] = {}
    showcase = Showcase(int(settings["shown"]))
    progress = Progress("critic scores", len(keys), "pictures")
    for shard in list_shards(curated):
        names, arrays = [], []
        for key, array in small_pictures(shard, size, limits):
            names.append(key)
            arrays.append(array)
        values = classifier.score(network, np.stack(arrays)) if arrays else np.zeros(0)
        scored.update(zip(names, values.tolist(), strict=True))
        for array, value in zip(arrays, values.tolist(), strict=True):
            showcase.offer(array, value)
        progress.at(len(scored))
    _all_there(set(keys), scored, curated)
    scores = pd.DataFrame({"key": keys, "score": np.array([scored[k] for k in keys], np.float32)})
    write_table(folder / "scores.parquet", scores)
    report["mean_score"] = float(scores["score"].mean())
    showcase.draw(folder / "critic.png", report)
    return report


def labelled_pictures(
    references: Path, kind: str, labels: Path, threshold: float
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Training pictures with inherited labels: key, label, similarity; and counts.

    A picture that several prompts retrieved takes the label it is most similar to; those
    less similar than `threshold` are dropped.
    """
    from safetensors.numpy import load_file

    table = pd.read_parquet(references / "references.parquet")
    retrieved = pd.read_parquet(references / "retrieved.parquet")
    vectors = load_file(references / "features.safetensors")
    if kind == "human":
        table = read_human_labels(labels, table)
        retrieved = retrieved[retrieved["prompt_index"].isin(set(table["prompt_index"]))]
    elif kind != "auto":
        raise UserError(f"labels: {kind!r} of a round is unknown; set auto or human.")
    # Pooled features share most of their length: centred, cosines tell pictures apart.
    centre = vectors["retrieved"].astype(np.float32).mean(axis=0)
    found = inherit(
        unit(vectors["retrieved"], centre)[retrieved["row"].to_numpy(int)],
        retrieved["prompt_index"].to_numpy(int),
        unit(vectors["references"], centre)[table["row"].to_numpy(int)],
        table["prompt_index"].to_numpy(int),
        table["label"].to_numpy(bool),
        threshold,
    )
    found["key"] = retrieved["key"].to_numpy(str)
    close = found[found["close"]].sort_values("similarity", ascending=False, kind="stable")
    kept = close.drop_duplicates("key").sort_values("key", ignore_index=True)
    counts = {
        "references": len(table),
        "references_positive": int(table["label"].sum()),
        "retrieved": int(found["key"].nunique()),
        "not_close": int(found["key"].nunique() - len(kept)),
    }
    return kept[["key", "label", "similarity"]], counts


def _held_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which of the labelled pictures (m,) are not learned from: `share` of each class."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label in (False, True):
        rows = rng.permutation(np.flatnonzero(labels == label))
        chosen[rows[: round(share * len(rows))]] = True
    return chosen


def _all_there(wanted: set[str], found: dict[str, Any], curated: Path) -> None:
    missing = sorted(wanted - set(found))
    if missing:
        raise UserError(
            f"{curated}: {len(missing)} pictures of the manifest are in no shard ({missing[0]}, "
            "…); run the curate stage again."
        )


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
