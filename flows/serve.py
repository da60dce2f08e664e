"""Server, deployments and workers on one machine: `make serve`, or `python -m flows.serve`.

Starts a Prefect server on 127.0.0.1, a worker for the pool `cpu` and one a GPU for the pool `gpu`,
deploys prefect.yaml, and keeps all of it running until Ctrl-C. Prefect itself is in the processes
that this one starts.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from components.errors import UserError, explain, needed, say
from components.home import djepa_home
from flows.guard import PATIENCE, guarded
from flows.rest import Server
from flows.worktree import GONE, give_up, runs

with needed("serve", __name__):
    import psutil
    import yaml

    from flows.deployments import FILE, deploy

HOST = "127.0.0.1"
START = 180  # seconds that the server may take to answer: its first start makes the database
EVERY = 10  # seconds between two looks for runs whose process is gone
REST = 5  # seconds before a process that ended by itself is started again
ENDING = 2 * PATIENCE + 10  # seconds that running flows get to end their stages


class Process:
    """One program that is kept running; what it prints comes out with its name before it."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name, self.command, self.environment = name, command, dict(environment)
        self.last: deque[str] = deque(maxlen=1)

    def start(self) -> None:
        """Start it, in a session of its own: Ctrl-C is for us, who stop it in order."""
        self.running = subprocess.Popen(
            guarded(self.command),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._relay, args=(self.running.stdout,), daemon=True).start()

    def _relay(self, lines: Any) -> None:
        for line in lines:
            if line.strip():
                self.last.append(line.strip())
                print(f"{self.name} | {line.rstrip()}", flush=True)

    def stop(self) -> None:
        """End it and its group, at the latest after PATIENCE."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.running.pid, number)
                self.running.wait(PATIENCE)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


def gpus() -> list[str]:
    """The ids of this machine's GPUs, or of those that CUDA_VISIBLE_DEVICES names."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    lines = [line for line in answer.stdout.splitlines() if line.startswith("GPU ")]
    return [str(number) for number in range(len(lines))]


def environment(port: int) -> dict[str, str]:
    """What server, workers and runs have in their environment."""
    given = dict(os.environ)
    home = djepa_home()
    (home / "arrivals").mkdir(exist_ok=True)  # where the nightly curation looks
    given.setdefault("PREFECT_HOME", str(home / "prefect"))
    given.setdefault("PREFECT_WORKER_QUERY_SECONDS", "5")
    tools = str(Path(sys.executable).parent)
    return given | {
        "DJEPA_HOME": str(home),
        "DO_NOT_TRACK": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        # A run that was killed with its worker holds its deployment's place no longer than this.
        "PREFECT_SERVER_CONCURRENCY_INITIAL_DEPLOYMENT_LEASE_DURATION": "60",
        "PREFECT_RUNNER_AUTO_INSTALL_DEPENDENCIES": "false",
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
    }


def check(port: int) -> None:
    """Raises UserError where there is nothing to deploy here, or the port is taken."""
    if not FILE.is_file():
        raise UserError(f"There is no {FILE} in {Path.cwd()}: run this in the top folder.")
    try:
        yaml.safe_load(FILE.read_text())
    except yaml.YAMLError as error:
        words = " ".join(str(error).split())
        raise UserError(
            f"{FILE} is no YAML ({words}): mend it and run `make serve` again."
        ) from error
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"Port {port} of {HOST} is taken, perhaps by another `make serve`: stop that one, "
                f"or choose another port with `make serve PORT={port + 1}`."
            ) from error


def _wait(what: str, done: Callable[[], bool], process: Process, stop: threading.Event) -> None:
    end = time.monotonic() + START
    while not done() and not stop.is_set():
        if process.running.poll() is not None or time.monotonic() > end:
            last = "".join(process.last) or "it printed nothing"
            raise UserError(
                f"{what} did not start ({last}): see what it printed above, mend that and run "
                f"`make serve` again."
            )
        time.sleep(0.2)


def workers(environment: Mapping[str, str]) -> dict[str, list[Process]]:
    """By pool: one for `cpu`, and for `gpu` one a GPU, or one that takes its work without any."""
    found = gpus()
    own = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in found] or [{}]
    command = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process", "--pool"]

    def worker(name: str, extra: Mapping[str, str], *options: str) -> Process:
        return Process(name, [*command, *options, "--name", name], {**environment, **extra})

    hidden = {"CUDA_VISIBLE_DEVICES": ""} if found else {}
    return {
        "cpu": [worker("cpu", hidden, "cpu")],
        "gpu": [
            worker(f"gpu-{number}", extra, "gpu", "--limit", "1")
            for number, extra in enumerate(own)
        ],
    }


def stop_workers(running: Sequence[Process]) -> None:
    """End the workers' runs, whose stages write their snapshots, then the workers."""
    pids = [each.running.pid for each in running]  # of the guards
    flows = {flow for pid in pids for worker in _children(pid) for flow in _children(worker.pid)}
    for flow in flows:
        with suppress(psutil.NoSuchProcess):
            flow.terminate()  # it ends its stage, and Prefect notes how the run ended
    _wait_for(flows)
    below = {process for each in running for process in _children(each.running.pid, True)}
    for each in running:
        each.stop()
    _wait_for(below)  # a run that began meanwhile: its guard ends what it started


def _children(pid: int, recursive: bool = False) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive))
    except psutil.NoSuchProcess:
        return set()


def _wait_for(processes: Iterable[psutil.Process]) -> None:
    """Wait until they are gone, and kill those that are not at the end of ENDING."""
    _, alive = psutil.wait_procs(list(processes), ENDING)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def serve(port: int, stop: threading.Event) -> None:
    """Start everything, say when it is ready, keep it running until `stop`, end all of it.

    Raises UserError where the port is taken, the server does not start or prefect.yaml is wrong.
    """
    check(port)
    shared, started = environment(port), time.monotonic()
    server = Server(shared["PREFECT_API_URL"])
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST]
    kept = [Process("server", [*command, "--port", str(port)], shared)]
    kept[0].start()
    try:
        _wait("The Prefect server", lambda: server.ask("health") is True, kept[0], stop)
        for pool, starting in workers(shared).items():
            # One pool after the other: SQLite may refuse two that are made in the same moment.
            for worker in starting:
                worker.start()
            kept += starting
            path = f"work_pools/{pool}"
            there = partial(lambda path: server.ask(path) is not None, path)
            _wait(f"The worker of the pool {pool}", there, starting[0], stop)
        if not stop.is_set():
            deploy(shared, server)
            print(
                f"Ready after {time.monotonic() - started:.0f} s: http://{HOST}:{port} shows runs "
                f"and deployments. Start a run there, or in another terminal:\n"
                f"  export PREFECT_API_URL={shared['PREFECT_API_URL']}\n"
                f"  .venv/bin/prefect deployment run pipeline/full\n"
                f"Ctrl-C stops all of it; runs end with what they have, the next go on from there.",
                flush=True,
            )
        _keep(kept, server, stop)
    finally:
        print("Stopping the runs, the workers and the server", flush=True)
        begun = runs()
        stop_workers(kept[1:])
        for run in begun:
            server.end(run, "CRASHED", GONE)
        kept[0].stop()


def _keep(kept: Sequence[Process], server: Server, stop: threading.Event) -> None:
    """Start again what ended by itself, and tell the server of runs whose process is gone."""
    looked = 0.0
    while not stop.wait(1):
        for process in kept:
            code = process.running.poll()
            if code is not None:
                print(f"{process.name} ended (exit code {code}): starting it again", flush=True)
                process.stop()  # its guard alone may have been killed, and it have the port still
                stop.wait(REST)
                process.start()
        if time.monotonic() - looked > EVERY:
            looked = time.monotonic()
            give_up(server)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal; what the user can mend is one sentence and exit code 2."""
    parser = argparse.ArgumentParser("python -m flows.serve", description=__doc__)
    parser.add_argument("--port", type=int, default=4200, help=f"of the server on {HOST}")
    options = parser.parse_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.set())
    try:
        serve(options.port, stop)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        return say("serve", sentence)
    return 0


if __name__ == "__main__":
    sys.exit(main())
