"""DVC's experiments: a queue of them leaves the runs that the flow and `dvc repro` leave."""

import json
import shutil
import sqlite3
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import Checkout
from tests.test_graph import copy, runs
from tests.test_slow_flow import wait_for

pytestmark = pytest.mark.slow
SEED = 3  # the standing choice, which no experiment names
TINY = ("training.phase1.images=64", "training.workers=1", "training.grids=0")


def parameters_of(checkout: Checkout, run: str) -> dict[str, str]:
    with sqlite3.connect(checkout.root / ".djepa" / "mlflow.db") as store:
        return dict(store.execute("select key, value from params where run_uuid = ?", (run,)))


def forget_the_report(checkout: Checkout) -> None:
    """As on a clone where only some stages have run: DVC's experiments read what plots name."""
    outs = yaml.safe_load((checkout.root / "dvc.lock").read_text())["stages"]["report"]["outs"]
    for out in outs:
        cached = checkout.root / ".dvc/cache/files/md5" / out["md5"][:2] / out["md5"][2:]
        cached.unlink()
        shutil.rmtree(checkout.root / out["path"])


def test_a_queue_of_experiments_keeps_choices_and_shares_the_store(
    micro: Checkout, tmp_path: Path
) -> None:
    checkout = copy(micro, tmp_path / "queue")
    # Found from the copies that the queue runs in, as for a user who has not set it.
    del checkout.environment["DJEPA_HOME"]
    checkout.djepa("compose", "scale=micro", f"seed={SEED}")
    checkout.ok("git", "commit", "-qam", "another seed")
    forget_the_report(checkout)
    before = (checkout.root / "params.yaml").read_text(), len(runs(checkout))

    chosen = [part for setting in ("ablation=A,C", *TINY) for part in ("-S", setting)]
    checkout.dvc("exp", "run", "--queue", *chosen, "phase1")
    checkout.dvc("queue", "start", "--jobs", "1")

    def done() -> bool:
        time.sleep(3)  # to ask takes a second of a core
        return not {"Queued", "Running"} & set(checkout.dvc("queue", "status").split())

    wait_for("the queue to be done", done, 300)
    assert checkout.dvc("queue", "status").split().count("Success") == 2
    checkout.dvc("queue", "stop")
    assert (checkout.root / "params.yaml").read_text() == before[0]

    shown = json.loads(checkout.dvc("exp", "show", "--json", "--no-pager"))
    found = [each["revs"][0]["data"]["params"]["params.yaml"]["data"]
             for each in shown[-1]["experiments"]]  # fmt: skip
    sampled = {each["ablation"]: each["feedback"]["sampling"] for each in found}
    assert sampled == {"A": "uniform", "C": "statistical"}
    assert {each["seed"] for each in found} == {SEED}
    assert {each["training"]["phase1"]["images"] for each in found} == {64}

    wait_for("the runs to be sent", lambda: set(runs(checkout)["status"]) == {"FINISHED"})
    frame = runs(checkout)
    assert len(frame) > before[1]
    new = frame[frame["seed"] == str(SEED)]
    parents = new[new["kind"] == "pipeline"].set_index("name")["run_uuid"]
    assert set(parents.index) == {f"micro {group} seed {SEED}" for group in "AC"}
    for group in "AC":
        run = parents[f"micro {group} seed {SEED}"]
        assert "phase1" in set(new[new["mlflow.parentRunId"] == run]["stage"])
        flat = parameters_of(checkout, run)
        assert (flat["ablation"], flat["seed"]) == (group, str(SEED))
        assert flat["feedback.sampling"] == sampled[group]


def test_a_stale_file_of_parameters_is_refused_wherever_it_is_read(
    micro: Checkout, tmp_path: Path
) -> None:
    checkout = copy(micro, tmp_path / "stale")
    file = checkout.root / "params.yaml"
    params = yaml.safe_load(file.read_text())
    params["training"]["phase1"]["images"] += 1
    file.write_text(yaml.safe_dump(params, sort_keys=False))
    for command in (("dvc", "repro", "phase1"), ("flows.ablation",)):
        answer = checkout.call(sys.executable, "-m", *command)
        said = answer.stdout + answer.stderr
        assert answer.returncode, command
        assert "params.yaml is stale" in said and "`djepa compose`" in said, said
        assert "training.phase1.images" in said
