"""A registered model's bytes: from DVC's cache, from a remote, or one sentence."""

import shutil
from pathlib import Path

import pytest
from dvc.repo import Repo

from components.errors import UserError
from components.registered import Model, fetched
from components.remote import push
from tests.test_cleanup import git, version


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "checkout"
    root.mkdir()
    git(root, "init", "-q", "-b", "main")
    Repo.init(str(root)).close()
    monkeypatch.chdir(root)
    monkeypatch.setenv("DJEPA_HOME", str(tmp_path / "home"))
    return root


def remote(root: Path, address: str) -> None:
    with Repo(str(root)) as repo, repo.config.edit("repo") as config:
        config["core"]["remote"] = "store"
        config["remote"]["store"] = {"url": address}


def test_bytes_come_from_the_cache_or_the_remote(root: Path, tmp_path: Path) -> None:
    model = Model("model-1", "model", "1", version(root, "weights"))
    with fetched(model) as folder:
        assert (folder / "file").read_text() == "weights"
    assert not list((tmp_path / "home/fetched").iterdir())
    remote(root, str(tmp_path / "store"))
    push(["out.dvc"])
    shutil.rmtree(root / ".dvc/cache")
    with fetched(model) as folder:
        assert (folder / "file").read_text() == "weights"


def test_a_remote_that_is_away_is_said_without_its_password(root: Path) -> None:
    model = Model("model-1", "model", "1", version(root, "weights"))
    remote(root, "http://someone:secret@127.0.0.1:9/store")
    with pytest.raises(UserError, match="to the remote store failed") as pushed:
        push(["out.dvc"])
    shutil.rmtree(root / ".dvc/cache")
    with (
        pytest.raises(UserError, match="nor to be had from the remote store") as refused,
        fetched(model),
    ):
        pass
    assert "secret" not in f"{pushed.value} {refused.value}"
