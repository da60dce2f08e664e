"""One group and seed of the ablation as an experiment of DVC in a copy of its own."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from prefect import get_run_logger

from components.errors import BUSY, UserError
from components.evaluation.ablation import COMPARED, GROUPS, Result
from components.registry import raw_hash
from components.runs_view import group_tags
from flows.command import StageFailed
from flows.process import AGAIN, run, wait_for_other

# DVC puts an experiment aside in the workspace, then takes what was put aside last: two that start
# in the same seconds could take each other's.
_starting = threading.Lock()
_reading = threading.Lock()


@dataclass(frozen=True)
class Experiment:
    """One group with one seed.

    family: the experiment in MLflow. name: of the experiment in DVC, the same exactly where code,
    parameters and data are the same.
    settings: overrides of the parameter tree. threads: of each of its processes.
    """

    family: str
    group: str
    seed: int
    name: str
    settings: tuple[str, ...]
    threads: int

    @property
    def targets(self) -> list[str]:
        """The stages of dvc.yaml that give the group's figures."""
        group = GROUPS[self.group]
        compared = [f"compare@{group.model}"] if self.group in COMPARED else []
        return [group.evaluation, *compared]

    def read(self, file: str) -> str:
        """The text of one of the finished experiment's files under metrics/."""
        with _reading:
            return _read(self.name, file)

    def result(self) -> Result:
        """Its figures."""
        model = GROUPS[self.group].model
        files = [f"evaluate/{model}", f"train/{model}"]
        files += [f"compare/{model}"] if self.group in COMPARED else []
        return Result.of(self.group, self.seed, *(json.loads(self.read(file)) for file in files))

    def tasks(self) -> dict[str, float]:
        """Its scores by task with their chance floors, by the names that all runs share."""
        scores = json.loads(self.read(f"evaluate/{GROUPS[self.group].model}"))["geneval"]
        return {
            f"geneval.{kind}.{task}": value
            for kind in ("tasks", "chance_tasks")
            for task, value in scores[kind].items()
        }

    def about(self, params: Mapping[str, Any]) -> dict[str, str]:
        """The tags of its run in MLflow that say what it is."""
        group = GROUPS[self.group]
        commit, data = git("rev-parse", "HEAD"), raw_hash()
        goes_on = f", goes on from {group.follows}" if group.follows else ""
        return {
            "scale": params["scale"],
            "git.commit": commit,
            "data.hash": data,
            **group_tags(params, commit, data),
            "dvc.experiment": self.name,
            "mlflow.note.content": (
                f"Group {self.group} of the paper's Table 4{goes_on}. Feedback: {group.feedback}. "
                f"Its scores are those of `models/{group.model}`, which has seen {group.phases} N "
                f"images. `dvc exp apply {self.name}` brings its files into the workspace."
            ),
        }

    def run(self, name: str, targets: Sequence[str], parent: str) -> None:
        """Run it up to these stages as the experiment `name`; its runs join `parent`.

        Raises:
            StageFailed: a stage failed, or was ended.
        """
        chosen = [part for setting in self.settings for part in ("-S", setting)]
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "exp", "run", "--temp"]
        command += ["-n", name, *chosen, *targets]
        # PyTorch's threads wait for one another where others hold the cores: on two cores two
        # processes of two threads trained a tenth as fast as two of one thread.
        extra = {"DJEPA_PARENT_RUN": parent, "OMP_NUM_THREADS": str(self.threads)}
        while True:
            try:
                with _copy_of(name), _start() as heard:
                    run(name, command, extra, heard)
                return
            except StageFailed as failure:
                if failure.code != BUSY:
                    raise
                get_run_logger().info("waiting: %s", failure)
                wait_for_other(str(failure))
                time.sleep(AGAIN)


@cache
def _read(name: str, file: str) -> str:
    import dvc.api

    return dvc.api.read(f"metrics/{file}.json", rev=commit_of(name))


def commit_of(name: str) -> str | None:
    """The commit of a finished experiment, or None."""
    return git("for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{name}") or None


@contextmanager
def _start() -> Iterator[Callable[[str], None]]:
    """Hold the lock until the function that is yielded hears that DVC has made its copy."""
    _starting.acquire()
    held = True

    def heard(line: str) -> None:
        nonlocal held
        if held and line.startswith("Reproducing experiment"):
            held = False
            _starting.release()

    try:
        yield heard
    finally:
        if held:
            _starting.release()


@contextmanager
def _copy_of(name: str) -> Iterator[None]:
    """Remove the copy that an experiment leaves when it is killed: it can be large."""
    try:
        yield
    finally:
        for note in Path(".dvc/tmp/exps/run").glob("*/*.run"):
            # Another experiment's may go, or be half written, in this moment.
            with suppress(FileNotFoundError, json.JSONDecodeError):
                told = json.loads(note.read_text())
                if told.get("name") == name:
                    shutil.rmtree(told["root_dir"], ignore_errors=True)


def git(*arguments: str) -> str:
    """What git prints, stripped; a UserError where it fails."""
    answer = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if answer.returncode:
        raise UserError(
            f"`git {' '.join(arguments)}` failed ({answer.stderr.strip()}): an ablation needs a "
            "git checkout with a commit; run it in the top folder of one."
        )
    return answer.stdout.strip()
