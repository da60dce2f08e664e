"""Critics in a real MLflow registry (sqlite): each once, by its DVC hash."""

from pathlib import Path

import mlflow
import pytest
import yaml

from components import tracking
from components.files import write_json
from components.registry import CRITIC, NEWEST
from components.tracking import Tracker, complete_parent, remember, stage_run

PARAMS = {"scale": "micro", "ablation": "none", "seed": 0}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout's folder with a store of its own and two rounds."""
    monkeypatch.setenv("DJEPA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for name in ("DJEPA_PARENT_RUN", "DJEPA_FLOW_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    params = PARAMS | {"feedback": {"rounds": {"r1": {}, "r2": {}}}}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    return tmp_path


def train(name: str, drops: bool = True, auroc: float = 0.7) -> None:
    """What the critic stage of a round leaves, in a run of its own."""
    folder, metrics = Path("critics", name), Path("metrics/critic", f"{name}.json")
    report = {
        "round": name,
        "drops": drops,
        "auroc": auroc,
        "auroc_interval": [auroc - 0.1, auroc + 0.1],
        "labels": "auto",
        "labelled_by": "the benchmark's rule",
        "started_from": "scratch",
    }
    write_json(folder / "report.json", report)
    write_json(folder / "config.json", {"drops": drops, "previous": "none"})
    write_json(metrics, report)
    with stage_run(f"critic@{name}", PARAMS, {}) as tracker:
        tracker.log_artifact(folder / "report.json", "critic")
        remember(f"critic@{name}", metrics, tracker, 1.0)


def locked(**hashes: str) -> None:
    """dvc.lock with these critics."""
    outs = {
        f"critic@{n}": {"outs": [{"path": f"critics/{n}", "md5": m}]} for n, m in hashes.items()
    }
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": outs}))


def report() -> dict[str, mlflow.entities.model_registry.ModelVersion]:
    """Run the end of the stage report; the registry's versions by DVC hash."""
    with stage_run("report", PARAMS, {}) as tracker:
        complete_parent(tracker, Path("metrics"))
    client = mlflow.MlflowClient(tracking.store())
    found = client.search_model_versions(f"name = '{CRITIC}'")
    return {version.tags["dvc.hash"]: version for version in found}


def test_each_critic_is_one_version_that_names_its_dvc_hash(here: Path) -> None:
    train("r1")
    train("r2", drops=False)
    locked(r1="aa.dir", r2="bb.dir")
    found = report()
    assert set(found) == {"aa.dir"}  # a critic that was refused is none
    version = found["aa.dir"]
    assert version.tags["round"] == "r1" and version.tags["auroc"] == "0.7000"
    assert version.tags["previous"] == "none" and version.tags["git.commit"]
    assert "critics/r1, hash aa.dir" in version.description
    client = mlflow.MlflowClient(tracking.store())
    files = client.list_artifacts(version.run_id, "critic")
    assert [file.path for file in files] == ["critic/report.json"]
    assert version.source.endswith(f"{version.run_id}/artifacts/critic")
    assert len(report()) == 1 and report()["aa.dir"].version == version.version

    train("r2", auroc=0.8)
    locked(r1="aa.dir", r2="cc.dir")
    found = report()
    assert set(found) == {"aa.dir", "cc.dir"}
    newest = client.get_model_version_by_alias(CRITIC, NEWEST)
    assert newest.version == found["cc.dir"].version


def test_a_critic_made_elsewhere_is_registered_without_a_run(here: Path) -> None:
    train("r1")
    for note in (here / "home" / "stage-runs").iterdir():
        note.unlink()
    locked(r1="aa.dir")
    version = report()["aa.dir"]
    assert not version.run_id and version.source.endswith("critics/r1")


def test_without_a_lock_or_mlflow_the_report_does_not_fail(here: Path) -> None:
    train("r1")
    assert report() == {}
    complete_parent(Tracker(), Path("metrics"))
