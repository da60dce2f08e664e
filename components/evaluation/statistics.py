"""Means over tasks, and what they are worth: bootstrap clustered by prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """A mean, its standard error and its 95 % interval."""

    mean: float
    stderr: float
    low: float
    high: float

    def interval(self) -> dict[str, float]:
        """As JSON: mean, low, high."""
        return {"mean": round(self.mean, 4), "low": round(self.low, 4), "high": round(self.high, 4)}


def task_means(values: Sequence[float], tasks: Sequence[str]) -> dict[str, float]:
    """Mean of each task, in order of first appearance."""
    groups: dict[str, list[float]] = {}
    for value, task in zip(values, tasks, strict=True):
        groups.setdefault(task, []).append(float(value))
    return {task: float(np.mean(group)) for task, group in groups.items()}


def spread(
    values: Sequence[float],
    tasks: Sequence[str],
    prompts: Sequence[str],
    resamples: int,
    seed: int,
) -> Spread:
    """Unweighted mean of the tasks' means, with its bootstrap spread.

    Whole prompts are drawn with replacement inside each task: pictures of one prompt are not
    independent. The same seed draws the same prompts, so that two calls on the same pictures
    are paired.

    Args:
        values, tasks, prompts: one entry a picture.
        resamples: number of bootstrap resamples.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    means, draws = [], np.zeros(resamples)
    groups = _by_task(values, tasks, prompts)
    for sums, counts in groups.values():
        n = len(sums)
        weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
        means.append(sums.sum() / counts.sum())
        draws += (weights @ sums) / (weights @ counts) / len(groups)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Spread(float(np.mean(means)), float(draws.std()), float(low), float(high))


def _by_task(
    values: Sequence[float], tasks: Sequence[str], prompts: Sequence[str]
) -> Mapping[str, tuple[Array, Array]]:
    """Task → sum and number of values of each of its prompts."""
    cells: dict[str, dict[str, list[float]]] = {}
    for value, task, prompt in zip(values, tasks, prompts, strict=True):
        cells.setdefault(task, {}).setdefault(prompt, []).append(float(value))
    return {
        task: (
            np.array([sum(v) for v in by_prompt.values()]),
            np.array([len(v) for v in by_prompt.values()], dtype=float),
        )
        for task, by_prompt in cells.items()
    }
