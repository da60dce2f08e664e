"""Statistical-analysis sampling: what was trained on decides what is drawn next.

Paper, section 3.1. Each accepted sample goes through, in this order:

1. transformable attributes: longer side and aspect from trunc_norm give a target rung;
2. a candidate is drawn uniformly from the samples that reach this rung. That is the same
   distribution as drawing from all samples and drawing again until one can be transformed to
   the target without loss, and costs nothing when few of them can;
3. non-transformable attributes (notions, style, source): a candidate with some of them above
   their target share of everything trained on so far may be discarded (`coin`);
4. the critic (section 3.2, second phase): dropped with the probability that the model
   already does it well.

A target is kept until a candidate meets it, so sizes and aspects follow trunc_norm exactly,
whatever is discarded. Accepted samples wait until those of one rung fill a batch; a pack takes
samples of all rungs as they were accepted, up to the area of such a batch. Candidates are drawn
in blocks, and the statistics are those of the batches handed out. Memory holds counts by
attribute, two blocks of ids and those held out, whatever the number of samples.
"""

import math
import zlib
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from components.errors import UserError
from components.feedback.sizes import TargetRungs
from components.feedback.targets import Targets, evenness
from components.files import hash_of

# Candidates drawn in vain, one after another, before the settings are called impossible.
HOPELESS = 1_000_000
SHOWN = 100  # values of a kind, and unmet targets, that the report lists


class EncodedView(Protocol):
    """What the sampler needs to know of an encoded set of n samples and k attributes.

    `attribute_names` has the names by kind; ids of attributes count through the kinds in order.
    `attribute_counts` (k,) says how many samples have each. `rungs`: width and height in px.
    """

    @property
    def attribute_names(self) -> Mapping[str, Sequence[str]]: ...  # noqa: D102
    @property
    def attribute_counts(self) -> np.ndarray: ...  # noqa: D102
    @property
    def rungs(self) -> Mapping[str, tuple[int, int]]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def rows(self, rung: str) -> np.ndarray:
        """Sample ids, int64, that reach the rung; asked for in blocks, so it may be mapped."""

    def attributes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Attribute ids of samples (m,), end to end, and offsets (m + 1,) into them."""


class StatisticalSampler:
    """Draws batches of sample ids, each batch of one rung, and keeps live statistics.

    `params` is the whole parameter tree; of `training[phase]` it reads `rungs` (names),
    `size` and `aspect` {mean, std, low, high} (longer side in px, log2 of width / height),
    `batch` (images of a batch at the phase's first rung: a larger rung gets fewer by its area,
    so that the number of tokens in a batch stays the same); of `feedback` `sampling`
    (statistical, or uniform: no discards by attributes), `coin`, `discard`, `targets`,
    `tolerance` (see `Targets`), `most_dropped`. `critic_scores` (n,) is each sample's
    probability that the model does it well already, memory-mapped as it may be, or None.
    Batches come from `next_batch`, or with `packs` from `next_pack`. `most_area` (px) is what
    of a larger picture is trained on, and what it counts in a batch. `held_out`: ids, ascending,
    that are never handed out; the statistics are those of a set without them.
    Raises UserError for settings that cannot be meant; a target that cannot be met is reported.
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
        held_out: np.ndarray | None = None,
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
        self.encoded, self.n = encoded, len(encoded)
        self.held_out = np.zeros(0, np.int64) if held_out is None else held_out
        self.discard, self.tolerance = float(feedback["discard"]), float(feedback["tolerance"])
        self.targets = Targets(
            encoded.attribute_names, self._attribute_counts(), feedback["targets"]
        )
        self._set_rungs(list(settings["rungs"]), int(settings["batch"]), most_area)
        self.law = TargetRungs(self.sizes, settings["size"], settings["aspect"])
        self.scores, self.most_dropped = critic_scores, float(feedback["most_dropped"])
        if critic_scores is not None and len(critic_scores) != self.n:
            raise UserError(
                f"The critic's scores are {len(critic_scores)} for {self.n} encoded samples; "
                "run the critic stage again on this curated set."
            )
        self.rng = np.random.default_rng([int(seed), zlib.crc32(phase.encode())])
        # Of the batches handed out: occurrences of each attribute, and of each kind; samples.
        self.counts = np.zeros(len(self.targets.kind_of), np.int64)
        self.totals = np.zeros(len(self.targets.kinds), np.int64)
        self.trained = np.zeros(len(self.names), np.int64)
        self.tally = dict.fromkeys(("drawn", "attributes", "critic", "accepted"), 0)
        self.packs = packs
        # Accepted samples and their rungs, in the order in which they were accepted.
        self.waiting, self.waiting_rung = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.pending = np.zeros(0, np.int64)  # rungs drawn as targets, not yet met

    def _attribute_counts(self) -> np.ndarray:
        counts = self.encoded.attribute_counts
        if not len(self.held_out):
            return counts
        values, _ = self.encoded.attributes(self.held_out)
        return counts - np.bincount(values, minlength=len(counts))

    def _set_rungs(self, names: list[str], batch: int, most_area: float) -> None:
        rungs = self.encoded.rungs
        unknown = [name for name in names if name not in rungs]
        if unknown or not names or batch < 1:
            raise UserError(
                f"training.{self.phase}: rungs {unknown or names} with batch {batch} cannot be "
                f"sampled; the encoded set has {', '.join(rungs)}; correct params/training."
            )
        self.names, self.sizes = names, [rungs[name] for name in names]
        self.rows = [self.encoded.rows(name) for name in names]
        self.gaps = [_gaps(rows, self.held_out) for rows in self.rows]
        self.reach = np.array([len(r) - len(g) for r, g in zip(self.rows, self.gaps, strict=True)])
        if not self.reach.all():
            empty = [name for name, count in zip(names, self.reach, strict=True) if not count]
            raise UserError(
                f"training.{self.phase}.rungs: no encoded sample reaches {', '.join(empty)}; "
                "take these rungs out or encode larger pictures."
            )
        areas = np.minimum(np.array([w * h for w, h in self.sizes], float), most_area)
        self.batch = np.maximum(1, np.round(batch * areas[0] / areas)).astype(int)
        self.areas, self.room = areas, batch * areas[0]  # px: of a rung, and of a pack
        self.block = int(np.clip(4 * self.batch.max(), 256, 4096))

    def next_batch(self) -> tuple[str, np.ndarray]:
        """Return (rung name, sample ids int64 (B,)) and count them as trained on."""
        self._fill(lambda: bool((self._fullness() >= 1).any()))
        j = int(np.argmax(self._fullness()))
        return self.names[j], self._take(np.flatnonzero(self.waiting_rung == j)[: self.batch[j]])[1]

    def next_pack(self) -> list[tuple[str, np.ndarray]]:
        """Return (rung name, sample ids) of every rung in the pack and count them as trained on.

        Their areas add up to at most that of a batch of the first rung; one sample at least.
        """
        self._fill(lambda: self.areas[self.waiting_rung].sum() > self.room)
        areas = np.cumsum(self.areas[self.waiting_rung])
        count = max(1, int(np.searchsorted(areas, self.room, side="right")))
        rungs, ids = self._take(np.arange(count))
        return [(self.names[j], ids[rungs == j]) for j in np.unique(rungs)]

    def _fullness(self) -> np.ndarray:
        return np.bincount(self.waiting_rung, minlength=len(self.names)) / self.batch

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

    def _take(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take samples from those waiting and count them; gives their rungs and ids."""
        ids, rungs = self.waiting[places], self.waiting_rung[places]
        self.waiting = np.delete(self.waiting, places)
        self.waiting_rung = np.delete(self.waiting_rung, places)
        values, _ = self.encoded.attributes(ids)
        np.add.at(self.counts, values, 1)
        self.totals += np.bincount(self.targets.kind_of[values], minlength=len(self.totals))
        self.trained += np.bincount(rungs, minlength=len(self.trained))
        return rungs, ids

    def _draw(self) -> None:
        """Draw one block of candidates, one for each pending target; queue the accepted."""
        new = self.block - len(self.pending)
        self.pending = np.concatenate([self.pending, self.law.draw(self.rng, new)])
        places = self.rng.integers(self.reach[self.pending])
        ids = np.zeros(self.block, np.int64)
        for j in np.unique(self.pending):
            here = self.pending == j
            place = places[here]
            place += np.searchsorted(self.gaps[j], place, side="right")
            ids[here] = self.rows[j][place]
        kept = np.ones(self.block, bool)
        if self.sampling == "statistical":
            kept = self.rng.random(self.block) >= self.discard_probability(ids)
        passed = kept
        if self.scores is not None:
            passed = kept & (self.rng.random(self.block) >= self._drop_probability(ids))
        self.tally["drawn"] += self.block
        self.tally["attributes"] += int(self.block - kept.sum())
        self.tally["critic"] += int(kept.sum() - passed.sum())
        self.tally["accepted"] += int(passed.sum())
        self.waiting = np.concatenate([self.waiting, ids[passed]])
        self.waiting_rung = np.concatenate([self.waiting_rung, self.pending[passed]])
        self.pending = self.pending[~passed]

    def discard_probability(self, ids: np.ndarray) -> np.ndarray:
        """Probability (m,) that each candidate is discarded for its attributes.

        With a of a sample's m steered attributes above their target share, and p = `discard`:
        `notion` throws a coin for each of the a, 1 - (1 - p)^a, which is the paper's wording
        ("a sample whose attribute is above its frequency is discarded with 50 %") and pushes
        captions of many notions down; `sample` is ours and throws one coin with p·a/m. A sample
        without any steered attribute is never discarded.
        """
        targets = self.targets
        values, offsets = self.encoded.attributes(ids)
        bar = targets.bar[values]
        over = self.counts[values] > bar * self.totals[targets.kind_of[values]]
        # Sums by sample: differences of running sums, which samples without attributes do not
        # disturb as they would np.add.reduceat.
        ends = offsets[1:], offsets[:-1]
        running = np.concatenate([np.zeros(1, np.int64), np.cumsum(over)])
        above = running[ends[0]] - running[ends[1]]
        if self.coin == "notion":
            return 1.0 - (1.0 - self.discard) ** above
        running = np.concatenate([np.zeros(1, np.int64), np.cumsum(targets.steered[values])])
        steered = running[ends[0]] - running[ends[1]]
        return self.discard * above / np.maximum(steered, 1)

    def _drop_probability(self, ids: np.ndarray) -> np.ndarray:
        """Probability (m,) that the critic drops each candidate."""
        assert self.scores is not None
        scores = np.asarray(self.scores[ids], float)
        if not np.isfinite(scores).all():
            raise UserError(
                "Some of the critic's scores are no number; run the critic stage again on this "
                "curated set."
            )
        return np.clip(scores, 0, self.most_dropped)

    def _identity(self) -> dict[str, Any]:
        names = hash_of({kind: list(names) for kind, names in self.targets.names.items()})
        return {
            "phase": self.phase,
            "attributes": names,
            "rungs": self.names,
            "samples": self.n,
            "held_out": hash_of(self.held_out.tolist()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything the next draws depend on, as plain JSON values."""
        return {
            **self._identity(),
            "rng": self.rng.bit_generator.state,
            "counts": self.counts.tolist(),
            "trained": self.trained.tolist(),
            "tally": dict(self.tally),
            "waiting": self.waiting.tolist(),
            "waiting_rung": self.waiting_rung.tolist(),
            "pending": self.pending.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state` was taken. UserError if it is of another set or phase."""
        if any(state.get(key) != value for key, value in self._identity().items()):
            raise UserError(
                f"The saved sampler state is of another encoded set, phase or rung list than "
                f"{self.phase} has now; delete the resume snapshot to start this phase again."
            )
        self.rng.bit_generator.state = state["rng"]
        self.tally = dict(state["tally"])
        for name in ("counts", "trained", "waiting", "waiting_rung", "pending"):
            setattr(self, name, np.array(state[name], np.int64))
        kinds = self.targets.kind_of
        self.totals = np.bincount(kinds, self.counts, len(self.totals)).astype(np.int64)

    def report(self) -> dict[str, Any]:
        """Figures of what was trained on so far, and of what was turned away.

        `kinds`: of each kind of attributes whether it is steered, `distance`, the total variation
        to its target of the set and of what was trained on; `evenness`, see there; and by
        value its share of all occurrences of the kind: `set` before sampling, `trained`, `target`
        (of the SHOWN most frequent ones in the set). `unmet`: the targets missed, see
        `Targets.unmet`, the first SHOWN of `unmet_count`.
        """
        accepted, critic = self.tally["accepted"], self.tally["critic"]
        trained = int(self.trained.sum())
        unmet = self.targets.unmet(self.counts, trained, self.tolerance)
        sides: dict[str, int] = {}
        aspects: dict[str, int] = {}
        for (width, height), count in zip(self.sizes, self.trained.tolist(), strict=True):
            common = math.gcd(width, height)
            aspect = f"{width // common}:{height // common}"
            sides[str(max(width, height))] = sides.get(str(max(width, height)), 0) + count
            aspects[aspect] = aspects.get(aspect, 0) + count
        return {
            "phase": self.phase,
            "sampling": self.sampling,
            "coin": self.coin,
            "samples": self.n,
            "held_out": len(self.held_out),
            "trained": trained,
            "drawn": self.tally["drawn"],
            "accepted": accepted,
            "accepted_share": accepted / max(self.tally["drawn"], 1),
            "discarded": {key: self.tally[key] for key in ("attributes", "critic")},
            "dropped_by_critic": critic / max(accepted + critic, 1),
            "rungs": dict(zip(self.names, self.trained.tolist(), strict=True)),
            "longer_sides": sides,
            "aspects": aspects,
            "kinds": {kind: self._kind_report(kind) for kind in self.targets.kinds},
            "unmet_count": len(unmet),
            "unmet": unmet[:SHOWN],
        }

    def _kind_report(self, kind: str) -> dict[str, Any]:
        place = self.targets.place[kind]
        of_set, counts = self.targets.counts[place], self.counts[place]
        before, after = (c / max(c.sum(), 1) for c in (of_set, counts))
        steered, target = bool(self.targets.steered[place].any()), self.targets.share[place]
        figures: dict[str, Any] = {
            "steered": steered,
            "occurrences": int(counts.sum()),
            "evenness": {"set": evenness(of_set), "trained": evenness(counts)},
        }
        if steered:
            figures["distance"] = {
                "set": float(np.abs(before - target).sum() / 2),
                "trained": float(np.abs(after - target).sum() / 2),
            }
        values = {}
        for i in np.argsort(-of_set, kind="stable")[:SHOWN].tolist():
            share = {"set": float(before[i]), "trained": float(after[i])}
            values[self.targets.names[kind][i]] = share | (
                {"target": float(target[i])} if steered else {}
            )
        return figures | {"values": values}


def _gaps(rows: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Where the rows held out lie among the others: how many of those come before each, (m,).

    The k-th of the others is then rows[k + how many gaps are at most k]. `rows` is searched in
    place, as it may be mapped and long.
    """
    places = [bisect_left(rows, i) for i in held_out.tolist()]
    found = [p for p, i in zip(places, held_out, strict=True) if p < len(rows) and rows[p] == i]
    return np.array(found, np.int64) - np.arange(len(found))
