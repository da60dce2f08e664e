"""A pass over many units, in a few processes here; it goes on where a killed run stopped."""

from collections.abc import Callable, Sequence
from functools import partial

from components.curation.pack import pack, show
from components.curation.passes import Job, judge, scan
from components.curation.sources import Unit
from components.processes import spread
from components.progress import Progress

PASSES: dict[str, Callable[[Unit, Job], None]] = {
    "scan": scan,
    "judge": judge,
    "pack": pack,
    "show": show,
}
# Runs the pass of this name on the units, which lack its file, in `workers` processes.
Each = Callable[[str, Sequence[Unit], Job, int], None]


def run_one(name: str, unit: Unit, job: Job) -> None:
    """Run one pass on one unit."""
    PASSES[name](unit, job)


def pending(name: str, units: Sequence[Unit], job: Job) -> list[Unit]:
    """The units that lack the pass's last file."""
    return [unit for unit in units if not job.path(unit, f"{name}.json").exists()]


def run_pass(name: str, units: Sequence[Unit], job: Job, workers: int) -> None:
    """Run the pass on the units in processes of this machine; one worker is this process.

    Raises UserError when a worker process dies.
    """
    progress = Progress(f"curate {name}", len(units), "shards")
    died = (
        f"A process of the pass {name!r} died (out of memory?): run it again, it goes on "
        "from the finished shards; curation.workers sets how many there are."
    )
    make = partial(partial, _run, name, job)
    for count, _ in enumerate(spread(make, units, workers, died), 1):
        progress.at(count)


def _run(name: str, job: Job, unit: Unit) -> None:
    run_one(name, unit, job)
