"""What statistical-analysis sampling costs a sample, on a made-up set of any size.

python benchmarks/sampler.py [SAMPLES] [NOTIONS]
"""

import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from components.feedback.ledger import Ledger
from components.feedback.sampler import StatisticalSampler


class View:
    """n samples, k notions of falling frequency, rungs of two sizes and three aspects."""

    def __init__(self, n, k):
        rng = np.random.default_rng(0)
        self.notions = np.zeros((n, k), bool)
        for i in range(k):
            self.notions[:, i] = rng.random(n, dtype=np.float32) < 0.6 / (i + 1)
        self.notion_names = [f"notion {i}" for i in range(k)]
        self.rungs = {"32x32": (32, 32), "48x32": (48, 32), "32x48": (32, 48), "48x48": (48, 48)}
        aspect = rng.integers(3, size=n, dtype=np.int8)
        small = {"48x32": aspect == 1, "32x48": aspect == 2, "48x48": aspect == 0}
        self._rows = {"32x32": np.arange(n)} | {k: np.flatnonzero(v) for k, v in small.items()}

    def rows(self, rung):
        return self._rows[rung]


def main():
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    k = int(sys.argv[2]) if len(sys.argv) > 2 else 60
    view = View(n, k)
    scores = np.random.default_rng(1).random(n)
    print(f"{n} samples, {k} notions")
    print("sampling     coin    critic  µs a sample  candidates a sample  state bytes")
    for sampling, coin, critic in (
        ("uniform", "sample", None),
        ("statistical", "sample", None),
        ("statistical", "notion", None),
        ("statistical", "sample", scores),
        ("statistical", "notion", scores),
    ):
        phase = {
            "rungs": list(view.rungs),
            "size": {"mean": 38, "std": 8, "low": 24, "high": 48},
            "batch": 64,
        }
        feedback = {"sampling": sampling, "coin": coin}
        feedback |= {"discard": 0.5, "tempering": 0.0, "most_dropped": 0.9}
        params = {"training": {"phase": phase}, "feedback": feedback}
        sampler = StatisticalSampler(view, params, "phase", 0, critic)
        started, drawn = time.perf_counter(), 0
        while drawn < 200_000:
            drawn += len(sampler.next_batch()[1])
        each = (time.perf_counter() - started) / drawn * 1e6
        ratio = sampler.tally["drawn"] / sampler.tally["accepted"]
        state = len(repr(sampler.state_dict()))
        word = "no" if critic is None else "yes"
        print(f"{sampling:12} {coin:7} {word:7} {each:11.2f}  {ratio:19.2f}  {state:11}")
    ledger, started = Ledger({"all": n}), time.perf_counter()
    for _ in range(1000):
        ledger.add(np.random.default_rng(0).integers(n, size=64))
    print(
        f"ledger: {(time.perf_counter() - started) / 64e3 * 1e6:.2f} µs a sample, 1 byte a sample"
    )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
