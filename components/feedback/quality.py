"""How good the critic is on labels it did not learn from."""

from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score


def quality(
    labels: np.ndarray, scores: np.ndarray, reference: np.ndarray, seed: int, resamples: int = 500
) -> dict[str, Any]:
    """AUROC with a 95 % bootstrap interval, Brier score and calibration.

    labels (m,) bool and scores (m,) in [0, 1] of held-out pictures; reference (m,) is whose label
    each has. The bootstrap draws references, not pictures: pictures with one reference's label
    are no independent evidence. AUROC and its interval are None when only one class is there.
    `calibration` lists ten equal bins of the score
    with count, mean score and share positive; `ece` is the mean gap weighted by count.
    """
    labels, scores = np.asarray(labels, bool), np.asarray(scores, float)
    whose, group = np.unique(reference, return_inverse=True)
    result: dict[str, Any] = {
        "held_out": len(labels),
        "held_out_references": len(whose),
        "auroc": None,
        "auroc_interval": None,
    }
    if 0 < labels.sum() < len(labels):
        result["auroc"] = float(roc_auc_score(labels, scores))
        rng = np.random.default_rng(seed)
        drawn = []
        for _ in range(resamples):
            times = np.bincount(rng.integers(len(whose), size=len(whose)), minlength=len(whose))
            rows = np.repeat(np.arange(len(labels)), times[group])
            if 0 < labels[rows].sum() < len(rows):
                drawn.append(roc_auc_score(labels[rows], scores[rows]))
        result["auroc_interval"] = [float(v) for v in np.quantile(drawn, [0.025, 0.975])]
    bins = np.clip((scores * 10).astype(int), 0, 9)
    table = [
        {
            "count": int((bins == b).sum()),
            "score": float(scores[bins == b].mean()),
            "positive": float(labels[bins == b].mean()),
        }
        for b in range(10)
        if (bins == b).any()
    ]
    n = max(len(labels), 1)
    result["ece"] = float(sum(r["count"] * abs(r["score"] - r["positive"]) for r in table) / n)
    result["brier"] = float(((scores - labels) ** 2).sum() / n)
    result["calibration"] = table
    return result


def no_better_than_chance(found: dict[str, Any]) -> str | None:
    """Why a critic of this `quality` must not be used, or None when it may."""
    interval = found["auroc_interval"]
    if interval is None:
        return "the held-out labels are all alike, so that nobody knows if it is any good"
    if interval[0] <= 0.5:
        return (
            f"the critic is no better than chance: AUROC {found['auroc']:.3f} on "
            f"{found['held_out']} held-out pictures, 95 % interval {interval[0]:.3f} to "
            f"{interval[1]:.3f}"
        )
    return None
