"""The jobs beside the pipeline as their commands: real Prefect, MLflow's registry, DVC's cache."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import yaml

from components.arrivals import begin
from components.errors import UserError
from components.files import write_json
from components.registered import fetched, find
from components.remote import push
from tests.conftest import ROOT, Answer, Checkout
from tests.test_curation import raw
from tests.test_graph import copy
from tests.test_slow_curate_flow import OVERRIDES

pytestmark = pytest.mark.slow


def artifacts(checkout: Checkout) -> dict[str, str]:
    """What Prefect keeps of each artifact's key, the newest."""
    with closing(sqlite3.connect(checkout.root / ".djepa/prefect/prefect.db")) as database:
        found = database.execute("select key, data from artifact order by created").fetchall()
    return {key: json.loads(data) for key, data in found}


def flow(checkout: Checkout, name: str, *arguments: str, **extra: str) -> Answer:
    return checkout.call(sys.executable, "-m", f"flows.{name}", *arguments, **extra)


@pytest.fixture(scope="module")
def registered(micro: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A finished pipeline whose model is in the registry, and in DVC's cache alone."""
    made = copy(micro, tmp_path_factory.mktemp("registered") / "checkout")
    client = mlflow.MlflowClient(f"sqlite:///{made.root}/.djepa/mlflow.db")
    lock = yaml.safe_load((made.root / "dvc.lock").read_text())["stages"]
    outs = {out["path"]: out["md5"] for stage in lock.values() for out in stage["outs"]}
    if not client.search_registered_models("name = 'model'"):
        client.create_registered_model("model")
    for name in ("phase1", "dpo"):
        tags = {"dvc.hash": outs[f"models/{name}"], "dvc.path": f"models/{name}"}
        made_by_hand = client.create_model_version(
            "model", "file:///nowhere", tags=tags, await_creation_for=0
        )
        client.set_registered_model_alias("model", name, made_by_hand.version)
    # The checkout has other results by now: the models are named by the registry alone.
    made.ok("git", "checkout", "-q", "dvc.lock")
    for name in ("models", "samples"):
        shutil.rmtree(made.root / name)
    return made


def test_clean_up_keeps_registered_models_and_evaluation_scores_them(registered: Checkout) -> None:
    left = registered.root / ".djepa/resume/0123456789abcdef"
    left.mkdir(parents=True)
    (left / "file").write_bytes(b"x" * 1_000_000)
    answer = flow(registered, "cleanup", "--days", "0", "--remove", "--cache")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert not left.exists()
    rows = json.loads(artifacts(registered)["clean-up"])
    assert {(row["kind"], row["done"]) for row in rows} == {
        ("snapshot", "removed"),
        ("DVC's cache", "removed"),
    }

    answer = flow(registered, "evaluation", "model@dpo", "--pictures", "1")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (out,) = (registered.root / ".djepa/evaluations").iterdir()
    result = json.loads((out / "result.json").read_text())["geneval"]
    assert (out / "grid.png").is_file() and (out / "results.jsonl").is_file()
    client = mlflow.MlflowClient(f"sqlite:///{registered.root}/.djepa/mlflow.db")
    version = client.get_model_version_by_alias("model", "dpo")
    assert version.tags["evaluation.overall"] == f"{result['overall']:.4f}"
    assert version.tags["evaluation.pictures"] == "1"
    run = client.get_run(version.tags["evaluation.run"])
    assert run.info.status == "FINISHED" and run.data.tags["kind"] == "evaluation"
    assert run.data.metrics["geneval/overall"] == pytest.approx(result["overall"])
    assert {"grid.png", "result.json"} <= {f.path for f in client.list_artifacts(run.info.run_id)}
    assert artifacts(registered)["grid"].startswith("data:image/png;base64,")
    assert not list((registered.root / ".djepa/fetched").iterdir())
    assert not list((registered.root / ".djepa/resume").iterdir())


def test_bytes_that_are_not_there_or_damaged_are_one_sentence_and_a_remote_has_them(
    registered: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = flow(registered, "evaluation", "model@nobody")
    assert answer.returncode == 2 and "Traceback" not in answer.stderr
    assert "it has model@" in answer.stderr and "Starting temporary server" not in answer.stderr

    monkeypatch.chdir(registered.root)
    monkeypatch.setenv("DJEPA_HOME", str(registered.root / ".djepa"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    model = find("models:/model@phase1")
    with fetched(model) as folder:
        assert (folder / "model_index.json").is_file()
        names = sorted(p.name for p in folder.rglob("*") if p.is_file())
    with pytest.raises(UserError, match="no name in MLflow's registry"):
        find("no such thing")

    # On a remote, and no longer in the cache.
    registered.dvc("remote", "add", "-d", "store", str(tmp_path / "store"))
    lock = (registered.root / "dvc.lock").read_text()
    stage = {"cmd": "x", "outs": [{"path": "models/phase1", "md5": model.digest, "hash": "md5"}]}
    stages = yaml.safe_load(lock)["stages"] | {"phase1": stage}
    (registered.root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    push(["phase1"])
    (registered.root / "dvc.lock").write_text(lock)
    cache = registered.root / ".dvc/cache/files/md5"
    listing = cache / model.digest[:2] / model.digest[2:]
    digests = [entry["md5"] for entry in json.loads(listing.read_text())]
    shutil.rmtree(cache)
    with fetched(model) as folder:
        assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == names

    # Damaged in the cache: other bytes under the same name.
    for digest in digests:
        file = cache / digest[:2] / digest[2:]
        file.chmod(0o644)
        file.write_bytes(b"damaged")
        file.chmod(0o444)
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store").mkdir()
    with pytest.raises(UserError, match=r"model/\d+.*(damaged|neither)"), fetched(model):
        pass
    shutil.rmtree(cache)
    with pytest.raises(UserError, match="nor to be had from the remote store"), fetched(model):
        pass
    registered.dvc("remote", "remove", "store")
    with pytest.raises(UserError, match="DVC has no default remote"), fetched(model):
        pass
    assert not list((registered.root / ".djepa/fetched").iterdir())


def test_new_shards_become_a_batch_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    source, out = raw(tmp_path / "in", shards=2), tmp_path / "out"
    (source / "damaged.tar").write_bytes(b"no tar at all " * 1000)
    for shard in source.iterdir():
        os.utime(shard, (time.time() - 3600,) * 2)
    (source / "growing.tar").write_bytes(b"")
    root = tmp_path / "home"
    (root / ".djepa/prefect").mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
    extra = {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(root / ".djepa/prefect")}
    here = Checkout(root, environment | extra)
    command = ("curation", str(source), str(out), *OVERRIDES, "--workers", "1")

    noted = begin(source, out, 300).batch  # as a run that was killed just then
    assert noted is not None
    answer = flow(here, *command)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    ledger = json.loads((out / "ledger.json").read_text())
    assert set(ledger["shards"]) == {"00000.tar", "00001.tar", "damaged.tar"}
    assert ledger["batches"][noted.name]["contract"] == "held"
    rejects = pd.read_parquet(noted.out / "rejects.parquet")
    assert "damaged" in set(rejects[rejects["shard"] == "damaged"]["filter"])
    kept = pd.read_parquet(noted.out / "manifest.parquet")
    assert set(kept["shard"]) == {"00000", "00001"}
    page = artifacts(here)["new-shards"]
    assert "pictures kept" in page and "Contract: held" in page

    # Killed between the set and the ledger: it is not curated again. A contract that it breaks is
    # said at the end, and the next night goes on with what is new.
    write_json(out / "ledger.json", {"shards": {}, "batches": {}})
    write_json(out / "batch.json", {"name": noted.name, "shards": noted.shards})
    answer = flow(here, *command, "curation.contract.rows=1000")
    said = answer.stdout + answer.stderr
    assert answer.returncode == 2 and "curate scan" not in said, said
    assert "curation: The contract on" in answer.stderr and "Traceback" not in answer.stderr
    ledger = json.loads((out / "ledger.json").read_text())
    assert ledger["batches"][noted.name]["contract"].startswith("The contract on")
    found = begin(source, out, 300)
    assert found.batch is None and found.left[0].startswith("growing.tar")


def test_a_full_disk_while_dvc_takes_the_files_loses_no_training(
    micro: Checkout, tmp_path: Path
) -> None:
    checkout = copy(micro, tmp_path / "full")
    cache = checkout.root / ".dvc/cache"
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(cache)]
    shutil.copytree(cache, tmp_path / "cache")
    if os.geteuid() or subprocess.run(mount).returncode:
        pytest.skip("only root may mount the small file system that this test fills")
    try:
        shutil.copytree(tmp_path / "cache", cache, dirs_exist_ok=True)
        with suppress(OSError), (cache / "full").open("wb", buffering=0) as full:
            while full.write(b"x" * 4096):
                pass
        checkout.djepa("compose", "scale=micro", "evaluation.realism_margin=0.5")
        script = "from flows.pipeline import pipeline; pipeline(stages=['compare-dpo'])"
        answer = checkout.call(sys.executable, "-c", script)
        said = answer.stdout + answer.stderr
        assert answer.returncode and "run `dvc commit --force compare-dpo`" in said, said
        assert "compare@dpo: done" in said
    finally:
        subprocess.run(["umount", "--lazy", str(cache)], check=True)
    checkout.dvc("commit", "--force", "compare-dpo")
    assert checkout.dvc("status", "compare-dpo").strip() == "Data and pipelines are up to date."
