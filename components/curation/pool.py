"""A pass over many shards in a few processes, going on where a killed run stopped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from components.curation.passes import PASSES, Job, use_one_thread
from components.processes import spread
from components.progress import Progress


def run_pass(
    name: str,
    shards: Sequence[Path],
    job: Job,
    workers: int,
    keys: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Run the pass on every shard that lacks its file.

    keys: shard stem -> keys, handed to the shard's job. One worker runs in this process.
    Raises UserError when a worker process dies.
    """
    function, ending = PASSES[name]
    jobs = [
        (shard, replace(job, keys=list(keys.get(shard.stem, ()))) if keys else job)
        for shard in shards
        if not job.path(shard, ending).exists()
    ]
    progress = Progress(f"curate {name}", len(shards), "shards")
    done = len(shards) - len(jobs)
    progress.at(done, "found finished" if done else "")
    died = (
        f"A process of the pass {name!r} died (out of memory?): run it again, it goes on "
        "from the finished shards; curation.workers sets how many there are."
    )
    make = partial(_ready, function, job.curation["limits"]["pixels"])
    for count, _ in enumerate(spread(make, jobs, workers, died), done + 1):
        progress.at(count)


def _ready(function: Callable[[Path, Job], None], pixels: int) -> Callable[[tuple], None]:
    """The pass as a function of (shard, job), in a process with its libraries set."""
    use_one_thread(pixels)
    return lambda pair: function(*pair)
