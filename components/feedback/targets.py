"""Target frequencies of attributes that no picture can be given: notions, style, source.

Paper, section 3.1: each has a predetermined sampling frequency. Here it is a share of all
occurrences of its kind among the samples trained on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.errors import UserError

SURE = 3.0  # standard errors that a share must be off its target to be called so
UNSTEERED = 2.0  # a bar that no share reaches


def tempered_shares(counts: np.ndarray, tempering: float) -> np.ndarray:
    """Shares (k,) that go with counts^tempering: 0 is uniform over what occurs, 1 as it is."""
    present = counts > 0
    weights = np.where(present, np.power(np.maximum(counts, 1), float(tempering)), 0.0)
    return weights / max(weights.sum(), 1e-300)


def check_targets(targets: Mapping[str, Any], kinds: Sequence[str]) -> None:
    """Refuse `feedback.targets` that cannot be meant: an unknown kind, shares beyond 1."""
    for kind, wanted in targets.items():
        if kind not in kinds:
            raise UserError(
                f"feedback.targets names {kind!r}; it may name {', '.join(kinds)}: correct it in "
                "params/feedback."
            )
        shares = wanted.values() if isinstance(wanted, Mapping) else [wanted]
        for share in shares:
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise UserError(
                    f"feedback.targets.{kind} has {share!r}: give a number from 0 to 1 (tempering) "
                    "or such a share for each value named, in params/feedback."
                )
        if isinstance(wanted, Mapping) and sum(shares) > 1 + 1e-9:
            raise UserError(
                f"The shares of feedback.targets.{kind} add up to {sum(shares):g}: lower them to "
                "1 in all, in params/feedback."
            )


class Targets:
    """Target shares of k attributes, which count through the kinds of `names` in their order.

    counts: samples of the set that have each, (k,). targets: by kind a number, by which the
    set's shares are tempered (`tempered_shares`), or shares of single values, of which the
    others of this kind divide the rest as they do in the set. A kind that is not named is
    counted and not steered. Values named that no sample has are kept in `absent`.
    """

    def __init__(
        self, names: Mapping[str, Sequence[str]], counts: np.ndarray, targets: Mapping[str, Any]
    ) -> None:
        check_targets(targets, list(names))
        self.names, self.counts = names, np.asarray(counts, np.int64)
        self.kinds = list(names)
        lengths = [len(names[kind]) for kind in names]
        self.kind_of = np.repeat(np.arange(len(lengths), dtype=np.int8), lengths)
        starts = np.cumsum([0, *lengths]).tolist()
        self.place = {kind: slice(*starts[i : i + 2]) for i, kind in enumerate(self.kinds)}
        self.steered = np.isin(self.kind_of, [self.kinds.index(kind) for kind in targets])
        self.share = np.zeros(starts[-1])  # as asked for
        self.named = np.zeros(starts[-1], bool)
        self.absent: list[tuple[str, str, float]] = []
        # What a share is held against. The shares asked of attributes that do occur are scaled to
        # 1: else what is asked of an absent one would put all others above their target.
        self.bar = np.full(starts[-1], UNSTEERED)
        for kind, wanted in targets.items():
            place = self.place[kind]
            self.share[place] = self._shares(kind, wanted)
            reachable = np.where(self.counts[place] > 0, self.share[place], 0.0)
            if reachable.sum() > 0:
                self.bar[place] = reachable / reachable.sum()

    def _shares(self, kind: str, wanted: Any) -> np.ndarray:
        counts = self.counts[self.place[kind]]
        if not isinstance(wanted, Mapping):
            return tempered_shares(counts, wanted)
        shares, rest = np.zeros(len(counts)), counts.astype(np.float64)
        at = {name: i for i, name in enumerate(self.names[kind])}
        for value, share in wanted.items():
            i = at.get(str(value), -1)
            if i < 0 or not counts[i]:
                self.absent.append((kind, str(value), float(share)))
            if i >= 0:
                shares[i], rest[i] = share, 0
                self.named[self.place[kind].start + i] = True
        return shares + rest / max(rest.sum(), 1e-300) * (1 - sum(wanted.values()))

    def unmet(self, counts: np.ndarray, samples: int, tolerance: float) -> list[dict[str, Any]]:
        """Attributes of which the share in `counts` (k,), after so many samples, is off its target.

        That is by more than `tolerance` of the target and SURE standard errors of such a share.
        Those named in the parameters come first, then those farthest off.
        """
        totals = np.bincount(self.kind_of, counts, len(self.kinds))
        of_kind = np.maximum(totals, 1)[self.kind_of]
        reached, target = counts / of_kind, self.share
        error = np.sqrt(target * (1 - target) / of_kind)
        off = np.abs(reached - target)
        wrong = self.steered & (off > tolerance * target + SURE * error)
        wrong &= totals[self.kind_of] > 0
        wrong &= self.counts > 0  # the others are in `absent`, or asked for by nobody
        order = np.flatnonzero(wrong)
        order = order[np.lexsort((-off[order], ~self.named[order]))]
        found = [
            {"kind": kind, "value": value, "target": share, "reached": 0.0, "samples": samples}
            for kind, value, share in self.absent
            if share > 0
        ]
        for i in order.tolist():
            kind = self.kinds[self.kind_of[i]]
            value = self.names[kind][i - self.place[kind].start]
            found.append(
                {
                    "kind": kind,
                    "value": value,
                    "target": float(target[i]),
                    "reached": float(reached[i]),
                    "samples": samples,
                }
            )
        return found


def evenness(counts: np.ndarray) -> float:
    """Entropy of the shares over its greatest value: 1 is uniform. 1 also below two attributes."""
    if len(counts) < 2 or not counts.sum():
        return 1.0
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(len(counts)))
