"""Coverage ledger: how often each sample was trained on, kept across resumes.

The paper (section 3.1, b) names the loss of track of trained indices on a resume as a cause
of losing the long tail. One byte a sample, saturating at 255, a file a shard.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from components.errors import UserError
from components.files import atomic_folder, read_json, write_json

FULL = np.iinfo(np.uint8).max


class Ledger:
    """Counts draws of sample ids 0 … n-1; `shards` gives the samples of each shard in id order."""

    def __init__(self, shards: Mapping[str, int]) -> None:
        self.shards = {str(name): int(count) for name, count in shards.items()}
        self.drawn = np.zeros(sum(self.shards.values()), np.uint8)

    @classmethod
    def of(cls, shard_of_sample: Sequence[str]) -> "Ledger":
        """Make one from the shard (n,) of each sample, as the encoded index lists them.

        ValueError when the samples of a shard do not follow one another.
        """
        names = np.asarray(shard_of_sample, dtype=str)
        starts = np.flatnonzero(np.r_[len(names) > 0, names[1:] != names[:-1]])
        counts = np.diff(np.r_[starts, len(names)]).astype(int)
        shards = {str(names[s]): int(c) for s, c in zip(starts, counts, strict=True)}
        if len(shards) != len(starts):
            raise ValueError("the samples of each shard must follow one another")
        return cls(shards)

    def add(self, ids: np.ndarray) -> None:
        """Count a batch of sample ids (B,); an id may occur more than once."""
        unique, times = np.unique(ids, return_counts=True)
        room = FULL - self.drawn[unique]
        self.drawn[unique] += np.minimum(times, room).astype(np.uint8)

    def save(self, folder: Path) -> None:
        """Write index.json and {shard}.npy (uint8), all or nothing."""
        with atomic_folder(folder) as new:
            start = 0
            for name, count in self.shards.items():
                np.save(new / f"{name}.npy", self.drawn[start : start + count])
                start += count
            write_json(new / "index.json", self.shards)

    @classmethod
    def load(cls, folder: Path) -> "Ledger":
        """Read what `save` wrote. UserError when a shard is missing or of another length."""
        folder = Path(folder)
        ledger = cls(read_json(folder / "index.json"))
        start = 0
        for name, count in ledger.shards.items():
            path = folder / f"{name}.npy"
            counts = np.load(path, allow_pickle=False) if path.is_file() else np.zeros(0, np.uint8)
            if counts.shape != (count,) or counts.dtype != np.uint8:
                raise UserError(
                    f"The coverage ledger {path} does not hold the {count} counts of its index; "
                    "delete the folder to start counting again."
                )
            ledger.drawn[start : start + count] = counts
            start += count
        return ledger

    def report(self) -> dict[str, Any]:
        """Figures of coverage: the tail never drawn, in all and in the shards where it is worst."""
        n = max(len(self.drawn), 1)
        never, start = {}, 0
        for name, count in self.shards.items():
            never[name] = int((self.drawn[start : start + count] == 0).sum())
            start += count
        worst = sorted(never, key=lambda name: -never[name] / max(self.shards[name], 1))[:10]
        times = np.bincount(self.drawn, minlength=5)
        return {
            "samples": len(self.drawn),
            "never": int(times[0]),
            "never_share": float(times[0] / n),
            "times": {**{str(t): int(times[t]) for t in range(4)}, "4+": int(times[4:].sum())},
            "most": int(self.drawn.max(initial=0)),
            "saturated": int((self.drawn == FULL).sum()),
            "worst_shards": {name: never[name] / max(self.shards[name], 1) for name in worst},
        }
