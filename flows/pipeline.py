"""The whole pipeline as one Prefect flow: `python -m flows.pipeline`.

Each task is one stage of dvc.yaml, run by `dvc repro` in a process group of its own: Prefect
runs it, DVC decides whether it must run and keeps its result.
"""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from components.compose import load
from components.errors import explain, say
from components.home import checkout
from components.lockfile import check_lock, not_taken
from components.stages import missing_labels
from flows.command import StageFailed, command

try:
    from prefect import flow, get_run_logger, task
    from prefect.artifacts import (
        create_image_artifact,
        create_markdown_artifact,
        create_table_artifact,
    )
    from prefect.cache_policies import NO_CACHE
    from prefect.client.schemas.objects import TaskRun
    from prefect.runtime import flow_run
    from prefect.states import State
except ModuleNotFoundError as missing:
    sentence = explain(missing)
    if __name__ != "__main__" or sentence is None:
        raise
    sys.exit(say("pipeline", sentence))

# What Prefect shows of a stage: file, key of the artifact, description.
SHOWN = {
    "curate": [("curated/report.md", "curation", "What was kept and rejected")],
    "report": [
        ("reports/run/report.md", "report", "Scores by model"),
        ("reports/run/tables.md", "tables", "The paper's tables with this run's rows"),
        ("reports/run/tables.json", "", ""),  # each table in it has a key and words of its own
        ("plots/scores.png", "scores", "Scores by task, with the chance floor"),
    ],
}
PATIENCE = 20  # seconds a stage gets to write its snapshot before it is killed


# Commands that run now: a flow whose tasks are threads must end them itself, see `stop_all`.
_running: set[subprocess.Popen[str]] = set()
_stopping = threading.Event()


def _environment() -> dict[str, str]:
    tools = str(Path(sys.executable).parent)
    extra = {"PYTHONUNBUFFERED": "1", "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    identifier = flow_run.get_id()
    if identifier:
        extra["DJEPA_FLOW_RUN"] = identifier
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
    if _stopping.is_set():
        raise StageFailed(name, -signal.SIGTERM, "the flow is being stopped")
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environment() | dict(extra or {}),
        start_new_session=True,
    )
    _running.add(process)
    assert process.stdout is not None
    try:
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


def _can_help(task: Any, task_run: TaskRun, state: State) -> bool:
    """A retry helps where the process was killed; a refused input (code 2) stays refused."""
    failure = state.result(raise_on_failure=False)
    return isinstance(failure, StageFailed) and (failure.code < 0 or failure.code >= 128)


@task(cache_policy=NO_CACHE, task_run_name="data")
def data() -> None:
    """Draw the raw pictures, or find them there, checked against data.dvc."""
    run("data", [sys.executable, "-m", "components.cli", "data"])


@task(
    cache_policy=NO_CACHE,
    task_run_name="{name}",
    retries=1,
    retry_delay_seconds=2,
    retry_condition_fn=_can_help,
)
def stage(name: str) -> None:
    """Bring one stage of dvc.yaml up to date."""
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
    said: list[str] = []
    try:
        run(name, command, heard=said.append)
    except StageFailed as failure:
        sentence = not_taken(name, said)
        if sentence is None:
            raise
        raise StageFailed(name, failure.code, sentence) from failure


def _ask(round_name: str) -> None:
    """Wait for people's labels if the round's critic needs some that are not there."""
    params = load()
    file = missing_labels(round_name, params)
    if file is not None:
        from flows.people import wait_for_labels  # imports pandas: a fifth of the flow's start

        wait_for_labels(round_name, file, params["feedback"]["people"])


def show(name: str) -> None:
    """Publish what a stage wrote for people as artifacts of the flow run.

    A table's rows are an artifact each, `table-2` and so on; a picture is put in whole, since the
    server cannot read this machine's files.
    """
    for file, key, words in SHOWN.get(name, []):
        path = Path(file)
        if path.suffix == ".png" and not path.is_file():  # nothing was scored
            continue
        if path.suffix == ".png":
            data = base64.b64encode(path.read_bytes()).decode()
            create_image_artifact(f"data:image/png;base64,{data}", key=key, description=words)
        elif path.suffix == ".json":
            for table in json.loads(path.read_text()):
                said = "\n\n".join([table["title"], *table["notes"]])
                create_table_artifact(table["rows"], key=table["key"], description=said)
        else:
            create_markdown_artifact(path.read_text(), key=key, description=words)


def stage_names() -> list[str]:
    """The stages of dvc.yaml, each after those it depends on."""
    from dvc.repo import Repo
    from networkx import dfs_postorder_nodes

    with Repo() as repo:
        ordered = list(dfs_postorder_nodes(repo.index.graph))
    return [node.name for node in ordered if getattr(node, "name", None)]


@flow(name="pipeline", log_prints=True)
def pipeline(stages: list[str] | None = None) -> None:
    """Bring the whole pipeline up to date, stage by stage.

    Before the critic of a round with people's labels the run pauses until they are given.

    Args:
        stages: names from dvc.yaml to run, in order; all of them when left out.
    """
    check_lock()
    data()
    names = stages or stage_names()
    log = get_run_logger()
    for number, name in enumerate(names, 1):
        log.info("stage %d of %d: %s", number, len(names), name)
        if name.startswith("critic@"):
            _ask(name.partition("@")[2])
        stage(name)
        show(name)


def main() -> int:
    """Run the flow; a stage's failure is one sentence and exit code 1, a refusal exit code 2."""

    def body() -> None:
        # What every stage needs is looked at before Prefect's server is started.
        checkout()
        load()
        check_lock()
        pipeline()

    kept = "Finished stages are kept; mend it and run the same command."
    return command("pipeline", body, kept)


if __name__ == "__main__":
    sys.exit(main())
