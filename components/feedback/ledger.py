"""Coverage ledger: how often each sample was trained on, kept across resumes and phases.

The paper (section 3.1, b) names the loss of track of trained indices on a resume as a cause
of losing the long tail. One byte a sample, saturating at 255, a file a shard. Samples held out for
validation are never trained on by intent: they are counted apart.

`djepa never-drawn states/r1` prints the keys of all samples that were never drawn.
"""

import tempfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from components.errors import UserError
from components.files import atomic_folder, read_json, write_json

if TYPE_CHECKING:  # it imports torch
    from components.tokens.encoded import EncodedSet

HELD_OUT = "held_out.json"  # in a ledger's folder
FULL = np.iinfo(np.uint8).max
CHUNK = 1 << 20  # samples gone through at a time
WORST = 10  # shards and attributes that the report names
KEYS = 20  # samples never drawn that the report names


class Ledger:
    """Counts draws of sample ids 0 … n-1; `shards` gives the samples of each shard in id order.

    The counts, `drawn` (n,) uint8, lie in a nameless file in `folder` (the system's folder for
    temporary files by default), which the system removes with the ledger: n may exceed memory.
    """

    def __init__(self, shards: Mapping[str, int], folder: Path | None = None) -> None:
        self.shards = {str(name): int(count) for name, count in shards.items()}
        n = sum(self.shards.values())
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(max(n, 1))  # sparse: blocks come with the first draw
            self.drawn = np.memmap(file, np.uint8, "r+", shape=max(n, 1))[:n]
        self.held_out = np.zeros(0, np.int64)  # ids, ascending, that are not to be drawn

    def add(self, ids: np.ndarray) -> None:
        """Count a batch of sample ids (B,); an id may occur more than once."""
        unique, times = np.unique(ids, return_counts=True)
        room = FULL - self.drawn[unique]
        self.drawn[unique] += np.minimum(times, room).astype(np.uint8)

    def by_shard(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each shard with the counts of its samples."""
        start = 0
        for name, count in self.shards.items():
            yield name, self.drawn[start : start + count]
            start += count

    def held_out_of(self, start: int, end: int) -> np.ndarray:
        """Ids held out of those from `start` to before `end`."""
        first, last = np.searchsorted(self.held_out, (start, end))
        return self.held_out[first:last]

    def save(self, folder: Path) -> None:
        """Write index.json, held_out.json and {shard}.npy (uint8), all or nothing."""
        with atomic_folder(folder) as new:
            for name, counts in self.by_shard():
                np.save(new / f"{name}.npy", counts)
            write_json(new / "index.json", self.shards)
            write_json(new / HELD_OUT, self.held_out.tolist())

    @classmethod
    def load(cls, folder: Path, working: Path | None = None) -> "Ledger":
        """Read what `save` wrote; `working` is the folder of its own counts.

        UserError when a shard is missing or of another length.
        """
        folder = Path(folder)
        ledger = cls(read_json(folder / "index.json"), working)
        for name, counts in ledger.by_shard():
            path = folder / f"{name}.npy"
            try:
                saved = np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError):
                saved = np.zeros(0)
            if saved.shape != counts.shape or saved.dtype != np.uint8:
                raise UserError(
                    f"The coverage ledger {path} does not hold the {len(counts)} counts of its "
                    "index; delete the folder to start counting again."
                )
            counts[:] = saved
        if (folder / HELD_OUT).is_file():  # older ledgers have none
            ledger.held_out = np.array(read_json(folder / HELD_OUT), np.int64)
        return ledger

    def report(self) -> dict[str, Any]:
        """Figures of coverage: the tail never drawn, in all and in the shards where it is worst.

        `drawn`: how many samples were drawn 0, 1, 2, … times, but for those `held_out`.
        """
        times = np.zeros(FULL + 1, np.int64)
        shares, first = {}, 0
        for name, counts in self.by_shard():
            before = times[0]
            for start in range(0, len(counts), CHUNK):
                times += np.bincount(counts[start : start + CHUNK], minlength=FULL + 1)
            held = self.held_out_of(first, first + len(counts))
            times -= np.bincount(self.drawn[held], minlength=FULL + 1)
            shares[name] = float((times[0] - before) / max(len(counts) - len(held), 1))
            first += len(counts)
        worst = sorted(shares, key=lambda name: -shares[name])[:WORST]
        most = int(np.flatnonzero(times).max(initial=0))
        return {
            "samples": len(self.drawn),
            "held_out": len(self.held_out),
            "never": int(times[0]),
            "never_share": float(times[0] / max(len(self.drawn) - len(self.held_out), 1)),
            "times": {**{str(t): int(times[t]) for t in range(4)}, "4+": int(times[4:].sum())},
            "drawn": times[: most + 1].tolist(),
            "most": most,
            "saturated": int(times[FULL]),
            "worst_shards": {name: shares[name] for name in worst},
        }


def coverage(ledger: Ledger, encoded: "EncodedSet") -> dict[str, Any]:
    """`Ledger.report`, and whose samples were drawn least: attributes by kind, and keys.

    `attributes`: by kind how many of its attributes occur in the set, how many of those no draw
    had, and the WORST of least draws a sample. `never_keys`: the first KEYS samples never drawn.
    All without the samples held out.
    """
    counts = encoded.attribute_counts.copy()
    draws, never = np.zeros(len(counts)), np.zeros(len(counts), np.int64)
    for start in range(0, len(ledger.drawn), CHUNK):
        drawn = np.asarray(ledger.drawn[start : start + CHUNK])
        values, offsets = encoded.attributes(np.arange(start, start + len(drawn)))
        times = np.repeat(drawn, np.diff(offsets))
        draws += np.bincount(values, times, len(counts))
        never += np.bincount(values[times == 0], minlength=len(counts))
        held = ledger.held_out_of(start, start + len(drawn))
        if len(held):
            apart = np.bincount(encoded.attributes(held)[0], minlength=len(counts))
            counts -= apart
            never -= apart
    kinds, start = {}, 0
    for kind, names in encoded.attribute_names.items():
        ids = start + np.flatnonzero(counts[start : start + len(names)])
        ids = ids[np.argsort(draws[ids] / counts[ids], kind="stable")]
        kinds[kind] = {
            "attributes": len(ids),
            "never": int((draws[ids] == 0).sum()),
            "least": {
                names[i - start]: {
                    "samples": int(counts[i]),
                    "never": int(never[i]),
                    "draws_a_sample": float(draws[i] / counts[i]),
                }
                for i in ids[:WORST].tolist()
            },
        }
        start += len(names)
    first = list(islice(_never(ledger, encoded), KEYS))
    return ledger.report() | {"attributes": kinds, "never_keys": first}


def never_drawn(state: Path, encoded: "EncodedSet") -> Iterator[str]:
    """Keys of all samples that the training state `state` was never trained on, nor held out.

    UserError for a state without a ledger, or of another encoded set.
    """
    if not (state / "ledger" / "index.json").is_file():
        raise UserError(f"{state} is no training state with a ledger; name one such as states/r1.")
    ledger = Ledger.load(state / "ledger")
    if ledger.shards != encoded.shards:
        raise UserError(f"{state} was trained on other samples than {encoded.folder} has.")
    yield from _never(ledger, encoded)


def _never(ledger: Ledger, encoded: "EncodedSet") -> Iterator[str]:
    for start, batch in encoded.batches(["key"]):
        never = ledger.drawn[start : start + len(batch)] == 0
        never[ledger.held_out_of(start, start + len(batch)) - start] = False
        yield from map(str, batch.column(0).filter(pa.array(never)).to_pylist())
