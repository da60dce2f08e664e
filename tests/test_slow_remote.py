"""A remote in a folder: what one machine pushed, a clone elsewhere has and need not make again."""

import sys
from pathlib import Path

import pytest

from components.errors import UserError
from components.remote import push, remote_name
from flows.pipeline import plan
from tests.conftest import Checkout
from tests.test_graph import copy

pytestmark = pytest.mark.slow


def test_a_clone_pulls_what_was_pushed_and_has_nothing_to_make(
    micro: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = copy(micro, tmp_path / "made")
    monkeypatch.chdir(made.root)
    assert remote_name() is None
    with pytest.raises(UserError, match="dvc remote add -d"):
        push(["curate"])
    made.dvc("remote", "add", "-d", "store", str(tmp_path / "store"))
    assert remote_name() == "store"
    push(list(plan()))
    made.ok("git", "commit", "-qam", "results")

    made.ok("git", "clone", "-q", str(made.root), str(tmp_path / "clone"))
    home = {"DJEPA_HOME": str(tmp_path / "home")}
    clone = Checkout(tmp_path / "clone", made.environment | home)
    clone.dvc("pull")
    assert clone.dvc("status").strip() == "Data and pipelines are up to date."
    assert "is what data.dvc records" in clone.djepa("data")
    assert "Running stage" not in clone.dvc("repro")
    clone.djepa("generate", "a photo of a red circle")
    assert (clone.root / "generated.png").stat().st_size

    # A remote that is away is one sentence, and says what to do.
    (tmp_path / "file").touch()
    made.dvc("remote", "modify", "store", "url", str(tmp_path / "file" / "store"))
    with pytest.raises(UserError, match=r"report to the remote store failed .* run `dvc push`"):
        push(["report"])
    answer = made.call(sys.executable, "-m", "dvc", "status", "report")
    assert answer.stdout.strip() == "Data and pipelines are up to date."
