"""Curation on a task runner of Prefect's: `python -m flows.curate IN OUT`.

A task is one pass on one shard, in a local process or on Ray; what only all shards together can
tell is worked out here. On several machines IN and OUT lie on a disk that all of them see.
"""

import argparse
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from components.errors import UserError, needed

with needed("curate", __name__):
    from prefect import flow, get_client, task
    from prefect.artifacts import create_markdown_artifact
    from prefect.cache_policies import NO_CACHE
    from prefect.client.schemas.objects import TaskRun
    from prefect.futures import PrefectFuture
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.states import State
    from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner

    from components.compose import defaults
    from components.processes import end_with
    from components.progress import Progress
    from components.tracking import Tracker
    from flows.command import command

if TYPE_CHECKING:
    # For their names alone: with what they import, a mistake in the call would be said later.
    from components.curation.passes import Job
    from components.curation.pool import Each
    from components.curation.sources import Unit

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray starts
ENGINES = ("processes", "ray")
AHEAD = 4  # tasks a worker has waiting: it is never idle, and a million shards are no million tasks
HERE = ("", "auto", "localhost", "127.0.0.1")
# No picture goes through Ray's store: tasks return nothing. This is the least that Ray takes.
STORE = 80 << 20  # bytes
Runner = Callable[[], TaskRunner[Any]]


def _can_help(task: Any, task_run: TaskRun, state: State) -> bool:
    """A disk of the network may answer the second time; a refused input stays refused."""
    return not isinstance(state.result(raise_on_failure=False), UserError)


@task(
    cache_policy=NO_CACHE,
    task_run_name="{name} {unit.name}",
    retries=1,
    retry_condition_fn=_can_help,
)
def one(name: str, unit: "Unit", job: "Job") -> None:
    """One pass on one shard."""
    from components.curation.pool import run_one

    run_one(name, unit, job)


@flow(name="curate", log_prints=True)
def curate(
    source: Path,
    out: Path,
    overrides: list[str] | None = None,
    workers: int | None = None,
    engine: str = "processes",
    address: str | None = None,
) -> None:
    """Curate a folder as `djepa curate` does, to the same bytes, and hold it to its contract.

    Args:
        source: shards, parquet files or pictures; see components/curation/curate.py.
        out: the folder for the curated set.
        overrides: NAME=VALUE of parameters.
        workers: one-thread processes, by default `curation.workers`; a cluster has its own.
        engine: `processes` of this machine or `ray`.
        address: of a Ray cluster; without one, Ray is started here for this run.

    Raises:
        UserError: as `curate` of the library; or engine and address do not fit.
    """
    from components.curation.contract import check
    from components.curation.curate import curate as curate_folder

    params, tracker = defaults(overrides or []), Tracker()
    if workers is not None:
        params["curation"]["workers"] = workers
    # The workers' folder may be another one.
    source, out = Path(source).absolute(), Path(out).absolute()
    with spread_on(engine, address, int(params["curation"]["workers"])) as each:
        curate_folder(source, out, params, tracker, each=each)
    page = (out / "report.md").read_text()
    create_markdown_artifact(page, key="curation", description="What was kept and rejected")
    check(out, out / "contract.json", out / "contract", params, tracker)


@contextmanager
def spread_on(engine: str, address: str | None, workers: int) -> Iterator["Each"]:
    """Yield what runs a pass on many units on this engine, which is up as long as the block.

    Raises UserError for an engine that there is not, that is not installed, or that the address
    does not fit.
    """
    if engine not in ENGINES:
        raise UserError(f"There is no engine {engine!r}: choose {' or '.join(ENGINES)}.")
    if address and engine != "ray":
        raise UserError(f"The address {address} is a Ray cluster's: choose --engine ray with it.")
    if _host(address) not in HERE and not PREFECT_API_URL.value():
        raise UserError(
            f"The workers at {address} cannot reach the Prefect server of this process: start "
            f"`prefect server start --host ADDRESS` and set PREFECT_API_URL to it."
        )
    make = _on_ray(address, workers) if engine == "ray" else _on_processes(workers)
    deaths = _deaths(engine)

    def each(name: str, units: Sequence["Unit"], job: "Job", workers: int) -> None:
        progress = Progress(f"curate {name}", len(units), "shards")
        for last in (False, True):
            try:
                with make() as runner:
                    _run(runner, name, units, job, progress)
                return
            except deaths as problem:
                if last:
                    raise UserError(
                        f"Processes of the pass {name!r} died twice (out of memory?): run it "
                        f"again, it goes on from the finished shards; --workers sets how many "
                        f"there are."
                    ) from problem

    # Without the address each worker would start a server of its own.
    with get_client(sync_client=True) as client:
        server = str(client.api_url)
    # Ray stays up between the passes: the runner of a pass finds the one that runs.
    held = make() if engine == "ray" else nullcontext()
    with temporary_settings({PREFECT_API_URL: server}), held:
        yield each


def _run(
    runner: TaskRunner[Any], name: str, units: Sequence["Unit"], job: "Job", progress: Progress
) -> None:
    """Run the pass on the units that lack its file; raises the first failure as it was raised."""
    from components.curation.pool import pending

    left = pending(name, units, job)
    done = len(units) - len(left)
    waiting: deque[PrefectFuture[Any]] = deque()
    for unit in [*left, None]:
        while waiting and (unit is None or len(waiting) >= AHEAD * _workers(runner)):
            waiting.popleft().result()
            done += 1
            progress.at(done)
        if unit is not None:
            waiting.append(runner.submit(one, {"name": name, "unit": unit, "job": job}))
    lost = pending(name, units, job)
    if lost:
        raise UserError(
            f"The pass {name!r} of {lost[0].name} left nothing in {job.work}: name a folder OUT "
            f"on a disk that this machine and all workers see."
        )


def _workers(runner: TaskRunner[Any]) -> int:
    """How many tasks run at a time."""
    if isinstance(runner, ProcessPoolTaskRunner):
        return runner._max_workers
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _on_processes(workers: int) -> Runner:
    return lambda: ProcessPoolTaskRunner(workers, initializer=end_with, initargs=(os.getpid(),))


def _on_ray(address: str | None, workers: int) -> Runner:
    if not address:
        # Ray takes another address than the loopback's unless it holds the machine for one
        # without clusters; read when it is imported.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        from prefect_ray import RayTaskRunner
    except ModuleNotFoundError as missing:
        raise UserError(
            f"The engine ray needs the package {missing.name!r}: install it with "
            "`pip install prefect-ray`."
        ) from missing
    settings: dict[str, Any] = {"log_to_driver": False}
    if not address:
        settings |= {
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": STORE,
        }
    return lambda: RayTaskRunner(address, settings)


def _deaths(engine: str) -> tuple[type[BaseException], ...]:
    """What a task's future raises when its process is gone; Ray itself has tried again by then."""
    if engine != "ray":
        return (BrokenProcessPool,)
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

    return NodeDiedError, OutOfMemoryError, WorkerCrashedError


def _host(address: str | None) -> str:
    """The host of `ray://HOST:PORT`, HOST:PORT or `auto`."""
    text = address or ""
    return urlsplit(text if "//" in text else f"//{text}").hostname or ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the flow; what the user can mend is one sentence and exit code 2."""
    parser = argparse.ArgumentParser("python -m flows.curate", description=__doc__)
    parser.add_argument("source", type=Path, metavar="IN", help="shards, parquet files, pictures")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the curated set")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="parameters")
    parser.add_argument("--workers", type=int, help="one-thread processes")
    parser.add_argument("--engine", choices=ENGINES, default="processes")
    parser.add_argument("--address", help="of a Ray cluster: ray://HOST:10001")
    options = vars(parser.parse_intermixed_args(arguments))
    return command("curate", lambda: curate(**options))


if __name__ == "__main__":
    # By its name, as the workers import it: of __main__ they would get a copy.
    from flows.curate import main as run

    sys.exit(run())
