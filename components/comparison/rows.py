"""Parents that differ by their seed alone are one row: means over seeds, and what differs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from components.comparison.parents import Curve, Parent
from components.evaluation.ablation import mean_of
from components.headline import SHARED

FIGURES = (*SHARED["evaluate"], *SHARED["compare"], "images")
NOT_ASKED = ("seed", "family", "ablation", "scale")  # parameters with a column of their own
Mean = Mapping[str, float | None]


@dataclass(frozen=True)
class Row:
    """Runs with the same parameters, code and data, one a seed, in the order of their seeds."""

    name: str
    parents: Sequence[Parent]

    @property
    def seeds(self) -> list[str]:
        """The seed of each."""
        return [parent.tags.get("seed", "–") for parent in self.parents]

    def tag(self, name: str) -> str:
        """A tag that all of them share."""
        return self.parents[0].tags.get(name, "–")

    def figure(self, name: str) -> Mean | None:
        """Mean, standard error and interval over seeds, see `mean_of`; None where one has none."""
        values = [parent.metrics[name] for parent in self.parents if name in parent.metrics]
        return mean_of(values) if len(values) == len(self.parents) else None

    def seconds(self) -> float | None:
        """Mean seconds of training; None where one is not known."""
        values = [parent.seconds for parent in self.parents if parent.seconds is not None]
        return float(np.mean(values)) if len(values) == len(self.parents) else None

    def curve(self, name: str) -> list[tuple[float, float, float]]:
        """Images seen, mean over seeds and its standard error (0 for one seed).

        At the first seed's points as far as all seeds go, the others' values between their own.
        """
        curves = [parent.curves[name] for parent in self.parents if name in parent.curves]
        if not curves:
            return []
        ends = [(curve[0][0], curve[-1][0]) for curve in curves]
        low, high = max(a for a, _ in ends), min(b for _, b in ends)
        at = [x for x, _ in curves[0] if low <= x <= high] or [low]
        values = np.array([_at(curve, at) for curve in curves])
        n = len(curves)
        error = values.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.zeros(len(at))
        points = zip(at, values.mean(0), error, strict=True)
        return [(float(x), float(y), float(e)) for x, y, e in points]

    def plain(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "name": self.name,
            "seeds": self.seeds,
            "runs": [parent.run for parent in self.parents],
            "scale": self.tag("scale"),
            "git.commit": self.tag("git.commit"),
            "data.hash": self.tag("data.hash"),
            "figures": {name: value for name in FIGURES if (value := self.figure(name))},
            "training_seconds": self.seconds(),
        }


def _at(curve: Curve, at: Sequence[float]) -> np.ndarray:
    return np.interp(at, [x for x, _ in curve], [y for _, y in curve])


def rows_of(parents: Sequence[Parent]) -> tuple[list[Row], list[str]]:
    """A row for each set of parents that differ by their seed alone, in the order given.

    And a sentence for each parent that no row holds: one that is not finished or has no figures,
    or one that another with the same seed came after.
    """
    left: list[str] = []
    sets: dict[Any, dict[str, Parent]] = {}
    for parent in parents:
        if parent.incomplete:
            left.append(f"{parent.name} ({parent.run[:8]}) {parent.incomplete}.")
            continue
        params = {name: value for name, value in parent.params.items() if name != "seed"}
        tags = [parent.tags.get(name) for name in ("git.commit", "data.hash", "ablation", "scale")]
        same = sets.setdefault((*tags, *sorted(params.items())), {})
        seed = parent.tags.get("seed", "–")
        if seed in same:
            before = same[seed]
            left.append(f"{before.name} ({before.run[:8]}) was run again as {parent.run[:8]}.")
        same[seed] = parent
    rows = []
    for same in sets.values():
        ordered = sorted(same.values(), key=lambda parent: _number(parent.tags.get("seed", "")))
        name = ordered[0].name
        if len(ordered) > 1:
            name = name.removesuffix(f" seed {ordered[0].tags['seed']}")
        rows.append(Row(name, ordered))
    names = [row.name for row in rows]
    # The tag `group` tells rows of one name apart.
    return [
        row if names.count(row.name) == 1 else replace(row, name=row.tag("group")) for row in rows
    ], left


def _number(seed: str) -> tuple[int, str]:
    return (int(seed) if seed.isdigit() else 0, seed)


def differing(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Parameters of which the rows' values are not all the same: one value a row."""
    names = sorted({name for row in rows for name in row.parents[0].params})
    values = {name: [row.parents[0].params.get(name, "–") for row in rows] for name in names}
    return {
        name: each for name, each in values.items() if name not in NOT_ASKED and len(set(each)) > 1
    }
