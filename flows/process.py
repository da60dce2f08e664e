"""Commands of a flow, each in a process group of its own that ends with the flow."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path

import psutil
from prefect import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from components.errors import without_password
from flows.command import StageFailed
from flows.guard import PATIENCE, guarded

AGAIN = 5  # seconds until a stage that another process runs is tried again
# Commands that run now: a flow whose tasks are threads must end them itself, see `stop_all`.
_running: set[subprocess.Popen[str]] = set()
_stopping = threading.Event()


def _environment() -> dict[str, str]:
    tools = str(Path(sys.executable).parent)
    extra = {"PYTHONUNBUFFERED": "1", "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    identifier = flow_run.get_id()
    if identifier:
        extra["DJEPA_FLOW_RUN"] = identifier
    # The built-in server has no pages once the run has ended.
    if identifier and PREFECT_API_URL.value():
        # A tag of the runs in MLflow, which everybody there reads.
        extra["DJEPA_FLOW_LINK"] = without_password(str(flow_run.get_flow_run_ui_url()))
    return os.environ | extra


def _stop(process: subprocess.Popen[str]) -> None:
    """End the whole group: a signal to dvc alone would leave the trainer running."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            # dvc ends at once; the stage below it still has a run to close.
            for _ in range(PATIENCE * 10):
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            return


def stop_all() -> None:
    """End every command that `run` has running, with all that it started, and start no other."""
    _stopping.set()
    for process in list(_running):
        _stop(process)


def run(
    name: str,
    command: list[str],
    extra: Mapping[str, str] | None = None,
    heard: Callable[[str], None] | None = None,
) -> None:
    """Run a command in its own process group, each line of output to the run's log.

    Args:
        name: what the log and a failure call it.
        command: program and arguments.
        extra: set in its environment.
        heard: told each line.

    Raises:
        StageFailed: the command's exit code was not 0, or the flow is being stopped.
    """
    log = get_run_logger()
    last, code = "no output", None
    process = subprocess.Popen(
        guarded(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environment() | dict(extra or {}),
        start_new_session=True,
    )
    _running.add(process)
    assert process.stdout is not None
    try:
        # Only now: one that `stop_all` did not find among those that run would go on for hours.
        if _stopping.is_set():
            raise StageFailed(name, -signal.SIGTERM, "the flow is being stopped")
        for line in process.stdout:
            line = line.rstrip()
            if line:
                log.info(line)
                if heard:
                    heard(line)
            if line.startswith("djepa: "):
                last = line.removeprefix("djepa: ")
            exited = re.search(r"exited with (-?\d+)", line)
            if exited:
                code = int(exited[1])
        if process.wait():
            raise StageFailed(name, process.returncode if code is None else code, last)
    finally:
        # Reached with the process alive only on cancellation, a timeout or an error here.
        _stop(process)
        _running.discard(process)


def wait_for_other(sentence: str) -> None:
    """Wait until the process that a busy stage's sentence names is over, and the DVC that runs it.

    DVC takes the result into its cache only after the stage has ended: who began in between would
    do the same work again. Returns at once where no process of this machine is named.
    """
    named = re.search(r"process (\d+) in ", sentence)
    if named is None:
        return
    with suppress(psutil.Error):
        stage = psutil.Process(int(named[1]))
        above = (each for each in stage.parents() if "dvc" in " ".join(each.cmdline()))
        psutil.wait_procs([stage, *islice(above, 1)])
