"""Means over tasks, and what they are worth: bootstrap clustered by prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
    array, codes = np.asarray(values, float), _codes(tasks)
    column = np.array([codes[task] for task in tasks], int)
    return {task: float(np.mean(array[column == code])) for task, code in codes.items()}


def _codes(names: Sequence[str]) -> dict[str, int]:
    """A number for each different name, in order of first appearance."""
    return {name: code for code, name in enumerate(dict.fromkeys(names))}


def spreads(
    columns: Sequence[Sequence[float]],
    tasks: Sequence[str],
    prompts: Sequence[str],
    resamples: int,
    seed: int,
) -> list[Spread]:
    """Unweighted mean of the tasks' means of each column, with its bootstrap spread.

    Whole prompts are drawn with replacement inside each task: pictures of one prompt are not
    independent. All columns are of the same pictures and drawn alike, so that they are paired.

    Args:
        columns: values, each with one entry a picture, as have tasks and prompts.
        resamples: number of bootstrap resamples.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    values = np.array(columns, float)
    cells: dict[str, dict[str, list[int]]] = {}
    for row, (task, prompt) in enumerate(zip(tasks, prompts, strict=True)):
        cells.setdefault(task, {}).setdefault(prompt, []).append(row)
    means, draws = np.zeros(len(values)), np.zeros((resamples, len(values)))
    for by_prompt in cells.values():
        n = len(by_prompt)
        counts = np.array([len(rows) for rows in by_prompt.values()], float)
        sums = np.zeros((n, len(values)))
        for count in np.unique(counts):  # prompts of as many pictures at once
            rows = [each for each in by_prompt.values() if len(each) == count]
            sums[counts == count] = values[:, rows].sum(2).T
        weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
        means += sums.sum(0) / counts.sum() / len(cells)
        draws += (weights @ sums) / (weights @ counts)[:, None] / len(cells)
    intervals = np.quantile(draws, [0.025, 0.975], axis=0).T
    return [
        Spread(float(mean), float(drawn.std()), float(low), float(high))
        for mean, drawn, (low, high) in zip(means, draws.T, intervals, strict=True)
    ]
