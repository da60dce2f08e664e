"""Transformable attributes: which rung a drawn longer side and aspect mean (paper, section 3.1)."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import ndtr, ndtri

from components.errors import UserError


def trunc_norm(
    rng: np.random.Generator,
    mean: float,
    std: float,
    low: float,
    high: float,
    count: int,
    name: str = "size",
) -> np.ndarray:
    """Draw (count,) float64 from a normal distribution cut to [low, high].

    `low` and `high` are absolute bounds in the unit of `mean` (paper, section 3.1), not
    standard deviations from it as scipy's are. A `std` of 0 gives the mean, clipped.
    """
    if not low <= high or std < 0:
        raise UserError(
            f"{name}: low {low} must not exceed high {high}, nor std {std} be below 0; "
            f"correct `{name}` of this phase in params/training or params/scale."
        )
    uniform = rng.random(count)
    if std == 0 or low == high:
        return np.full(count, float(np.clip(mean, low, high)))
    a, b = (low - mean) / std, (high - mean) / std
    # The lower tail keeps its digits, the upper one does not: mirror when above the mean.
    sign = -1.0 if a > 0 else 1.0
    if a > 0:
        a, b = -b, -a
    pa, pb = ndtr(a), ndtr(b)
    drawn = ndtri(pa + uniform * (pb - pa)) if pb > pa else np.full(count, b)
    return np.clip(mean + sign * std * drawn, low, high)


def ladder(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    """Longer sides in px, ascending, each with its rungs by ascending width / height.

    sizes: width and height of the rungs, which are named by their place.
    """
    by_side: dict[int, list[int]] = {}
    for j in sorted(range(len(sizes)), key=lambda j: sizes[j][0] / sizes[j][1]):
        by_side.setdefault(max(sizes[j]), []).append(j)
    return sorted(by_side.items())


class TargetRungs:
    """Draws target rungs: of those with the nearest longer side the nearest aspect.

    sizes: width and height in px of each rung. size, aspect: mean, std, low and high of trunc_norm
    for the longer side in px and for log2(width / height). UserError for bounds that cross.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        size: Mapping[str, float],
        aspect: Mapping[str, float],
    ) -> None:
        keys = ("mean", "std", "low", "high")
        self._laws = {
            "size": {key: float(size[key]) for key in keys},
            "aspect": {key: float(aspect[key]) for key in keys},
        }
        # Borders half way between neighbours, where the nearest side or aspect changes.
        steps = ladder(sizes)
        self._side_borders = _between(np.array([float(side) for side, _ in steps]))
        self._rungs = [np.array(members) for _, members in steps]
        self._aspect_borders = [
            _between(np.log2([sizes[j][0] / sizes[j][1] for j in members])) for _, members in steps
        ]
        self.draw(np.random.default_rng(0), 1)  # refuses bounds that cross

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Places of rungs in `sizes`, (count,) int64."""
        sides, aspects = (
            trunc_norm(rng, **law, count=count, name=name) for name, law in self._laws.items()
        )
        step, rungs = np.searchsorted(self._side_borders, sides), np.zeros(count, np.int64)
        for s, (members, borders) in enumerate(zip(self._rungs, self._aspect_borders, strict=True)):
            here = step == s
            rungs[here] = members[np.searchsorted(borders, aspects[here])]
        return rungs

    def shares(self) -> np.ndarray:
        """How often each rung is drawn, (rungs,)."""
        shares = np.zeros(sum(map(len, self._rungs)))
        of_side = _masses(self._side_borders, **self._laws["size"])
        for side, members, borders in zip(of_side, self._rungs, self._aspect_borders, strict=True):
            shares[members] = side * _masses(borders, **self._laws["aspect"])
        return shares


def _between(values: np.ndarray) -> np.ndarray:
    return (values[1:] + values[:-1]) / 2


def _masses(borders: np.ndarray, mean: float, std: float, low: float, high: float) -> np.ndarray:
    """Probability of trunc_norm between these borders, (borders + 1,)."""
    if std == 0 or low == high:
        masses = np.zeros(len(borders) + 1)
        masses[np.searchsorted(borders, np.clip(mean, low, high))] = 1.0
        return masses
    edges = np.clip(np.concatenate([[low], borders, [high]]), low, high)
    below = ndtr((edges - mean) / std)
    return np.diff(below) / (below[-1] - below[0])
