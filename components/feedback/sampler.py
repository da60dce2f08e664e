"""Statistical-analysis sampling: what was trained on decides what is drawn next.

Paper, section 3.1. Each accepted sample goes through, in this order:

1. a target size (longer side, px) from trunc_norm; the phase's nearest rungs are taken,
   and candidates that reach none of them are redrawn, the target being kept;
2. notions: a candidate with notions above their target share of everything trained on so
   far may be discarded (`coin`);
3. the critic (section 3.2, second phase): dropped with the probability that the model
   already does it well.

Accepted samples wait in one queue a rung; a full queue is a batch. So sizes follow
trunc_norm exactly whatever the notions and the critic discard, and a batch has one rung.
A pack takes samples of all rungs as they were accepted, up to the area of such a batch.
Candidates are drawn in blocks, and the statistics are those of the batches handed out.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from scipy.special import ndtr, ndtri

from components.errors import UserError

# Candidates drawn in vain, one after another, before the settings are called impossible.
HOPELESS = 1_000_000


class EncodedView(Protocol):
    """What the sampler needs to know of an encoded set of n samples and k notions."""

    @property
    def notions(self) -> np.ndarray:
        """Whether each sample has each notion, (n, k) bool."""

    @property
    def notion_names(self) -> Sequence[str]:
        """Names of the k notions."""

    @property
    def rungs(self) -> Mapping[str, tuple[int, int]]:
        """Width and height in px of each rung by name."""

    def rows(self, rung: str) -> np.ndarray:
        """Sample ids, int64, that reach the rung."""


def trunc_norm(
    rng: np.random.Generator, mean: float, std: float, low: float, high: float, count: int
) -> np.ndarray:
    """Draw (count,) float64 from a normal distribution cut to [low, high].

    `low` and `high` are absolute bounds in the unit of `mean` (paper, section 3.1), not
    standard deviations from it as scipy's are. A `std` of 0 gives the mean, clipped.
    """
    if not low <= high or std < 0:
        raise UserError(
            f"size: low {low} must not exceed high {high}, nor std {std} be below 0; "
            "correct `size` of this phase in params/training or params/scale."
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


def target_shares(counts: np.ndarray, tempering: float) -> np.ndarray:
    """Target share (k,) of each notion among all occurrences of notions.

    `counts` (k,) is how often each occurs in the set. Shares go with counts^tempering: 0
    is uniform over the notions that occur, 1 the set's own distribution.
    """
    present = counts > 0
    weights = np.where(present, np.power(np.maximum(counts, 1), float(tempering)), 0.0)
    return weights / max(weights.sum(), 1e-300)


class StatisticalSampler:
    """Draws batches of sample ids, each batch of one rung, and keeps live statistics.

    `params` is the whole parameter tree; of `training[phase]` it reads `rungs` (names),
    `size` {mean, std, low, high} (px, longer side) and `batch` (images of a batch at the
    phase's first rung: a larger rung gets fewer by its area, so that the number of tokens
    in a batch stays the same); of `feedback` `sampling`, `coin`, `discard`, `tempering`,
    `most_dropped`. `critic_scores` (n,) is each sample's probability that the model does
    it well already, or None. Batches come from `next_batch`, or with `packs` from `next_pack`.
    `most_area` (px) is what of a larger picture is trained on, and what it counts in a batch.
    Raises UserError for settings that cannot be met.
    """

    def __init__(
        self,
        encoded: EncodedView,
        params: Mapping[str, Any],
        phase: str,
        seed: int,
        critic_scores: np.ndarray | None = None,
        packs: bool = False,
        most_area: float = np.inf,
    ) -> None:
        settings, feedback = params["training"][phase], params["feedback"]
        self.phase, self.sampling, self.coin = phase, feedback["sampling"], feedback["coin"]
        for name, value, known in (
            ("sampling", self.sampling, ("statistical", "uniform")),
            ("coin", self.coin, ("sample", "notion")),
        ):
            if value not in known:
                raise UserError(
                    f"feedback.{name} is {value!r}; set it to {' or '.join(known)} "
                    "in params/feedback/default.yaml."
                )
        self.discard = float(feedback["discard"])
        self.size = {key: float(settings["size"][key]) for key in ("mean", "std", "low", "high")}
        self.notions = encoded.notions
        self.notion_names = list(encoded.notion_names)
        self.n, self.k = self.notions.shape
        self._set_rungs(encoded, list(settings["rungs"]), int(settings["batch"]), most_area)
        self.set_counts = self.notions.sum(axis=0, dtype=np.int64)
        self.target = target_shares(self.set_counts, feedback["tempering"])
        self.drop = None
        if critic_scores is not None:
            if len(critic_scores) != self.n or not np.isfinite(critic_scores).all():
                raise UserError(
                    f"The critic's scores are {len(critic_scores)} for {self.n} encoded samples, "
                    "or some are no number; run the critic stage again on this curated set."
                )
            self.drop = np.clip(np.asarray(critic_scores, float), 0, feedback["most_dropped"])
        self.rng = np.random.default_rng([int(seed), zlib.crc32(phase.encode())])
        self.counts = np.zeros(self.k, np.int64)  # of each notion in the batches handed out
        self.trained = np.zeros(len(self.names), np.int64)  # samples handed out by rung
        self.tally = dict.fromkeys(("drawn", "size", "notion", "critic", "accepted"), 0)
        self.queues: list[list[int]] = [[] for _ in self.names]
        self.packs = packs
        self.order: list[int] = []  # for packs: rungs of the queued samples as they were accepted
        self.pending = np.zeros(0, np.int64)  # targets (index of a longer side) not yet met

    def _set_rungs(
        self, encoded: EncodedView, names: list[str], batch: int, most_area: float
    ) -> None:
        unknown = [name for name in names if name not in encoded.rungs]
        if unknown or not names or batch < 1:
            raise UserError(
                f"training.{self.phase}: rungs {unknown or names} with batch {batch} cannot be "
                f"sampled; the encoded set has {', '.join(encoded.rungs)}; correct params/training."
            )
        self.names = names
        sides = np.array([max(encoded.rungs[name]) for name in names])
        areas = np.array([np.prod(encoded.rungs[name]) for name in names], float)
        areas = np.minimum(areas, most_area)
        self.batch = np.maximum(1, np.round(batch * areas[0] / areas)).astype(int)
        self.areas, self.room = areas, batch * areas[0]  # px: of a rung, and of a pack
        self.block = int(np.clip(4 * self.batch.max(), 256, 4096))
        self.sides, side_of_rung = np.unique(sides, return_inverse=True)  # px, ascending
        self.member = np.zeros((self.n, len(names)), bool)
        for j, name in enumerate(names):
            self.member[encoded.rows(name), j] = True
        # (sides, rungs): the rungs that a target of this side may be met by
        self.of_side = np.arange(len(self.sides))[:, None] == side_of_rung[None, :]
        empty = [
            int(s)
            for s, of in zip(self.sides, self.of_side, strict=True)
            if not self.member[:, of].any()
        ]
        if empty:
            raise UserError(
                f"training.{self.phase}.rungs: no encoded sample reaches {empty} px; "
                "take these rungs out or encode larger pictures."
            )

    def next_batch(self) -> tuple[str, np.ndarray]:
        """Return (rung name, sample ids int64 (B,)) and count them as trained on."""
        self._fill(lambda: any(len(q) >= b for q, b in zip(self.queues, self.batch, strict=True)))
        fullness = [len(q) / b for q, b in zip(self.queues, self.batch, strict=True)]
        j = int(np.argmax(fullness))
        return self.names[j], self._take(j, int(self.batch[j]))

    def next_pack(self) -> list[tuple[str, np.ndarray]]:
        """Return (rung name, sample ids) of every rung in the pack and count them as trained on.

        Their areas add up to at most that of a batch of the first rung; one sample at least.
        """
        self._fill(lambda: sum(self.areas[j] for j in self.order) > self.room)
        area, count = self.areas[self.order[0]], 1
        while area + self.areas[self.order[count]] <= self.room:
            area, count = area + self.areas[self.order[count]], count + 1
        taken, self.order = self.order[:count], self.order[count:]
        return [(self.names[j], self._take(j, taken.count(j))) for j in sorted(set(taken))]

    def _fill(self, enough: Callable[[], bool]) -> None:
        in_vain = 0
        while not enough():
            before = self.tally["accepted"]
            self._draw()
            in_vain = 0 if self.tally["accepted"] > before else in_vain + self.block
            if in_vain > HOPELESS:
                raise UserError(
                    f"training.{self.phase}: {in_vain} candidates in a row were turned away; "
                    "lower feedback.discard or feedback.most_dropped, or drop the rarest rungs."
                )

    def _take(self, j: int, count: int) -> np.ndarray:
        ids = np.array(self.queues[j][:count], np.int64)
        del self.queues[j][:count]
        self.counts += self.notions[ids].sum(axis=0, dtype=np.int64)
        self.trained[j] += len(ids)
        return ids

    def _draw(self) -> None:
        """Draw one block of candidates, one for each pending target; queue the accepted."""
        new = self.block - len(self.pending)
        if new:
            sizes = trunc_norm(self.rng, **self.size, count=new)
            nearest = np.abs(sizes[:, None] - self.sides[None, :]).argmin(axis=1)
            self.pending = np.concatenate([self.pending, nearest])
        ids = self.rng.integers(self.n, size=self.block)
        allowed = self.member[ids] & self.of_side[self.pending]
        # Where several rungs of one side hold the sample, any of them with equal chance.
        rung = (allowed * (1.0 - self.rng.random(allowed.shape))).argmax(axis=1)
        reached = allowed.any(axis=1)
        kept = reached.copy()
        if self.sampling == "statistical":
            kept &= self.rng.random(self.block) >= self.discard_probability(ids)
        passed = kept.copy()
        if self.drop is not None:
            passed &= self.rng.random(self.block) >= self.drop[ids]
        self.tally["drawn"] += self.block
        self.tally["size"] += int(self.block - reached.sum())
        self.tally["notion"] += int(reached.sum() - kept.sum())
        self.tally["critic"] += int(kept.sum() - passed.sum())
        self.tally["accepted"] += int(passed.sum())
        for sample, j in zip(ids[passed].tolist(), rung[passed].tolist(), strict=True):
            self.queues[j].append(sample)
        if self.packs:
            self.order += rung[passed].tolist()
        self.pending = self.pending[~passed]

    def discard_probability(self, ids: np.ndarray) -> np.ndarray:
        """Probability (m,) that each candidate is discarded for its notions.

        With a of a sample's m notions above their target share and p = `discard`: `notion`
        throws a coin for each of the a, 1 - (1 - p)^a, which the paper's wording gives and
        which pushes captions of many notions down; `sample` throws one coin with p·a/m.
        """
        total = self.counts.sum()
        if not total:
            return np.zeros(len(ids))
        has = self.notions[ids]
        above = (has & (self.counts > self.target * total)).sum(axis=1)
        if self.coin == "notion":
            return 1.0 - (1.0 - self.discard) ** above
        return self.discard * above / np.maximum(has.sum(axis=1), 1)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next draws depend on, as plain JSON values."""
        return {
            "phase": self.phase,
            "notion_names": self.notion_names,
            "rungs": self.names,
            "samples": self.n,
            "rng": self.rng.bit_generator.state,
            "counts": self.counts.tolist(),
            "trained": self.trained.tolist(),
            "tally": dict(self.tally),
            "queues": [list(queue) for queue in self.queues],
            "order": list(self.order),
            "pending": self.pending.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state` was taken. UserError if it is of another set or phase."""
        mine = (self.phase, self.notion_names, self.names, self.n)
        if mine != tuple(state[key] for key in ("phase", "notion_names", "rungs", "samples")):
            raise UserError(
                f"The saved sampler state is of another encoded set, phase or rung list than "
                f"{self.phase} has now; delete the resume snapshot to start this phase again."
            )
        self.rng.bit_generator.state = state["rng"]
        self.counts = np.array(state["counts"], np.int64)
        self.trained = np.array(state["trained"], np.int64)
        self.tally = dict(state["tally"])
        self.queues = [list(queue) for queue in state["queues"]]
        self.order = list(state["order"])
        self.pending = np.array(state["pending"], np.int64)

    def report(self) -> dict[str, Any]:
        """Figures of the sampling so far.

        Shares of notions are of all occurrences of notions: `set` before sampling, `trained`
        in the batches handed out, `target`. `distance` is the total variation to the target.
        """
        before = self.set_counts / max(self.set_counts.sum(), 1)
        after = self.counts / max(self.counts.sum(), 1)
        passed = self.tally["accepted"] + self.tally["critic"]
        return {
            "phase": self.phase,
            "sampling": self.sampling,
            "coin": self.coin,
            "samples": self.n,
            "trained": int(self.trained.sum()),
            "drawn": self.tally["drawn"],
            "accepted": self.tally["accepted"],
            "discarded": {key: self.tally[key] for key in ("size", "notion", "critic")},
            "dropped_by_critic": self.tally["critic"] / max(passed, 1),
            "rungs": dict(zip(self.names, self.trained.tolist(), strict=True)),
            "distance": {
                "set": float(np.abs(before - self.target).sum() / 2),
                "trained": float(np.abs(after - self.target).sum() / 2),
            },
            "notions": {
                name: {"set": float(b), "trained": float(a), "target": float(t)}
                for name, b, a, t in zip(self.notion_names, before, after, self.target, strict=True)
            },
        }
