"""A pass over many shards in a few processes, going on where a killed run stopped."""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from components.curation.passes import PASSES, Job, use_one_thread
from components.errors import UserError
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
    pixels = job.curation["limits"]["pixels"]
    if workers == 1 or len(jobs) < 2:
        use_one_thread(pixels)
        for count, (shard, its) in enumerate(jobs, done + 1):
            function(shard, its)
            progress.at(count)
        return
    # Forked children of a process with threads (torch, onnxruntime) can hang: start anew.
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), get_context("spawn"), _start, (os.getpid(), pixels)
    )
    try:
        with pool:
            futures = {pool.submit(function, shard, its): shard for shard, its in jobs}
            try:
                for count, future in enumerate(as_completed(futures), done + 1):
                    future.result()
                    progress.at(count)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool as problem:
        raise UserError(
            f"A process of the pass {name!r} died (out of memory?): run it again, it goes on "
            "from the finished shards; curation.workers sets how many there are."
        ) from problem


def _start(parent: int, pixels: int) -> None:
    """Set up a worker process, and end it when its parent is gone: a killed run leaves none."""
    use_one_thread(pixels)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
