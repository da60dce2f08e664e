"""Throughput of curation on a local Ray: two one-thread workers against one.

python benchmarks/curation_ray.py [SHARDS] [PICTURES]

SHARDS of PICTURES each, 40 of 6 by default, with lettering in every picture, so that reading it
is most of the work. Ray's start and a first small folder (imports) are not counted; the loading
of models is. Beside other work the workers wait for cores (Ray gives them niceness 15): where
wall-clock seconds are many more than CPU seconds a worker, the ratio says nothing.
"""

import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import cv2
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from components.compose import defaults
from components.curation.curate import curate
from components.curation.shards import write_shard
from components.files import read_json
from components.tracking import Tracker
from flows.curate import flow, spread_on
from tests.test_curation import members, scene

SIDES = (448, 352)  # px
# Nothing but the letters is to be rejected, and they are not either.
OVERRIDES = [
    "curation.resolution.shorter_side=96",
    "curation.sharpness.ratio=0",
    "curation.text.area=1",
    "curation.notions.least=1",
]
FIRST = 4  # shards of the folder that is not counted


def draw(folder, shards, pictures, seed):
    folder.mkdir()
    for shard in range(shards):
        samples = []
        for i in range(pictures):
            number = seed + shard * pictures + i
            pixels, colour = scene(number, *SIDES)
            for line in range(4):
                place = (20 + 31 * (number % 5), 60 + 80 * line)
                words = f"{number * 7919 % 99991} WORDS {line}"
                cv2.putText(pixels, words, place, cv2.FONT_HERSHEY_SIMPLEX, 0.9, (250,) * 3, 2)
            samples.append((f"{seed}{shard:05d}{i:04d}", members(pixels, f"a {colour} circle")))
        write_shard(folder / f"{shard:05d}.tar", samples)
    return folder


@flow(name="benchmark")
def seconds(first, data, out, workers):
    """Wall-clock seconds of each pass, and CPU seconds of them all."""
    params = defaults(OVERRIDES)
    params["curation"]["workers"] = workers
    spent = Counter()
    with spread_on("ray", None, workers) as each:

        def timed(name, units, job, workers):
            start = time.perf_counter()
            each(name, units, job, workers)
            spent[name] += time.perf_counter() - start

        curate(first, out / f"first{workers}", params, Tracker(), each=each)
        curate(data, out / f"{workers}", params, Tracker(), out / "metrics.json", timed)
    return dict(spent), sum(read_json(out / "metrics.json")["cpu_seconds"].values())


def main():
    shards, pictures = (int(a) for a in (*sys.argv[1:], 40, 6)[:2])
    os.environ["PYTHONPATH"] = sys.path[0]  # for Ray's workers
    rates = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        first = draw(folder / "first", FIRST, 1, 9_000_000)
        data = draw(folder / "data", shards, pictures, 0)
        for workers in (1, 2):
            load = os.getloadavg()[0]
            spent, busy = seconds(first, data, folder, workers)
            total = sum(spent.values())
            rates[workers] = shards * pictures / total
            each = ", ".join(f"{name} {s:.1f} s" for name, s in spent.items())
            print(
                f"{workers} one-thread Ray workers: {rates[workers]:.2f} images/s, {total:.1f} s "
                f"({each}), {busy:.1f} CPU s; "
                f"{psutil.cpu_count()} cores, load {load:.1f} before",
                flush=True,
            )
    print(f"two against one: {rates[2] / rates[1]:.2f} times")


if __name__ == "__main__":
    main()
