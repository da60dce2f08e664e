"""`make serve` for real: one server and its workers, runs that are cancelled, killed and resumed.

The tests share the server and go on from one another's state, in this order.
"""

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from flows.rest import Server
from tests.conftest import Answer, Checkout
from tests.test_graph import copy
from tests.test_slow_flow import (
    free_port,
    longer_training,
    processes_in,
    snapshots,
    started,
    trained,
    wait_for,
)

pytestmark = pytest.mark.slow

ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
PHASE1 = {"stages": ["phase1"]}


@dataclass
class Served:
    """A checkout with `python -m flows.serve` running in it, and that process."""

    checkout: Checkout
    port: int
    process: Any

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def ask(self, path: str, body: Any = None) -> Any:
        answer = Server(self.api).ask(path, body)
        assert answer is not None, f"no answer to {path}:\n{self.log}"
        return answer

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

    def ends(self, run: str, seconds: float = 120) -> str:
        wait_for("the run's end", lambda: self.state(run) in ENDED, seconds)
        return self.state(run)

    def said(self, run: str) -> str:
        """The run's log, and what it ended with."""
        asked = {"logs": {"flow_run_id": {"any_": [run]}}}
        lines = [line["message"] for line in self.ask("logs/filter", asked)]
        return "\n".join([*lines, str(self.ask(f"flow_runs/{run}")["state"]["message"])])

    def worktree(self, run: str) -> Path:
        (found,) = (self.checkout.root / ".djepa/worktrees").glob(f"*-{run}")
        return found

    @property
    def log(self) -> str:
        return (self.checkout.root / "started.log").read_text()


@pytest.fixture(scope="module")
def served(micro: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    checkout = copy(micro, tmp_path_factory.mktemp("served") / "checkout")
    longer_training(checkout)
    checkout.ok("git", "add", "-A")
    checkout.ok("git", "commit", "-qm", "what scheduled runs are to do")
    port = free_port()
    command = (sys.executable, "-m", "flows.serve", "--port", str(port))
    with started(checkout, *command, PREFECT_WORKER_QUERY_SECONDS="1") as process:
        made = Served(checkout, port, process)
        wait_for("readiness", lambda: "\nReady after" in made.log or process.poll() is not None)
        assert process.poll() is None, made.log
        yield made
        for left in processes_in(checkout.root):
            left.kill()


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
    assert cron == {"nightly", "weekly", "tidy"}
    identifiers = {found[name]["id"] for name in cron}
    waiting = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}

    def scheduled() -> bool:
        """Newer SQLAlchemy silently stops this while everything else works."""
        return {each["deployment_id"] for each in served.ask("flow_runs/filter", waiting)} == (
            identifiers
        )

    wait_for("scheduled runs", scheduled, 90)


def test_server_and_worker_are_small(served: Served) -> None:
    below = psutil.Process(served.process.pid).children(recursive=True)
    named = [(each.cmdline()[1:4], each) for each in below]
    (server,) = (each for words, each in named if words == ["-m", "prefect", "server"])
    workers = [each for words, each in named if words == ["-m", "prefect", "worker"]]
    assert len(workers) == 2, "one for CPU work, one for that of a GPU"
    assert sum(p.memory_full_info().pss for p in (server, workers[0])) < 500e6


def test_a_parameter_that_does_not_exist_is_refused(served: Served) -> None:
    refused = served.prefect("deployment", "run", "pipeline/full", "--param", "nonsense=1")
    assert refused.returncode != 0 and "nonsense" in refused.stdout + refused.stderr


def test_a_cancelled_run_and_one_of_a_killed_worker_are_resumed_to_the_same_weights(
    served: Served, undisturbed: str
) -> None:
    checkout = served.checkout

    def more(before: list[Path]) -> None:
        wait_for("a snapshot", lambda: bool(snapshots(checkout)) and snapshots(checkout) != before)

    first = served.start("pipeline/full", **PHASE1)
    more([])
    place = served.worktree(first)
    assert served.prefect("flow-run", "cancel", first).returncode == 0
    assert served.ends(first) == "CANCELLED"
    wait_for("the trainer's end", lambda: not processes_in(place), 30)
    kept = snapshots(checkout)
    assert kept, "what was trained so far is kept"

    second = served.start("pipeline/full", **PHASE1)
    more(kept)
    place = served.worktree(second)
    (flow,) = (each for each in processes_in(place) if "prefect.engine" in each.cmdline())
    psutil.Process(flow.ppid()).kill()  # its worker
    assert served.ends(second) == "CRASHED"
    wait_for("the trainer's end", lambda: not processes_in(place), 60)
    assert snapshots(checkout)

    third = served.start("pipeline/full", **PHASE1)
    assert served.ends(third) == "COMPLETED", served.said(third)
    assert not snapshots(checkout)
    answer = checkout.dvc("repro", "--single-item", "phase1")
    assert "is cached" in answer and "Running stage" not in answer, "DVC finds what the flow ran"
    assert trained(checkout) == undisturbed


def test_a_whole_run_has_a_worktree_of_its_own_and_commits_on_a_branch(served: Served) -> None:
    checkout = served.checkout
    (checkout.root / "params.yaml").write_text("an edit in the middle")
    run = served.start("pipeline/full", overrides=["scale=micro"], branch="results")
    assert served.ends(run) == "COMPLETED", served.said(run)
    asked = {"artifacts": {"flow_run_id": {"any_": [run]}}}
    shown = {artifact["key"] for artifact in served.ask("artifacts/filter", asked)}
    assert {"report", "tables", "scores", "curation"} <= shown
    assert "scale: micro" in checkout.ok("git", "show", "results:params.yaml")
    assert "report" in yaml.safe_load(checkout.ok("git", "show", "results:dvc.lock"))["stages"]
    # The results are in the cache that both share: by hand there is nothing left to do.
    checkout.djepa("compose", "scale=micro")
    assert "Running stage" not in checkout.dvc("repro", "report")


def test_a_deployment_of_another_version_says_so(served: Served) -> None:
    checkout = served.checkout
    flow = checkout.root / "flows/pipeline.py"
    flow.write_text(flow.read_text().replace("stages: Sequence", "only: Sequence"))
    checkout.ok("git", "commit", "-qm", "another version", "--", "flows/pipeline.py")
    run = served.start("pipeline/full", **PHASE1)
    assert served.ends(run) == "FAILED"
    assert "deploy anew with `make serve`" in served.said(run)


def test_stopping_leaves_no_process(served: Served) -> None:
    served.process.send_signal(signal.SIGTERM)
    wait_for("the end", lambda: served.process.poll() is not None, 60)
    assert served.process.returncode == 0
    # What brings runs into MLflow ends by itself when no stage has been at work for a while.
    wait_for("the last process", lambda: not processes_in(served.checkout.root), 60)
