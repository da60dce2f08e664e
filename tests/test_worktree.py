"""Worktrees of scheduled runs, made and removed in a real checkout."""

import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from components.errors import UserError
from components.rating.store import Store
from flows import worktree
from flows.rest import Server
from tests.conftest import Checkout
from tests.test_bad_input import refused, without
from tests.test_slow_flow import free_port

KEPT = "stages: {make: {cmd: echo 1 > made, outs: [made]}}\n"


@pytest.fixture
def here(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """With one stage in its dvc.yaml, whose result is in the cache, and a remote beside it."""
    (checkout.root / "dvc.yaml").write_text(KEPT)
    (checkout.root / "dvc.lock").unlink()
    checkout.dvc("remote", "add", "-d", "shelf", "../shelf")
    checkout.dvc("repro", "--quiet", "make")
    checkout.ok("git", "add", "-A")
    checkout.ok("git", "commit", "-qm", "one stage")
    monkeypatch.chdir(checkout.root)
    for name, value in checkout.environment.items():
        monkeypatch.setenv(name, value)
    return checkout


def test_a_worktree_has_the_branch_the_results_and_the_settings(
    here: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here.root / "README.md").write_text("an edit")
    path = worktree.add("main", "HEAD")
    assert path.parent == here.root / ".djepa/worktrees" and Path.cwd() == path
    assert (path / "README.md").read_text() != "an edit"
    # A link into the checkout's cache, not a second copy.
    assert (path / "made").read_text() == "1\n" and (path / "made").stat().st_nlink > 1
    said = subprocess.run(
        [sys.executable, "-m", "dvc", "config", "remote.shelf.url"], capture_output=True, text=True
    )
    assert (path / ".dvc" / said.stdout.strip()).resolve() == (here.root / "../shelf").resolve()

    Store(path / "references/ratings.sqlite", create=True)  # of people who label its pictures
    assert (here.root / ".djepa/ratings.sqlite").stat().st_size

    assert worktree.leftovers() == [], "this process is in it"
    run = worktree.runs()[0]
    with subprocess.Popen(["sleep", "60"]) as inside:
        os.chdir(here.root)
        os.utime(path, (time.time() - 61,) * 2)
        assert worktree.leftovers() == [], "another one is"
        inside.kill()
    assert worktree.leftovers() == [], "it was in use a moment ago"
    os.utime(path, (time.time() - 61,) * 2)
    assert worktree.leftovers() == [run]
    worktree.give_up(Server(f"http://127.0.0.1:{free_port()}/api"))
    assert worktree.leftovers() == [run], "no server was there to be told"
    worktree.remove([run])
    assert not path.exists() and "worktrees" not in here.ok("git", "worktree", "list")


def test_a_branch_that_is_gone_is_said_with_the_way_out(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout.root)
    monkeypatch.setenv("DJEPA_HOME", str(checkout.root / ".djepa"))
    gone, theirs = str(uuid.uuid4()), f"2-{uuid.uuid4()}"  # of the machine NAME-2
    for run in (gone, theirs):
        path = worktree.folder() / f"{socket.gethostname()}-{run}"
        path.mkdir(parents=True)
        os.utime(path, (time.time() - 61,) * 2)
    with pytest.raises(UserError, match=r"no branch or commit nowhere .* `make serve`"):
        worktree.add("nowhere", "HEAD")
    assert worktree.runs() == [gone], "by hand nobody can be told that its run is over"


def test_a_scheduled_run_without_a_package_says_which(checkout: Checkout, tmp_path: Path) -> None:
    run = {
        worktree.RUN: str(uuid.uuid4()),
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
    }
    run |= without("psutil", tmp_path / "no")
    answer = checkout.call(sys.executable, "-m", "flows.worktree", "main", "HEAD", **run)
    refused(answer, "'psutil'", "make -B install", by=("worktree",))
