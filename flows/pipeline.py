"""The whole pipeline as one Prefect flow: `python -m flows.pipeline`.

Each task is one stage of dvc.yaml, run by `dvc repro`: Prefect runs it, DVC decides whether it
must run and keeps its result.
"""

import base64
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.errors import BUSY, Busy, UserError, needed

with needed("pipeline", __name__):
    from prefect import flow, get_run_logger, task
    from prefect.artifacts import (
        create_image_artifact,
        create_markdown_artifact,
        create_table_artifact,
    )
    from prefect.cache_policies import NO_CACHE
    from prefect.client.schemas.objects import TaskRun
    from prefect.states import State

    from components.branch import check_branch, commit
    from components.compose import PARAMS, ROUNDS, SELECTED, compose, load
    from components.files import read_yaml
    from components.home import checkout
    from components.lockfile import check_lock, not_taken
    from components.processes import only_one
    from components.rawdata import RECORD
    from components.remote import push, remote_name
    from components.stages import LABELS, missing_labels, snapshots
    from flows.command import StageFailed, command
    from flows.process import AGAIN, run, wait_for_other

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
def stage(name: str, work: bool = True) -> None:
    """Bring one stage of dvc.yaml up to date; without work for it, that is all there is to say."""
    log = get_run_logger()
    if not work:
        log.info("%s is up to date", name)
        return
    params = read_yaml(PARAMS)
    # The stage itself lets no other do the same at once, but DVC takes the result into its cache
    # only after that: who began in between would do all of it again.
    lock = snapshots(name, params).with_suffix(".dvc")
    told = float("-inf")
    while True:
        try:
            with only_one(lock, f"The stage {name}"):
                _repro(name)
            return
        except Busy as busy:
            reason = str(busy)
        except StageFailed as failure:
            if failure.code != BUSY:
                raise
            reason = str(failure)
            wait_for_other(reason)
        if time.monotonic() - told > 60:
            told = time.monotonic()
            log.info("waiting: %s", reason)
        time.sleep(AGAIN)


def _repro(name: str) -> None:
    words = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
    said: list[str] = []
    try:
        run(name, words, heard=said.append)
    except StageFailed as failure:
        sentence = not_taken(name, said)
        if sentence is None:
            raise
        raise StageFailed(name, failure.code, sentence) from failure


def _push(names: Sequence[str]) -> None:
    """Send results to DVC's remote if there is one; a remote that is away stops no run."""
    if names and remote_name() is not None:
        try:
            push(names)
        except UserError as problem:
            get_run_logger().warning("%s", problem)


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


def plan() -> dict[str, bool]:
    """The stages of dvc.yaml, each after those it depends on, and whether there is work for it.

    There is where DVC finds it changed, and so it may be for all that come after such a one.
    """
    from dvc.lock import LockError
    from dvc.repo import Repo
    from networkx import dfs_postorder_nodes

    with Repo() as repo:
        graph = repo.index.graph
        try:
            changed = set(repo.status())
        except LockError:  # somebody's `dvc repro`: each stage's own command waits for it
            changed = {node.addressing for node in graph}
        work: dict[Any, bool] = {}
        for node in dfs_postorder_nodes(graph):  # an edge goes to what a stage needs
            needs = (work[each] for each in graph.successors(node))
            work[node] = node.addressing in changed or any(needs)
    return {node.name: work[node] for node in work if getattr(node, "name", None)}


@flow(name="pipeline", log_prints=True)
def pipeline(
    overrides: Sequence[str] = (),
    stages: Sequence[str] = (),
    branch: str = "",
) -> None:
    """Bring the whole pipeline up to date, stage by stage; what is up to date is not run again.

    Before the critic of a round with people's labels the run pauses until they are given.

    Args:
        overrides: NAME=VALUE of parameters as `djepa compose` takes them, for example scale=small
            or seed=1; they become the whole choice. With none, the committed choice stands.
        stages: names from dvc.yaml to run, in this order; with none, all of them.
        branch: a git branch that gets a commit of parameters and dvc.lock at the end; made where
            it is missing. When empty, nothing is committed.
    """
    check_lock()
    if branch:
        check_branch(branch)
    if overrides:
        compose(overrides=overrides)
    data()
    work = plan()
    unknown = [name for name in stages if name not in work]
    if unknown:
        raise UserError(
            f"dvc.yaml has no stage {', '.join(unknown)}: it has {', '.join(work)}; name some of "
            f"them in `stages`, or leave it out for all."
        )
    names = list(stages or work)
    log = get_run_logger()
    _push([name for name in names if not work[name]])
    for number, name in enumerate(names, 1):
        log.info("stage %d of %d: %s", number, len(names), name)
        if work[name] and name.startswith("critic@"):
            _ask(name.partition("@")[2])
        stage(name, work[name])
        show(name)
        if work[name]:
            _push([name])
    if branch:
        made = commit_results(branch, f"Results of {' '.join(overrides) or 'the pipeline'}")
        log.info("Commit %s on the branch %s has parameters and dvc.lock", made[:10], branch)


def commit_results(branch: str, message: str) -> str:
    """Commit parameters, labels and dvc.lock on a branch; returns the commit."""
    paths = [ROUNDS, SELECTED, PARAMS, Path("dvc.lock"), RECORD, *LABELS.glob("*.jsonl")]
    return commit(branch, paths, message)


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
