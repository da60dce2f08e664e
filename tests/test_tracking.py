"""Runs on their way to a real MLflow (sqlite): queued by stages, sent by a process of their own."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlflow
import psutil
import pytest

from components import sending, tracking
from components.errors import explain, without_password
from components.registered import find, pinned
from components.runs import MlflowTracker, client, experiment_name, open_run
from components.tracking import flatten, queue, stage_run, wait_sent, waiting

PARAMS = {
    "scale": "micro",
    "family": "micro",
    "ablation": "none",
    "seed": 0,
    "training": {"batch": {"size": 4}},
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DJEPA_HOME whose queue is sent when a test says so."""
    monkeypatch.setenv("DJEPA_HOME", str(tmp_path))
    monkeypatch.setattr(tracking, "start_sending", lambda: None)
    monkeypatch.setattr(sending, "LINGER", 0.0)
    monkeypatch.setattr(sending, "SAMPLE", float("inf"))  # the machine's load is no run's own
    for name in ("MLFLOW_TRACKING_URI", "DJEPA_PARENT_RUN", "DJEPA_FLOW_RUN", "DJEPA_FLOW_LINK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def all_runs() -> dict[str, mlflow.entities.Run]:
    experiment = client().get_experiment_by_name(experiment_name("micro"))
    return {run.info.run_name: run for run in client().search_runs([experiment.experiment_id])}


def test_flatten_joins_with_dots_and_keeps_empty_mappings() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


@pytest.mark.parametrize(
    ("raised", "status"), [(None, "FINISHED"), (ValueError, "FAILED"), (SystemExit, "KILLED")]
)
def test_a_stage_ends_its_run_whatever_happens(
    home: Path, monkeypatch: pytest.MonkeyPatch, raised: type[BaseException] | None, status: str
) -> None:
    monkeypatch.setenv("DJEPA_FLOW_LINK", "http://127.0.0.1:4200/runs/flow-run/7")
    kept = home / "picture.txt"
    kept.write_text("as it was")

    def work() -> None:
        with stage_run("phase1", PARAMS, {"training": PARAMS["training"]}) as tracker:
            tracker.log_metrics({"loss": 2.0}, step=3, images=12)
            tracker.log_artifact(kept, "samples")
            kept.write_text("changed before it is sent")
            if raised:
                raise raised

    if raised:
        with pytest.raises(raised):
            work()
    else:
        work()
    sending.main(queue())
    found = all_runs()
    child, parent = found["phase1"], found["micro seed 0"]
    assert (child.info.status, parent.info.status) == (status, status)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags["prefect.link"] == "http://127.0.0.1:4200/runs/flow-run/7"
    assert child.data.params == {"training.batch.size": "4"}
    assert parent.data.params["training.batch.size"] == "4"
    assert child.data.metrics == {"loss": 2.0, "by_images/loss": 2.0}
    history = client().get_metric_history(child.info.run_id, "by_images/loss")
    assert [point.step for point in history] == [12]
    folder = client().download_artifacts(child.info.run_id, "samples/picture.txt")
    assert Path(folder).read_text() == "as it was"
    assert not waiting(queue())


def test_two_that_look_at_once_both_see_that_a_run_is_over(home: Path) -> None:
    with stage_run("phase1", PARAMS, {}):
        (run,) = waiting(queue())
        assert not tracking.is_over(run)
    with (run / tracking.LINES).open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # as is_over does for a moment
        assert tracking.is_over(run)


def test_second_stage_joins_the_parent_of_the_first(home: Path) -> None:
    for name in ("curate", "encode"):
        with stage_run(name, PARAMS, {}):
            pass
    sending.main(queue())
    found = all_runs()
    assert len(found) == 3
    parents = {found[n].data.tags["mlflow.parentRunId"] for n in ("curate", "encode")}
    assert len(parents) == 1


def test_a_parent_gets_the_parameters_that_a_killed_process_did_not_send(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kill(BaseException):
        pass

    def killed(*arguments: object) -> None:
        raise Kill

    with stage_run("curate", PARAMS, {}):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(MlflowTracker, "log_params", killed)
        with pytest.raises(Kill):
            sending.Sender(queue()).look(waiting(queue()))
    assert all_runs()["micro seed 0"].data.params == {}, "it is made, and no more"
    sending.main(queue())
    assert all_runs()["micro seed 0"].data.params["training.batch.size"] == "4"


def test_a_run_is_seen_while_it_is_written_and_sent_once_by_processes_that_are_killed(
    home: Path,
) -> None:
    with stage_run("phase1", PARAMS, {}) as tracker:
        tracker.log_metrics({"loss": 2.0}, step=1)
        sender = sending.Sender(queue())
        assert sender.look(waiting(queue())) is None
        running = all_runs()["phase1"]
        assert (running.info.status, running.data.metrics) == ("RUNNING", {"loss": 2.0})
        tracker.log_metrics({"loss": 1.0}, step=2)
        # A sender that died after it sent and before it noted so.
        record = waiting(queue())[0] / sending.STATE
        before = record.read_text()
        assert sending.Sender(queue()).look(waiting(queue())) is None
        record.write_text(before)
    sending.main(queue())
    run = all_runs()["phase1"]
    history = client().get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.0)]
    assert len(all_runs()) == 2


def test_a_stage_killed_without_a_word_is_killed_in_mlflow_and_the_sender_ends(
    tmp_path: Path, home: Path
) -> None:
    """With real processes: the sender outlives the stage's process group, but not for long."""
    script = (
        "import os, signal, time\n"
        "from components.tracking import stage_run\n"
        f"with stage_run('phase1', {PARAMS!r}, {{}}) as tracker:\n"
        "    tracker.log_metrics({'loss': 2.0}, step=1)\n"
        "    print('written', flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = Path(tracking.__file__).parents[1]
    stage = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=root,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert stage.stdout is not None
    stage.stdout.readline()
    os.killpg(stage.pid, signal.SIGKILL)
    stage.wait()
    end = time.monotonic() + 60
    while waiting(queue()) and time.monotonic() < end:
        time.sleep(0.2)
    assert all_runs()["phase1"].info.status == "KILLED"
    assert all_runs()["phase1"].data.metrics == {"loss": 2.0}

    def senders() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if str(queue()) in process.cmdline():
                    found.append(process)
        return found

    while senders() and time.monotonic() < end:
        time.sleep(0.2)
    assert not senders()


def test_what_a_store_that_is_away_misses_is_kept_and_sent_later(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:secret@127.0.0.1:{port}")
    with stage_run("phase1", PARAMS, {}) as tracker:
        tracker.log_metrics({"loss": 1.5}, step=7, images=28)
        assert sending.Sender(queue()).look(waiting(queue()))
    said = capfd.readouterr()
    assert f"MLflow at http://127.0.0.1:{port} does not take the runs" in said.err
    assert "secret" not in (queue() / tracking.PROBLEM).read_text()
    assert f"API request to http://127.0.0.1:{port}/" in said.out  # what is logged
    assert "secret" not in said.out + said.err
    assert len(waiting(queue())) == 1
    left = queue()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sending.main(left)  # the same lines, to a store that answers
    assert all_runs()["phase1"].data.metrics["loss"] == 1.5
    assert not waiting(left) and not (left / tracking.PROBLEM).exists()


@pytest.mark.parametrize(
    "call", [lambda: find("model@newest"), pinned, lambda: open_run("micro", "a run", {})]
)
def test_a_store_that_is_away_is_one_sentence_without_its_password(
    home: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:p@ss-secret@127.0.0.1:9")
    with pytest.raises(Exception) as away:
        call()
    sentence = explain(away.value)
    assert sentence and "127.0.0.1:9" in sentence and sentence.endswith(".")
    assert "secret" not in sentence and "someone" not in sentence and "\n" not in sentence


@pytest.mark.parametrize("word", ["secret", "se@cret", "secret?#", "'secret'", ""])
def test_no_password_is_left_in_a_text(word: str) -> None:
    text = without_password(f"at (http://me:{word}@host:5000/api) and s3://me:{word}@b, not x@y")
    assert text == "at (http://host:5000/api) and s3://b, not x@y"


def test_without_mlflow_lines_are_kept_and_sent_by_the_next_who_has_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.undo()
        without.setenv("DJEPA_HOME", str(home))
        without.setattr(tracking, "find_spec", lambda name: None)
        with stage_run("phase1", PARAMS, {"training": {"lr": 0.1}}) as tracker:
            tracker.log_metrics({"loss": 1.5}, step=7, images=28)
        assert not wait_sent(1)
    assert len(waiting(queue())) == 1
    with stage_run("evaluate@phase1", PARAMS, {}):
        pass
    sending.main(queue())
    phase1 = all_runs()["phase1"]
    assert phase1.info.status == "FINISHED"
    assert phase1.data.params == {"training.lr": "0.1"}
    assert phase1.data.metrics["loss"] == 1.5


def test_a_run_that_mlflow_refuses_keeps_no_other_waiting(home: Path) -> None:
    def work(stage: str) -> None:
        for family in ("lost", "micro"):
            with stage_run(stage, PARAMS | {"family": family}, {}) as tracker:
                tracker.log_metrics({"loss": 1.5}, step=1)

    work("curate")
    sending.main(queue())
    lost = client().get_experiment_by_name(experiment_name("lost")).experiment_id
    client().delete_experiment(lost)
    work("phase1")
    began = time.time()
    assert sending.Sender(queue()).look(waiting(queue()))
    assert all_runs()["phase1"].info.status == "FINISHED"
    (left,) = waiting(queue())
    problem = queue() / tracking.PROBLEM
    said = problem.read_text()
    assert f"does not take the run {left.name} (" in said and "deleted" in said
    assert problem.stat().st_mtime >= began and not wait_sent(30)
    client().restore_experiment(lost)
    assert sending.Sender(queue()).look(waiting(queue())) is None
    found = {run.info.run_name: run for run in client().search_runs([lost])}
    assert found["phase1"].data.metrics == {"loss": 1.5}
    assert not waiting(queue()) and not problem.exists()


def test_a_killed_run_that_was_deleted_in_mlflow_is_given_up(home: Path) -> None:
    with stage_run("phase1", PARAMS, {}) as tracker:
        sending.Sender(queue()).look(waiting(queue()))
        client().delete_run(all_runs()["phase1"].info.run_id)
        tracker._file.close()  # as a kill does
        sending.main(queue())
        assert not waiting(queue())
        tracker._file = (home / "rest").open("a")


def test_one_record_that_mlflow_refuses_loses_no_other(home: Path) -> None:
    with stage_run("phase1", PARAMS, {"training": {"lr": 0.1}}) as tracker:
        tracker.log_metrics({"a bad:name?": 1.0}, step=1)
        tracker.log_metrics({"loss": 1.5}, step=1)
    sending.main(queue())
    assert all_runs()["phase1"].data.metrics == {"loss": 1.5}
    assert all_runs()["phase1"].info.status == "FINISHED"
