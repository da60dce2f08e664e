"""Critics and final models in a real MLflow registry (sqlite): each once, by its DVC hash."""

from pathlib import Path

import mlflow
import pytest
import yaml

from components import sending, tracking
from components.files import write_json
from components.registry import CRITIC, MODEL, NEWEST
from components.runs import client, experiment_name
from components.tracking import complete_parent, queue, remember, stage_run

PARAMS = {"scale": "micro", "family": "micro", "ablation": "none", "seed": 0}
ROUNDS = {"r1": {"model": "phase1"}, "r2": {"model": "r1"}}
WHOLE = PARAMS | {"feedback": {"rounds": ROUNDS}, "dpo": {"from": "r2"}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout's folder with a store of its own and two rounds."""
    monkeypatch.setenv("DJEPA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for name in ("DJEPA_PARENT_RUN", "DJEPA_FLOW_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracking, "start_sending", lambda: None)
    monkeypatch.setattr(sending, "LINGER", 0.0)
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(WHOLE))
    Path("data.dvc").write_text(yaml.safe_dump({"outs": [{"path": "data", "md5": "dd.dir"}]}))
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


def locked(folder: str = "critics", **hashes: str) -> None:
    """dvc.lock with these outputs, beside what it has."""
    file = Path("dvc.lock")
    lock = yaml.safe_load(file.read_text()) if file.exists() else {"schema": "2.0", "stages": {}}
    for name, digest in hashes.items():
        lock["stages"][f"{folder}-{name}"] = {"outs": [{"path": f"{folder}/{name}", "md5": digest}]}
    file.write_text(yaml.safe_dump(lock))


def report(registered: str = CRITIC) -> dict[str, mlflow.entities.model_registry.ModelVersion]:
    """Run the end of the stage report; the registry's versions by DVC hash."""
    with stage_run("report", PARAMS, {}) as tracker:
        complete_parent(tracker, Path("metrics"), WHOLE)
    sending.main(queue())
    found = client().search_model_versions(f"name = '{registered}'")
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
    files = client().list_artifacts(version.run_id, "critic")
    assert [file.path for file in files] == ["critic/report.json"]
    assert version.source.endswith(f"{version.run_id}/artifacts/critic")
    assert len(report()) == 1 and report()["aa.dir"].version == version.version

    train("r2", auroc=0.8)
    locked(r1="aa.dir", r2="cc.dir")
    found = report()
    assert set(found) == {"aa.dir", "cc.dir"}
    newest = client().get_model_version_by_alias(CRITIC, NEWEST)
    assert newest.version == found["cc.dir"].version


def test_a_critic_made_elsewhere_is_registered_without_a_run(here: Path) -> None:
    train("r1")
    sending.main(queue())
    for note in (here / "home" / "stage-runs").iterdir():
        note.unlink()
    locked(r1="aa.dir")
    version = report()["aa.dir"]
    assert not version.run_id and version.source.endswith("critics/r1")


def test_what_another_machine_makes_in_the_same_moment_loses_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both looked before either had made the experiment and the registered model."""
    store = client()
    store.create_experiment(experiment_name("micro"))
    store.create_registered_model(CRITIC)
    find, looks = mlflow.MlflowClient.get_experiment_by_name, []

    def look(self: mlflow.MlflowClient, name: str) -> object:
        looks.append(name)
        return None if len(looks) == 1 else find(self, name)

    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", look)
    monkeypatch.setattr(mlflow.MlflowClient, "search_registered_models", lambda *words: [])
    train("r1")
    locked(r1="aa.dir")
    assert set(report()) == {"aa.dir"}


def test_without_a_lock_the_report_does_not_fail(here: Path) -> None:
    train("r1")
    assert report() == {}


def test_the_final_model_names_its_data_and_the_critics_it_was_trained_with(here: Path) -> None:
    train("r1")
    train("r2", drops=False)
    locked(r1="aa.dir", r2="bb.dir")
    locked("models", phase1="p1.dir", r1="m1.dir", r2="m2.dir")
    write_json(Path("metrics/train/r2.json"), {"images_total": 300})
    scores = {"overall": 0.5, "chance": 0.1, "stderr": 0.02}
    write_json(Path("metrics/evaluate/r2.json"), {"geneval": scores})
    with stage_run("phase2@r2", PARAMS, {}) as tracker:
        remember("phase2@r2", Path("metrics/train/r2.json"), tracker, 1.0)
    version = report(MODEL)["m2.dir"]
    wanted = {
        "stage": "r2",
        "data.hash": "dd.dir",
        "critics": "r1=aa.dir",
        "dvc.path": "models/r2",
        "geneval.overall": "0.5000",
        "seed": "0",
    }
    assert wanted.items() <= version.tags.items()
    run = client().get_run(version.run_id)
    assert run.data.tags["stage"] == "phase2@r2"
    parent = client().get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.data.tags["child.phase2-r2"] == version.run_id
    curve = client().get_metric_history(parent.info.run_id, "by_images/geneval.overall")
    assert [(point.step, point.value) for point in curve] == [(300, 0.5)]

    locked("models", dpo="m3.dir")  # tuned from r2: the same critics
    version = report(MODEL)["m3.dir"]
    assert version.tags["critics"] == "r1=aa.dir"
    newest = client().get_model_version_by_alias(MODEL, NEWEST)
    assert newest.version == version.version
