"""Figures on one GPU, for docs/performance.md.

python -m benchmarks.gpu all --out FILE… [--seconds N] [--tiny]
python -m benchmarks.gpu report --out FILE…

`training`, `options`, `memory` and `sampling` measure one kind each, `all` everything in order of
importance. Every result is written to all --out files as soon as it is there; one that a file has
already is not measured again, so a call that ran out of time is simply repeated.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.gpu import memory, options, sampling, training
from benchmarks.gpu.record import Clock, Results, spread, timed
from benchmarks.gpu.report import tables
from benchmarks.gpu.world import parameters

KINDS: dict[str, Callable[..., Iterator[str]]] = {
    "training": training.run,
    "sampling": sampling.run,
    "options": options.run,
    "memory": memory.run,
}


def ceilings(results: Results, device: str) -> None:
    """What the GPU gives at most: bytes copied and a large matrix product."""
    case = {"kind": "ceilings"}
    if results.has(case) or device == "cpu":
        return
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    bytes_ = torch.empty(2**32, dtype=torch.uint8, device=device)
    other = torch.empty_like(bytes_)
    for work in (lambda: a @ b, lambda: other.copy_(bytes_)):
        timed(lambda work=work: [work() for _ in range(5)], device)
    product = [
        10 * 2 * 8192**3 / timed(lambda: [a @ b for _ in range(10)], device) for _ in range(5)
    ]
    copied = [
        10 * 2 * 2**32 / timed(lambda: [other.copy_(bytes_) for _ in range(10)], device)
        for _ in range(5)
    ]
    found = {
        "tflops": spread([each / 1e12 for each in product]),
        "terabytes_per_second": spread([each / 1e12 for each in copied]),
    }
    results.add(case, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=[*KINDS, "all", "report"])
    parser.add_argument("--out", type=Path, nargs="+", required=True, help="JSON lines")
    parser.add_argument("--seconds", type=float, default=540, help="to stop after")
    parser.add_argument("--tiny", action="store_true", help="a network that a CPU can try")
    parser.add_argument("--skip", nargs="+", default=[], help="cases whose names have these words")
    given = parser.parse_args()
    results = Results(given.out, given.skip)
    if given.what == "report":
        print(tables(results.lines.values()))
        return
    clock = Clock(given.seconds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not given.tiny:
        sys.exit("There is no GPU here: --tiny tries the program on a CPU.")
    peak = float(parameters("h", ["256x256"], 1, False)["plan"]["peak_flops"])
    ceilings(results, device)
    left: list[str] = []
    for kind, run in KINDS.items():
        if given.what in (kind, "all"):
            started = time.monotonic()
            left += run(results, clock, device, given.tiny, peak)
            print(f"{kind}: {time.monotonic() - started:.0f} s", flush=True)
    print(f"left for another call: {', '.join(left)}" if left else "all measured", flush=True)


if __name__ == "__main__":
    main()
