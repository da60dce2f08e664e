"""What curation costs beside its models, and whether its memory grows with the set.

python benchmarks/curation.py overhead [PICTURES] [SIDE]
python benchmarks/curation.py memory [PICTURES] [MB]

overhead: all embedded filters on all pictures (no gates), in one process on one thread; prints CPU
seconds by part of the work, and the share of reading, decoding, writing and bookkeeping.
memory: model filters off, PICTURES small ones and a tenth of them, MB for the database; prints the
most memory that the process held, and pictures a second.
The pictures are the embedded world's, sound and spoilt.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from components.compose import defaults
from components.curation.curate import curate
from components.scenes.raw import write_raw
from components.tracking import Tracker

MODELS = ("faces", "nsfw", "text")
FILTERS = ("caption", "resolution", "aspect", "contrast", "noise", "sharpness", *MODELS)


def draw(folder, pictures, size, shard):
    params = defaults([f"data.raw.pictures={pictures}", f"data.raw.shard={shard}"])
    params["data"]["raw"]["sizes"] = {f"{size}x{size}": 1.0}
    params["data"]["defects"]["too_small"]["shorter_side"] = [size // 3, size // 2]
    write_raw(folder, params, Tracker())


def run(source, out, overrides):
    """Curate in this process; returns wall seconds, figures."""
    params = defaults(["curation.workers=1", *overrides])
    started = time.monotonic()
    curate(source, out, params, Tracker(), out.with_suffix(".json"))
    return time.monotonic() - started, json.loads(out.with_suffix(".json").read_text())


def overhead(pictures=400, size=256):
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "raw", Path(folder) / "out"
        draw(source, pictures, size, 100)
        seconds, figures = run(source, out, ["curation.resolution.shorter_side=128"])
    parts = figures["cpu_seconds"]
    whole = sum(parts.values())
    for name, spent in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"{name:12} {spent:8.2f} s  {100 * spent / whole:5.1f} %")
    models = sum(parts.get(name, 0.0) for name in MODELS)
    filters = sum(parts.get(name, 0.0) for name in FILTERS)
    print(
        f"{pictures} pictures of {size} px, {figures['kept']} kept: {pictures / seconds:.1f} "
        f"images/s on one core, {1000 * whole / pictures:.1f} ms of CPU a picture; outside the "
        f"filters {100 * (1 - filters / whole):.1f} %, outside those with a model "
        f"{100 * (1 - models / whole):.1f} %"
    )


def memory(pictures=100_000, limit=512):
    with tempfile.TemporaryDirectory() as folder:
        for count in (pictures // 10, pictures):
            source, out = Path(folder) / f"raw{count}", Path(folder) / f"out{count}"
            draw(source, count, 96, 1000)
            print(subprocess.run(
                [sys.executable, __file__, "one", str(source), str(out), str(limit)],
                check=True, text=True, stdout=subprocess.PIPE,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            ).stdout.splitlines()[-1])  # fmt: skip


def one(source, out, limit):
    """In a process of its own, so that its memory is curation's."""
    overrides = [
        "curation.skip=[faces,nsfw,text]",
        "curation.resolution.shorter_side=64",
        f"curation.limits.memory={limit}MB",
    ]
    seconds, figures = run(Path(source), Path(out), overrides)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    total = figures["total"]
    cpu = sum(figures["cpu_seconds"].values())
    print(
        f"{total} pictures: {most:.0f} MiB at most, {total / seconds:.0f} images/s by the clock on "
        f"one process, {1000 * cpu / total:.2f} ms of CPU a picture in the passes, "
        f"{figures['kept']} kept"
    )


if __name__ == "__main__":
    verb, *rest = sys.argv[1:] or ["overhead"]
    if verb == "one":
        one(*rest)
    else:
        {"overhead": overhead, "memory": memory}[verb](*map(int, rest))
