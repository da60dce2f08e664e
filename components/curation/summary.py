"""Counts of a curation run: by filter, by gate, and against the ground truth where there is one."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from components.curation.chain import EXACT, NEAR, SYNTHETIC, Chain
from components.curation.detectors import Gated
from components.curation.filters import Filter

BINS = 40
REPEATED = (EXACT, NEAR)


class Summary:
    """Adds up rows, or other summaries: counts, histograms and a few names, never the rows."""

    def __init__(self, filters: Chain, curation: Mapping[str, Any]) -> None:
        self.filters, self.names = filters.scored, filters.names
        self.pictures = int(curation["report"]["pictures"])
        self.total = self.kept = self.synthetic = 0
        self.rejected: Counter[str] = Counter()
        self.reasons: dict[str, list[str]] = defaultdict(list)
        self.truth: dict[str, Counter[str]] = defaultdict(Counter)  # defect -> filter or ''
        self.gates: dict[str, Counter[str]] = {
            f.name: Counter() for f in self.filters if isinstance(f, Gated)
        }
        self.edges = {f.name: np.linspace(0, _top(f), BINS + 1) for f in self.filters}
        self.histograms = {f.name: np.zeros(BINS, np.int64) for f in self.filters}
        # Nearest to the threshold, by (filter, kept): a heap of (-distance, shard, key, score).
        self.nearest: dict[tuple[str, bool], list[tuple[float, str, str, float]]] = {}
        self.seconds: Counter[str] = Counter()
        self.frequencies = pd.DataFrame(columns=["notion", "kind", "count"])

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a sample: its row of scan and judge joined, with the last verdict."""
        by = row["filter"] or ""
        self.total += 1
        self.kept += not by
        self.synthetic += bool(row["synthetic"]) and not by
        if by:
            self.rejected[by] += 1
            if row["score"] is None or by in REPEATED:
                self._example(by, f"{row['shard']} {row['key']}: {row['reason']}")
        if row["truth"] is not None:
            self.truth[row["truth"]][by] += 1
        if by in (*REPEATED, SYNTHETIC):
            self._near(by, False, 0.0, row, row["score"])
        for stage in self.filters:
            self._score(stage, row)

    def state(self) -> dict[str, Any]:
        """What was added so far, for JSON."""
        return {
            "total": self.total,
            "kept": self.kept,
            "synthetic": self.synthetic,
            "rejected": self.rejected,
            "reasons": self.reasons,
            "truth": self.truth,
            "gates": self.gates,
            "histograms": {name: counts.tolist() for name, counts in self.histograms.items()},
            "nearest": [[*place, sorted(heap)] for place, heap in self.nearest.items()],
        }

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add the state of another summary, of the units after those added so far."""
        self.total += state["total"]
        self.kept += state["kept"]
        self.synthetic += state["synthetic"]
        self.rejected.update(state["rejected"])
        for name, texts in state["reasons"].items():
            for text in texts:
                self._example(name, text)
        for defect, counts in state["truth"].items():
            self.truth[defect].update(counts)
        for name, counts in state["gates"].items():
            self.gates[name].update(counts)
        for name, counts in state["histograms"].items():
            self.histograms[name] += np.array(counts, np.int64)
        for name, kept, entries in state["nearest"]:
            for entry in entries:
                self._push(name, kept, tuple(entry))

    def _score(self, stage: Filter, row: Mapping[str, Any]) -> None:
        score, name = row.get(f"score_{stage.name}"), stage.name
        gate = self.gates.get(name)
        if gate is not None and row.get(f"gate_{name}") is not None:
            sampled = row[f"sampled_{name}"]
            group = "sampled" if sampled else "suspects" if score is not None else "passed"
            gate[group] += 1
            if row["filter"] == name:
                gate[f"{group}_found"] += 1
        if score is None:
            return
        bin_ = np.searchsorted(self.edges[name], score, side="right") - 1
        self.histograms[name][min(int(bin_), BINS - 1)] += 1
        if np.isfinite(stage.threshold):
            kept = row["filter"] != name
            if not kept or row["filter"] is None:
                self._near(name, kept, abs(score - stage.threshold), row, score)

    def _near(
        self, name: str, kept: bool, distance: float, row: Mapping[str, Any], score: float
    ) -> None:
        self._push(name, kept, (-distance, row["shard"], row["key"], float(score)))

    def _push(self, name: str, kept: bool, entry: tuple[float, str, str, float]) -> None:
        heap = self.nearest.setdefault((name, kept), [])
        heapq.heappush(heap, entry)
        if len(heap) > self.pictures:
            heapq.heappop(heap)

    def _example(self, name: str, text: str) -> None:
        if len(self.reasons[name]) < self.pictures:
            self.reasons[name].append(text)

    def figures(self) -> dict[str, Any]:
        """The figures of summary.json; the same for the same input."""
        return {
            "total": self.total,
            "kept": self.kept,
            "kept_share": round(self.kept / max(self.total, 1), 4),
            "synthetic_share": round(self.synthetic / max(self.kept, 1), 4),
            "rejected": {name: self.rejected[name] for name in self.names},
            "thresholds": {f.name: _finite(f.threshold) for f in self.filters},
            "gates": {name: _gate(counts) for name, counts in self.gates.items()},
            "notions": dict(
                zip(
                    self.frequencies["notion"],
                    (int(c) for c in self.frequencies["count"]),
                    strict=True,
                )
            ),
            "ground_truth": self._against_truth() if self.truth else None,
        }

    def _against_truth(self) -> dict[str, Any]:
        """Recall by defect, precision by filter; the cap on synthetic pictures judges nothing."""
        sound = self.truth.get("", Counter())
        count = sum(sound.values())
        passed = sound[""] + sound[SYNTHETIC]
        defects = {}
        for kind in sorted(k for k in self.truth if k):
            by, n = self.truth[kind], sum(self.truth[kind].values())
            caught = n - by[""] - by[SYNTHETIC]
            names = [name for name in self.names if by[name]]
            defects[kind] = {
                "count": n,
                "rejected": caught,
                "recall": round(caught / n, 4),
                "by": {name: by[name] for name in names},
            }
        precision = {}
        for name in self.names:
            if name != SYNTHETIC and self.rejected[name]:
                wrong = sound[name]
                precision[name] = round(1 - wrong / self.rejected[name], 4)
        return {
            "sound": {
                "count": count,
                "passed": passed,
                "share": round(passed / max(count, 1), 4),
                "rejected_by": {n: sound[n] for n in self.names if sound[n] and n != SYNTHETIC},
            },
            "defects": defects,
            "precision": precision,
        }

    def cpu_seconds(self) -> dict[str, float]:
        """CPU seconds by part of the work, over all processes."""
        return {name: round(seconds, 2) for name, seconds in self.seconds.items()}

    def flat(self) -> dict[str, float]:
        """The figures as flat metrics, `curate/…`."""
        figures = self.figures()
        flat: dict[str, float] = {
            f"curate/{n}": figures[n] for n in ("total", "kept", "kept_share", "synthetic_share")
        }
        flat |= {f"curate/rejected/{n}": c for n, c in figures["rejected"].items()}
        flat |= {f"curate/cpu_seconds/{n}": s for n, s in self.seconds.items()}
        for name, gate in figures["gates"].items():
            if gate["recall"] is not None:
                flat[f"curate/gate_recall/{name}"] = gate["recall"]
        if figures["ground_truth"]:
            flat["curate/sound_passed"] = figures["ground_truth"]["sound"]["share"]
            for kind, row in figures["ground_truth"]["defects"].items():
                flat[f"curate/recall/{kind}"] = row["recall"]
        return flat

    def line(self) -> str:
        """One line for the end of the run."""
        by = ", ".join(
            f"{name} {self.rejected[name]}" for name in self.names if self.rejected[name]
        )
        return f"curate: {self.kept} of {self.total} kept; rejected: {by or 'none'}"


def _gate(counts: Mapping[str, int]) -> dict[str, Any]:
    """Recall of a gate, estimated from the random sample of what it let pass.

    Missed among the unexamined = their number × the share found in the sample. recall_low puts
    the upper 95 % bound of that share in its place (Wilson's interval; also with none found).
    """
    found, sampled = counts["suspects_found"], counts["sampled"]
    missed_in_sample, passed = counts["sampled_found"], counts["passed"]
    out: dict[str, Any] = {
        "suspects": counts["suspects"],
        "suspects_found": found,
        "sampled": sampled,
        "sampled_found": missed_in_sample,
        "passed": passed,
        "recall": None,
        "recall_low": None,
    }
    beyond = passed + sampled
    if not beyond:
        out["recall"] = out["recall_low"] = 1.0
    elif sampled and found + missed_in_sample:
        share = missed_in_sample / sampled
        z2 = 1.96**2
        middle = share + z2 / (2 * sampled)
        spread = 1.96 * np.sqrt(share * (1 - share) / sampled + z2 / (4 * sampled**2))
        high = min(1.0, (middle + spread) / (1 + z2 / sampled))
        out["recall"] = round(found / (found + share * beyond), 4)
        out["recall_low"] = round(found / (found + high * beyond), 4) if found else 0.0
    return out


def _top(stage: Filter) -> float:
    """Where a filter's histogram ends; higher scores are counted in the last bin."""
    shares = {"sharpness": 1.0, "text": 0.25, "nsfw": 1.0, "faces": 8.0, "aspect": 4.0}
    return shares.get(stage.name, 4 * stage.threshold if stage.threshold > 0 else 1.0)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
