"""The paper's Table 4: what each group is, and what its seeds say.

Reads the figures of finished experiments; flows/ablation.py runs them. Everything is held on
held-out prompts (`score`), and beside it on all prompts, held-out and seen (`all`), which are
twice as many pictures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

EFFECT, LEVEL, POWER = 0.05, 0.05, 0.8  # what should be visible, two-sided test, its power


@dataclass(frozen=True)
class Group:
    """One row of the table.

    follows: the group it goes on from. model: the name of its last model. phases: how many times N
    images that has seen. feedback: in words. paper: the paper's GenEval overall; for H and I its
    win rate against Midjourney v6.
    """

    follows: str | None
    model: str
    phases: int
    feedback: str
    paper: float

    @property
    def evaluation(self) -> str:
        """The stage that scores the model."""
        return "evaluate-phase1" if self.model == "phase1" else f"evaluate@{self.model}"


SAS = "SAS"
GROUPS = {
    "A": Group(None, "phase1", 1, "none", 0.38),
    "B": Group("A", "r1", 2, "none", 0.48),
    "C": Group(None, "phase1", 1, SAS, 0.50),
    "D": Group("C", "r1", 2, SAS, 0.60),
    "E": Group("D", "r2", 3, SAS, 0.63),
    "F": Group("C", "r1", 2, "SAS + CMS (auto)", 0.63),
    "G": Group("F", "r2", 3, "SAS + CMS (auto)", 0.66),
    "H": Group("G", "r3", 4, "SAS + CMS (auto)", 0.173),
    "I": Group("G", "r3", 4, "SAS + CMS (simulated rater)", 0.356),
}
COMPARED = ("H", "I")  # also against G's model, by win rate
LINES = (("A", "B"), ("C", "D", "E"), ("C", "F", "G", "H"), ("G", "I"))  # of the plot
# Pairs at the same number of images seen, and what differs.
EFFECTS = (
    ("C", "A", "SAS, from the first image"),
    ("D", "B", "SAS, from the first image"),
    ("F", "D", "critic"),
    ("G", "E", "critic, twice"),
    ("I", "H", "simulated rater's labels for automatic ones"),
)


def path(group: str) -> list[str]:
    """The group and those it goes on from, the first one first."""
    before = GROUPS[group].follows
    return [*(path(before) if before else []), group]


@dataclass(frozen=True)
class Result:
    """What one group came to with one seed.

    images: seen in all. score, chance, stderr: on held-out prompts, the error over prompts, of
    `pictures` pictures. all_*: the same over all prompts. win: compare@rN's figures, or None.
    """

    group: str
    seed: int
    images: int
    score: float
    chance: float
    stderr: float
    pictures: int
    all_score: float
    all_chance: float
    all_stderr: float
    all_pictures: int
    win: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        group: str,
        seed: int,
        evaluation: Mapping[str, Any],
        training: Mapping[str, Any],
        win: Mapping[str, Any] | None = None,
    ) -> "Result":
        """From metrics/evaluate/MODEL.json, metrics/train/MODEL.json, metrics/compare/MODEL.json"""
        scores = evaluation["geneval"]
        whole = scores.get("all", scores)
        return cls(
            group=group,
            seed=seed,
            images=int(training["images_total"]),
            score=scores["overall"],
            chance=scores["chance"],
            stderr=scores["stderr"],
            pictures=scores["n"],
            all_score=whole["overall"],
            all_chance=whole["chance"],
            all_stderr=whole["stderr"],
            all_pictures=whole["n"],
            win=win,
        )

    def figures(self) -> dict[str, float]:
        """For a tracked run, by the names that the stages use."""
        figures = {
            "geneval.overall": self.score,
            "geneval.chance": self.chance,
            "geneval.difference": self.score - self.chance,
            "geneval.stderr": self.stderr,
            "geneval.all.overall": self.all_score,
            "geneval.all.chance": self.all_chance,
            "geneval.all.stderr": self.all_stderr,
            "images": self.images,
        }
        if self.win:
            figures |= {name: self.win[name] for name in ("win_rate", "low", "high")}
        return figures


def mean_of(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard error and 95 % t interval over seeds; one value has no spread: None."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return {"mean": mean, "stderr": None, "low": None, "high": None}
    stderr = float(np.std(values, ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * stderr
    return {"mean": mean, "stderr": stderr, "low": mean - half, "high": mean + half}


def power(pairs: int, ratio: float) -> float:
    """Power of the two-sided paired t test at LEVEL; `ratio`: effect over the pairs' deviation."""
    bound = stats.t.ppf(1 - LEVEL / 2, pairs - 1)
    shift = ratio * math.sqrt(pairs)
    return float(stats.nct.sf(bound, pairs - 1, shift) + stats.nct.cdf(-bound, pairs - 1, shift))


def seeds_needed(deviation: float, effect: float = EFFECT) -> int:
    """Fewest seeds at which the paired t test sees `effect` with POWER.

    deviation: of the paired differences from seed to seed.
    """
    if not deviation > 0:
        raise ValueError("Without spread there is no sample size.")
    ratio, low, high = effect / deviation, 1, 2
    while power(high, ratio) < POWER:
        low, high = high, 2 * high
    while high - low > 1:  # power rises with the number of pairs
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, ratio) >= POWER else (middle, high)
    return high


def pictures_needed(stderr: float, pictures: int, effect: float = EFFECT) -> int:
    """Pictures a model at which two models that differ by `effect` are told apart with POWER.

    For one pair of models as they are, by a z test, the prompts growing with the pictures: what
    another seed would have trained is no part of it. stderr: of a score from `pictures` pictures.
    """
    z = stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf(POWER)
    return math.ceil(pictures * 2 * (z * stderr / effect) ** 2)


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Means by group, paired differences and sample sizes, as plain JSON values."""
    by_group = {
        name: sorted((r for r in results if r.group == name), key=lambda r: r.seed)
        for name in GROUPS
    }
    groups = {name: _group(name, found) for name, found in by_group.items() if found}
    effects = [
        effect
        for after, before, words in EFFECTS
        if (effect := _effect(after, before, words, by_group)) is not None
    ]
    return {
        "groups": groups,
        "effects": effects,
        "sample_size": {kind: _sample_size(kind, effects, results) for kind in ("score", "all")},
        "results": [asdict(result) for result in results],
    }


def _group(name: str, found: Sequence[Result]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "feedback": GROUPS[name].feedback,
        "seeds": [r.seed for r in found],
        "images": float(np.mean([r.images for r in found])),
        "score": mean_of([r.score for r in found]),
        "chance": float(np.mean([r.chance for r in found])),
        # What one model's score is uncertain by for want of prompts, whatever the seed.
        "stderr_prompts": float(np.mean([r.stderr for r in found])),
        "all_stderr_prompts": float(np.mean([r.all_stderr for r in found])),
        "all": mean_of([r.all_score for r in found]),
        "all_chance": float(np.mean([r.all_chance for r in found])),
        "paper": GROUPS[name].paper,
    }
    wins = [r.win["win_rate"] for r in found if r.win]
    if wins:
        row["win_rate"] = mean_of(wins)
    return row


def _effect(
    after: str, before: str, words: str, by_group: Mapping[str, Sequence[Result]]
) -> dict[str, Any] | None:
    """The paired difference of two groups over the seeds that both have; None without any."""
    first = {r.seed: r for r in by_group[before]}
    pairs = [(r, first[r.seed]) for r in by_group[after] if r.seed in first]
    if not pairs:
        return None
    effect: dict[str, Any] = {
        "pair": f"{after} − {before}",
        "what": words,
        "seeds": [r.seed for r, _ in pairs],
    }
    for kind, value, error in (
        ("score", "score", "stderr"),
        ("all", "all_score", "all_stderr"),
    ):
        values = [getattr(r, value) - getattr(q, value) for r, q in pairs]
        noise = [getattr(r, error) ** 2 + getattr(q, error) ** 2 for r, q in pairs]
        effect[kind] = mean_of(values)
        if len(values) > 1:
            deviation = float(np.std(values, ddof=1))
            effect[kind] |= {
                "deviation": deviation,
                "deviation_prompts": math.sqrt(float(np.mean(noise))),
                "seeds_needed": seeds_needed(deviation) if deviation > 0 else None,
            }
    if after not in COMPARED:
        effect["paper"] = round(GROUPS[after].paper - GROUPS[before].paper, 3)
    else:
        wins = [r.win["win_rate"] - q.win["win_rate"] for r, q in pairs if r.win and q.win]
        if wins:
            effect["win_rate"] = mean_of(wins)
    return effect


def _sample_size(
    kind: str, effects: Sequence[Mapping[str, Any]], results: Sequence[Result]
) -> dict[str, Any] | None:
    """Seeds and pictures for an effect of EFFECT, from the spread of all pairs together."""
    known = [(e[kind]["deviation"], len(e["seeds"]) - 1) for e in effects if "deviation" in e[kind]]
    if not known:
        return None
    freedom = sum(df for _, df in known)
    if not any(sd > 0 for sd, _ in known):  # all scores alike, as at chance: nothing to tell
        return None
    deviation = math.sqrt(sum(sd**2 * df for sd, df in known) / freedom)
    stderr, pictures = ("stderr", "pictures") if kind == "score" else ("all_stderr", "all_pictures")
    error = math.sqrt(float(np.mean([getattr(r, stderr) ** 2 for r in results])))
    drawn = round(float(np.mean([getattr(r, pictures) for r in results])))
    # A deviation from few seeds is rough: what it may well be, at most and at least.
    low, high = (deviation * math.sqrt(freedom / stats.chi2.ppf(p, freedom)) for p in (0.9, 0.1))
    return {
        "effect": EFFECT,
        "deviation": deviation,
        "degrees_of_freedom": freedom,
        "seeds": seeds_needed(deviation),
        "seeds_low": seeds_needed(low),
        "seeds_high": seeds_needed(high),
        "pictures_drawn": drawn,
        "pictures": pictures_needed(error, drawn),
    }
