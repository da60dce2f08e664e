"""The tracking store: states of runs, and JSON lines where MLflow is not at hand."""

import importlib.util
from pathlib import Path

import mlflow
import pytest

from components import tracking
from components.tracking import flatten, stage_run

PARAMS = {"scale": "micro", "ablation": "none", "seed": 0, "training": {"batch": {"size": 4}}}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DJEPA_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DJEPA_PARENT_RUN", raising=False)
    return tmp_path


def client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking.store())


def all_runs() -> dict[str, mlflow.entities.Run]:
    experiment = client().get_experiment_by_name(tracking.EXPERIMENT)
    return {run.info.run_name: run for run in client().search_runs([experiment.experiment_id])}


def test_flatten_joins_with_dots_and_keeps_empty_mappings() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


@pytest.mark.parametrize(
    ("raised", "status"), [(None, "FINISHED"), (ValueError, "FAILED"), (SystemExit, "KILLED")]
)
def test_a_stage_ends_its_run_whatever_happens(
    home: Path, raised: type[BaseException] | None, status: str
) -> None:
    def work() -> None:
        with stage_run("phase1", PARAMS, {"training": PARAMS["training"]}) as tracker:
            tracker.log_metrics({"loss": 2.0}, step=3, images=12)
            if raised:
                raise raised

    if raised:
        with pytest.raises(raised):
            work()
    else:
        work()
    found = all_runs()
    child, parent = found["phase1"], found["micro, ablation none, seed 0"]
    assert (child.info.status, parent.info.status) == (status, status)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params == {"training.batch.size": "4"}
    assert child.data.metrics == {"loss": 2.0, "by_images/loss": 2.0}
    history = client().get_metric_history(child.info.run_id, "by_images/loss")
    assert [point.step for point in history] == [12]


def test_second_stage_joins_the_parent_of_the_first(home: Path) -> None:
    for name in ("curate", "encode"):
        with stage_run(name, PARAMS, {}):
            pass
    found = all_runs()
    assert len(found) == 3
    parents = {found[n].data.tags["mlflow.parentRunId"] for n in ("curate", "encode")}
    assert len(parents) == 1


def test_without_mlflow_lines_are_written_and_imported_later(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setattr(importlib.util, "find_spec", lambda name: None)
        with stage_run("phase1", PARAMS, {"training": {"lr": 0.1}}) as tracker:
            tracker.log_metrics({"loss": 1.5}, step=7, images=28)
    assert len(list((home / "pending").iterdir())) == 1
    with stage_run("evaluate@phase1", PARAMS, {}):
        pass
    phase1 = all_runs()["phase1"]
    assert phase1.info.status == "FINISHED"
    assert phase1.data.params == {"training.lr": "0.1"}
    assert phase1.data.metrics["loss"] == 1.5
    assert not list((home / "pending").iterdir())
