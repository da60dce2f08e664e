"""A refresh, and the pause for people's labels, with real flows and answers of a real store."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components.rating.jobs import label_job
from components.rating.store import Store
from tests.conftest import Checkout
from tests.test_graph import copy
from tests.test_rating import references
from tests.test_slow_flow import started, wait_for

pytestmark = pytest.mark.slow


def rate(folder: Path, count: int) -> None:
    """One rater finishes so many pictures of a reference set, every other one good."""
    job, store = label_job(folder), Store(folder.parent / "ratings.sqlite", create=True)
    for number, item in enumerate(job.items[:count]):
        store.answer(job, item, "ada", "logic", "good")
        store.answer(job, item, "ada", "realism", ("good", "bad")[number % 2])


def test_refresh_with_people_pauses_goes_on_and_commits_on_a_branch(
    micro: Checkout, tmp_path: Path
) -> None:
    checkout = copy(micro, tmp_path / "refresh")
    people = [f"feedback.people.{words}" for words in ("least=10", "hours=1", "every=1")]
    checkout.djepa("compose", "scale=micro", *people)
    checkout.ok("git", "commit", "-qam", "choice")
    head = checkout.ok("git", "rev-parse", "HEAD")
    log = checkout.root / "started.log"

    with started(checkout, sys.executable, "-m", "flows.refresh", "--labels", "people") as flow:
        wait_for("the pause", lambda: "Waiting for 10 labelled pictures" in log.read_text(), 300)
        assert "djepa rate labels references/r2" in log.read_text()
        rate(checkout.root / "references/r2", 10)
        wait_for("the end", lambda: flow.poll() is not None, 300)
        assert flow.returncode == 0, log.read_text()

    assert len((checkout.root / "labels/r2.jsonl").read_text().splitlines()) == 10
    critic = json.loads((checkout.root / "metrics/critic/r2.json").read_text())
    assert (critic["labels"], critic["references"]) == ("r2", 10)
    assert checkout.ok("git", "rev-parse", "HEAD") == head, "what is checked out stays"
    locked = yaml.safe_load(checkout.ok("git", "show", "refresh:dvc.lock"))["stages"]
    assert {"critic@r2", "phase2@r2", "evaluate@r2", "report"} <= set(locked)
    params = yaml.safe_load(checkout.ok("git", "show", "refresh:params.yaml"))
    assert params["feedback"]["rounds"]["r2"] == {"model": "r1", "critic": "r1", "labels": "r2"}
    assert "rounds/r2" not in checkout.ok("git", "status", "--porcelain")
    assert checkout.ok("git", "show", "refresh:labels/r2.jsonl").count("label") == 10


WAITING = """
import time
from pathlib import Path
from threading import Thread
from prefect import flow, get_client
from flows.people import wait_for_labels

@flow(log_prints=True)
def waiting(name, hours):
    file = Path(f"labels/{name}.jsonl")
    wait_for_labels(name, file, {"least": 4, "hours": hours, "every": 1})
    print(name, file.read_text())

def press_resume():  # as the button on Prefect's page
    with get_client(sync_client=True) as client:
        while not (paused := [r for r in client.read_flow_runs() if r.state.is_paused()]):
            time.sleep(1)
        client.resume_flow_run(paused[0].id)

waiting("enough", 1)
waiting("few", 0.001)
waiting("nobody", 0.001)
Thread(target=press_resume).start()
waiting("resumed", 1)
"""


def test_waiting_ends_at_once_with_labels_when_resumed_with_those_given_and_without_in_time(
    checkout: Checkout,
) -> None:
    for name, count in (("enough", 4), ("few", 3), ("nobody", 0), ("resumed", 2)):
        rate(references(checkout.root / "references" / name, 6), count)
    answer = subprocess.run(
        [sys.executable, "-c", WAITING],
        cwd=checkout.root,
        env=checkout.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    said = {
        name: (checkout.root / f"labels/{name}.jsonl").read_text().splitlines()
        for name in ("enough", "few", "nobody", "resumed")
    }
    assert len(said["enough"]) == 4 and len(said["resumed"]) == 2
    assert all("label" in json.loads(line) for line in said["resumed"])
    assert json.loads(said["few"][0]) == {
        "fallback": "auto",
        "why": "3 of 4 labels after 0.001 h",
    }
    assert json.loads(said["nobody"][0])["why"] == "0 of 4 labels after 0.001 h"
