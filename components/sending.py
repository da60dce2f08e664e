"""Brings queued runs into MLflow: `python -m components.sending QUEUE`, started by the stages.

One process a queue, while runs are written and a little longer. A store that is away is tried
again; what is not sent when everything else is over stays queued for the next stage. A run whose
writer died without a word is KILLED.
"""

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from components.errors import first_line, without_password
from components.files import atomic_file, read_json, write_json
from components.registry import register
from components.runs import MlflowTracker, client, experiment, newest, with_group
from components.tracking import (
    LINES,
    LOCK,
    PROBLEM,
    amend,
    flatten,
    is_over,
    noted,
    place,
    store,
    waiting,
)

EVERY = 0.5  # seconds between two looks at the queue
LINGER = 5.0  # seconds without a run after which the process ends
PATIENCE = 60.0  # seconds that a store is tried after the last stage ended
SAMPLE = 10.0  # seconds between two samples of the machine
STATE = "sent.json"  # in a run's folder: its id in MLflow and how far it was read
# MLflow's words for a record that will never be taken; all else is tried again.
REFUSED = (
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
)


def _is_away(error: Exception) -> bool:
    """Whether the store, or the disk, would fail for the next run too."""
    code = getattr(error, "error_code", None)  # of MLflow's own errors
    return isinstance(error, OSError | ImportError) or code not in (None, *REFUSED)


class Delivery:
    """One run of the queue on its way; it goes on where a killed process left it."""

    def __init__(self, mlflow: Any, folder: Path) -> None:
        self.mlflow, self.folder = mlflow, folder
        state = read_json(folder / STATE) if (folder / STATE).exists() else {"bytes": 0}
        self.state: dict[str, Any] = state
        with (folder / LINES).open() as file:
            self.first = json.loads(file.readline())

    @property
    def tracker(self) -> MlflowTracker:
        """The run in MLflow."""
        return MlflowTracker(self.mlflow, self.state["run"])

    def send(self) -> bool:
        """Send what was written since; whether the run is over and all of it is sent."""
        over = is_over(self.folder)  # before reading: a line written later is read the next time
        if "run" not in self.state:
            self._open()
        with (self.folder / LINES).open("rb") as file:
            file.seek(self.state["bytes"])
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        for kind, some in groupby(self._records(whole), lambda record: record["kind"]):
            self._take(kind, list(some))
        if whole:
            self._keep(bytes=self.state["bytes"] + len(whole))
        if not over:
            return False
        if not self.state.get("ended"):
            last = (self.folder / LINES).stat().st_mtime
            self._take("end", [{"value": "KILLED", "time": int(last * 1000)}])
        return True

    def sample(self, figures: Mapping[str, float]) -> None:
        """Log what the machine is at: `system/…`, as MLflow's own monitor names it."""
        seconds = int(time.time() - self.first["time"] / 1000)
        self.tracker.log_metrics(
            {f"system/{name}": value for name, value in figures.items()}, step=seconds
        )

    def _records(self, text: bytes) -> Iterator[Mapping[str, Any]]:
        for line in text.splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:  # cut off by a full disk
                print(f"{self.folder.name}: unreadable: {line[:80]!r}", flush=True)

    def _keep(self, **values: Any) -> None:
        self.state |= values
        write_json(self.folder / STATE, self.state)

    def _open(self) -> None:
        """Find or make the run, and its parent."""
        run = self.first["value"]
        parent = run["parent"] or self._parent(run)
        mark = {"queued.as": self.folder.name}
        found = newest(self.mlflow, run["family"], mark)
        if found is None:
            tags = with_group(self.mlflow, run["family"], run["tags"])
            tags |= {**mark, "mlflow.parentRunId": parent}
            found = self.mlflow.create_run(
                experiment(self.mlflow, run["family"]),
                start_time=self.first["time"],
                tags=tags,
                run_name=run["name"],
            ).info.run_id
        self.mlflow.update_run(parent, status="RUNNING")
        self._keep(run=found, parent=parent)

    def _parent(self, run: Mapping[str, Any]) -> str:
        pipeline = run["pipeline"]
        key = {"pipeline": pipeline["tags"]["pipeline"]}
        found = newest(self.mlflow, run["family"], key)
        if found is None:
            found = self.mlflow.create_run(
                experiment(self.mlflow, run["family"]),
                start_time=self.first["time"],
                tags=with_group(self.mlflow, run["family"], pipeline["tags"]),
                run_name=pipeline["name"],
            ).info.run_id
        # Also of one that is found: who made it may have been killed before it sent them.
        sent, params = self.mlflow.get_run(found).data.params, flatten(pipeline["params"])
        lacking = {name: value for name, value in params.items() if name not in sent}
        MlflowTracker(self.mlflow, found).log_params(lacking)
        return found

    def _take(self, kind: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Send records of one kind; those that MLflow will never take are said and left out."""
        from mlflow.exceptions import MlflowException

        try:
            if kind == "metrics":
                self.tracker.log_points(records)
                return
            for record in records:
                self._one(kind, record["value"], record["time"])
        except MlflowException as error:
            if error.error_code not in REFUSED:
                raise
            if len(records) == 1:
                print(f"{self.folder.name}: {kind} refused: {first_line(error)}", flush=True)
                return
            for record in records:
                self._take(kind, [record])

    def _one(self, kind: str, value: Any, then: int) -> None:
        if kind == "params":
            self.tracker.log_params(value)
        elif kind == "tags":
            self.tracker.set_tags(value)
        elif kind == "artifact":
            self.tracker.log_artifact(self.folder / value["path"], value["folder"])
        elif kind == "made":
            amend(value["digest"], value["note"], self.state["run"])
        elif kind == "outcome":
            self._outcome(value)
        elif kind == "end":
            self._end(value, then)

    def _end(self, status: str, then: int) -> None:
        self.tracker.end(status, then)
        MlflowTracker(self.mlflow, self.state["parent"]).end(status, then)
        self._keep(ended=True)

    def _outcome(self, outcome: Mapping[str, Any]) -> None:
        """The parent's figures and children, and new versions in the registry."""
        runs = {}
        for name, digest in outcome["digests"].items():
            note = noted(digest)
            if note and note["run"]:
                runs[name] = (note["stage"], note["run"])
        parent = MlflowTracker(self.mlflow, self.state["parent"])
        parent.log_metrics(outcome["figures"])
        for images, figures in outcome["curve"]:
            parent.log_metrics(figures, step=images)
        parent.set_tags({f"child.{s.replace('@', '-')}": run for s, run in runs.values()})
        commit = self.first["value"]["tags"]["git.commit"]
        register(
            self.mlflow,
            outcome["versions"],
            lambda name: runs[name][1] if name in runs else None,
            {"git.commit": commit},
        )


class Sender:
    """Sends a queue until nothing is left to send."""

    def __init__(self, queue: Path) -> None:
        self.queue = queue
        self.deliveries: dict[str, Delivery] = {}
        self.mlflow: Any = None
        self.machine: Any = None
        self.sampled = time.monotonic()

    def run(self) -> None:
        """Send until the queue has been empty for LINGER, or the store away for PATIENCE."""
        alive = time.monotonic()
        while True:
            runs = waiting(self.queue)
            trouble = self.look(runs)
            live = [run for run in runs if not is_over(run)]
            now = time.monotonic()
            alive = now if live or (runs and not trouble) else alive
            if now - alive > (PATIENCE if runs else LINGER):
                return
            time.sleep(EVERY if not trouble else 10 * EVERY)

    def look(self, runs: Sequence[Path]) -> str | None:
        """One look at all runs; what went wrong, if something did.

        A run that MLflow refuses keeps no other waiting; a store that is away is not asked again.
        """
        trouble, figures, began = None, None, time.time()
        try:
            if runs:
                self.mlflow = self.mlflow or client()
                figures = self._machine()
            for folder in runs:
                try:
                    self._deliver(folder, figures)
                except Exception as error:
                    if _is_away(error):
                        raise
                    trouble = self._said(error, f"the run {folder.name}")
        except Exception as error:
            trouble = self._said(error, "the runs")
        problem = self.queue / PROBLEM
        if trouble is None:
            problem.unlink(missing_ok=True)
        else:
            with atomic_file(problem) as temporary:
                temporary.write_text(trouble)
                # Who waits for a run takes no word that is older than it (tracking.wait_sent).
                os.utime(temporary, (began, began))
        return trouble

    def _deliver(self, folder: Path, figures: Mapping[str, float] | None) -> None:
        """Send what one run has written since; all that was sent of one that is over goes."""
        delivery = self.deliveries.get(folder.name) or Delivery(self.mlflow, folder)
        self.deliveries[folder.name] = delivery
        over = delivery.send()
        if figures and not over:
            delivery.sample(figures)
        if over:
            del self.deliveries[folder.name]
            done = folder.with_name(f".done-{folder.name}")
            folder.rename(done)
            shutil.rmtree(done)

    def _said(self, error: Exception, what: str) -> str:
        """Log it; the sentence for the stages. Nothing is lost: the lines stay queued."""
        kind = type(error).__name__
        print(without_password(f"{what}: {kind}: {error}"), flush=True)
        return (
            f"MLflow at {place()} does not take {what} ({kind}: {first_line(error)}): what is not "
            f"sent waits in {self.queue} and is sent by the next stage, or by `djepa ui` or "
            f"`djepa compare`, when it does; a run's folder that is removed there is given up."
        )

    def _machine(self) -> dict[str, float] | None:
        """Use of processors, memory, disk, network and GPUs since the last sample, every SAMPLE."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if self.machine is None:
            # Its parts are used, not its thread, which gives up when the store is away once.
            self.machine = SystemMetricsMonitor("", tracking_uri=store())
        if time.monotonic() - self.sampled < SAMPLE:
            return None
        self.sampled = time.monotonic()
        self.machine.collect_metrics()
        figures = self.machine.aggregate_metrics()
        for monitor in self.machine.monitors:
            monitor.clear_metrics()
        return figures


def main(queue: Path) -> None:
    """Send the queue, unless another process is at it."""
    while True:
        with (queue / LOCK).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            for left in queue.glob(".done-*"):
                shutil.rmtree(left)
            Sender(queue).run()
        # A stage that started meanwhile found the lock held.
        rest = waiting(queue)
        if not rest or ((queue / PROBLEM).exists() and all(is_over(run) for run in rest)):
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
