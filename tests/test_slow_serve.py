"""`make serve` for real: one server and its workers, runs that are cancelled, killed and resumed.

The tests share the server and go on from one another's state, in this order.
"""

import json
import os
import signal
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import Answer, Checkout
from tests.test_graph import copy, runs
from tests.test_slow_flow import free_port, processes_in, snapshots, started, wait_for

pytestmark = pytest.mark.slow

# Long enough to be stopped in the middle.
CHOICE = ("scale=micro", "seed=1", "training.phase1.images=2000")
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
DVC = (sys.executable, "-m", "dvc")


@dataclass
class Served:
    """A checkout with `python -m flows.serve` running in it, and that process."""

    checkout: Checkout
    api: str
    process: Any

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.api}/{path}", data, kind)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def prefect(self, *arguments: str) -> Answer:
        command = (sys.executable, "-m", "prefect", "--no-prompt", *arguments)
        return self.checkout.call(*command, PREFECT_API_URL=self.api)

    def start(self, deployment: str, **parameters: Any) -> str:
        """Ask for a run; returns its id."""
        found = self.ask(f"deployments/name/{deployment}")
        path = f"deployments/{found['id']}/create_flow_run"
        return self.ask(path, {"parameters": parameters})["id"]

    def state(self, run: str) -> str:
        return self.ask(f"flow_runs/{run}")["state_type"]

    def said(self, run: str) -> str:
        """The run's log, and what it ended with."""
        asked = {"logs": {"flow_run_id": {"any_": [run]}}}
        lines = [line["message"] for line in self.ask("logs/filter", asked)]
        return "\n".join([*lines, str(self.ask(f"flow_runs/{run}")["state"]["message"])])

    def ends(self, run: str, seconds: float = 120) -> str:
        wait_for("the run's end", lambda: self.state(run) in ENDED, seconds)
        return self.state(run)

    def worktree(self, run: str) -> Path:
        (found,) = (self.checkout.root / ".djepa/worktrees").glob(f"*-{run}")
        return found

    @property
    def log(self) -> str:
        return (self.checkout.root / "started.log").read_text()


@pytest.fixture(scope="module")
def served(micro: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    checkout = copy(micro, tmp_path_factory.mktemp("served") / "checkout")
    checkout.djepa("compose", *CHOICE)
    checkout.ok("git", "add", "-A")
    checkout.ok("git", "commit", "-qm", "what scheduled runs are to do")
    port = free_port()
    command = (sys.executable, "-m", "flows.serve", "--port", str(port))
    # Its own address of a server, not ours: the environment of a test has none.
    with started(checkout, *command) as process:
        made = Served(checkout, f"http://127.0.0.1:{port}/api", process)
        wait_for("readiness", lambda: "\nReady after" in made.log or process.poll() is not None)
        assert process.poll() is None, made.log
        yield made
        for process in processes_in(checkout.root):
            process.kill()


def test_six_deployments_say_what_they_do_and_take(served: Served) -> None:
    found = {entry["name"]: entry for entry in served.ask("deployments/filter", {})}
    head = served.checkout.ok("git", "rev-parse", "HEAD").strip()
    assert len(found) == 6
    for name, entry in found.items():
        assert entry["description"] and entry["tags"] and entry["version"] == head, name
        assert entry["enforce_parameter_schema"]
        assert entry["global_concurrency_limit"]["limit"] == 1
        assert entry["concurrency_options"]["collision_strategy"] == "ENQUEUE"
        parameters = entry["parameter_openapi_schema"]["properties"]
        assert parameters and all(each["description"] for each in parameters.values()), name
    cron = {name for name, entry in found.items() if entry["schedules"]}
    identifiers = {found[name]["id"] for name in cron}

    def scheduled() -> bool:
        """Newer SQLAlchemy silently stops this while everything else works."""
        waiting = served.ask(
            "flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
        )
        return {each["deployment_id"] for each in waiting} == identifiers

    assert cron == {"nightly", "weekly", "tidy"}
    wait_for("scheduled runs", scheduled, 90)


def test_memory_and_time_until_it_is_ready(served: Served) -> None:
    processes = [psutil.Process(served.process.pid)]
    processes += processes[0].children(recursive=True)
    names = [" ".join(process.cmdline()) for process in processes]
    own = [
        p
        for p, name in zip(processes, names, strict=True)
        if "--pool gpu" in name or "server" in name
    ]
    assert sum(process.memory_full_info().pss for process in own) < 500e6
    assert int(served.log.split("Ready after ")[1].split()[0]) <= 40


def test_parameters_that_do_not_exist_are_refused(served: Served) -> None:
    refused = served.prefect("deployment", "run", "pipeline/full", "--param", "nonsense=1")
    assert refused.returncode != 0 and "nonsense" in refused.stdout + refused.stderr
    run = served.start("pipeline/full", overrides=["scale=micro", "nonsense=1"])
    assert served.ends(run) == "FAILED"
    assert "nonsense" in served.said(run) and "Traceback" not in served.said(run)


def test_cancelled_and_killed_runs_resume_to_the_weights_of_an_undisturbed_one(
    served: Served, tmp_path: Path
) -> None:
    checkout = served.checkout
    whole = copy(checkout, tmp_path / "whole")
    home = {"stages": ["phase1"]}

    first = served.start("pipeline/full", **home)
    wait_for("a snapshot", lambda: bool(snapshots(checkout)))
    place = served.worktree(first)
    assert served.prefect("flow-run", "cancel", first).returncode == 0
    assert served.ends(first) == "CANCELLED"
    wait_for("the trainer's end", lambda: not processes_in(place), 30)
    kept = snapshots(checkout)
    assert kept, "what was trained so far is kept"

    second = served.start("pipeline/full", **home)
    wait_for("more training", lambda: bool(snapshots(checkout)) and snapshots(checkout) != kept)
    (worker,) = (
        p
        for p in processes_in(checkout.root)
        if p.cmdline()[3:5] == ["worker", "start"] and "gpu" in p.cmdline()
    )
    worker.kill()
    place = served.worktree(second)
    assert served.ends(second) == "CRASHED"
    wait_for("the trainer's end", lambda: not processes_in(place), 60)
    kept = snapshots(checkout)
    assert kept

    third = served.start("pipeline/full", **home)
    wait_for("more training", lambda: bool(snapshots(checkout)) and snapshots(checkout) != kept)
    (flow,) = (p for p in processes_in(served.worktree(third)) if "prefect.engine" in p.cmdline())
    flow.kill()
    assert served.ends(third) == "CRASHED"
    wait_for("the trainer's end", lambda: not processes_in(served.worktree(third)), 60)

    fourth = served.start("pipeline/full", **home)
    assert served.ends(fourth) == "COMPLETED", served.said(fourth)
    assert not snapshots(checkout)
    phase1 = (*DVC, "repro", "--single-item", "phase1")
    whole.ok(*phase1)
    answer = checkout.ok(*phase1)
    assert "is cached" in answer and "Running stage" not in answer, "DVC finds what the flow ran"
    locks = [
        yaml.safe_load((each.root / "dvc.lock").read_text())["stages"]["phase1"]["outs"]
        for each in (checkout, whole)
    ]
    models = [next(out["md5"] for out in outs if out["path"] == "models/phase1") for outs in locks]
    assert models[0] == models[1]
    # frame = runs(checkout)


def test_a_whole_run_completes_in_its_own_worktree_and_commits(served: Served) -> None:
    checkout = served.checkout
    (checkout.root / "params.yaml").write_text("an edit in the middle")
    run = served.start("pipeline/full", overrides=["scale=micro"], branch="results")
    assert served.ends(run) == "COMPLETED", served.said(run)
    asked = {"artifacts": {"flow_run_id": {"any_": [run]}}}
    shown = {artifact["key"] for artifact in served.ask("artifacts/filter", asked)}
    assert {"report", "tables", "scores", "curation"} <= shown
    lock = yaml.safe_load(checkout.ok("git", "show", "results:dvc.lock"))
    assert "report" in lock["stages"]


def test_stopping_leaves_no_process_and_a_state_for_each_run(served: Served) -> None:
    run = served.start(
        "pipeline/full", stages=["phase1"], overrides=[*CHOICE, "training.batches.0=1"]
    )
    served.process.send_signal(signal.SIGTERM)
    wait_for("the end", lambda: served.process.poll() is not None, 60)
    assert served.process.returncode == 0
    assert not processes_in(served.checkout.root)
