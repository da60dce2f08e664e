"""What is in use, young, or not ours stays; what is left over goes."""

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
from dvc.repo import Repo

from components.cleanup import collect, leftovers, remove
from components.errors import UserError
from components.processes import only_one

DAYS = 7
HOST = socket.gethostname()


def git(root: Path, *arguments: str) -> str:
    author = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    answer = subprocess.run(
        ["git", *author, *arguments], cwd=root, capture_output=True, text=True, check=True
    )
    return answer.stdout


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    root.mkdir()
    git(root, "init", "-q", "-b", "main")
    (root / "README.md").write_text("a project\n")
    (root / ".gitignore").write_text("/.djepa\n")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    return root


def put(folder: Path, days: float, size: int = 1000) -> Path:
    """A folder with a file of so many bytes, last touched so many days ago."""
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_bytes(b"x" * size)
    age(folder, days)
    return folder


def age(path: Path, days: float) -> None:
    then = time.time() - days * 86400
    for each in (path, *path.rglob("*")):
        os.utime(each, (then, then))


def test_only_what_nobody_uses_goes(root: Path) -> None:
    home = root / ".djepa"
    resume, trees = home / "resume", home / "worktrees"
    goes = [
        put(resume / "0123456789abcdef", 8, 4000),
        put(resume / f"00112233445566aa.old.tmp-{2**22 + 1}", 8),  # its removal was cut off
        put(trees / f"{HOST}-gone", 8),
        put(root / ".dvc/tmp/exps/standalone/tmpgone", 8),
        put(root / f"samples/r1.tmp-{2**22 + 1}", 8),  # no process has such a number
        put(root / "curated.tmp-0123456789abcdef", 8),
        put(home / "fetched" / f"model-1.tmp-{2**22 + 1}", 8),
    ]
    git(root, "worktree", "add", "-q", "--detach", str(trees / f"{HOST}-over"))
    age(trees / f"{HOST}-over", 8)
    goes.append(trees / f"{HOST}-over")
    held, used = put(resume / "fedcba9876543210", 8), put(trees / f"{HOST}-used", 8)
    stays = [
        held,
        used,
        put(resume / "0000000000000000", 6),
        put(resume / "notes-of-mine", 8),
        put(trees / f"{HOST}-young", 6),
        put(trees / "othermachine-run", 99),
        put(root / ".dvc/tmp/exps/celery", 99),
        put(root / f"samples/r2.tmp-{os.getpid()}", 8),
        put(root / "samples/r3", 99),
        put(root / "paper.tmp-final", 99),
        put(home / "artifacts" / "1" / "x.tmp-1", 99),
        put(root / "data", 99),
    ]
    sleeper = subprocess.Popen(["sleep", "60"], cwd=used / "deep")
    try:
        with only_one(resume / "fedcba9876543210.lock", "The stage phase1"):
            found = leftovers(home, root, DAYS)
            assert {one.path for one in found} == set(goes)
            assert found[0].path == goes[0] and found[0].bytes == 4000
            assert all(path.exists() for path in goes), "listing removes nothing"
            # One of them comes into use after it was listed.
            with only_one(resume / "0123456789abcdef.lock", "The stage phase1"):
                assert not remove(found[0], root)
            assert all(remove(one, root) for one in found)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert not any(path.exists() for path in goes)
    assert all(path.exists() for path in stays)
    assert f"{HOST}-over" not in git(root, "worktree", "list")
    assert (root / "README.md").exists()


def test_links_into_the_cache_free_nothing(root: Path) -> None:
    kept = put(root / "kept", 0, 5000)
    tree = put(root / ".djepa/worktrees" / f"{HOST}-a", 8, 100)
    os.link(kept / "deep/file", tree / "linked")
    age(tree, 8)
    (found,) = leftovers(root / ".djepa", root, DAYS)
    assert found.bytes == 100


def version(root: Path, content: str) -> str:
    """Put `out` under DVC with this content; its hash."""
    (root / "out").mkdir(exist_ok=True)
    (root / "out" / "file").write_text(content)
    with Repo(str(root)) as repo:
        repo.add(str(root / "out"))
    text = (root / "out.dvc").read_text()
    return text.split("md5: ")[1].split()[0]


def test_the_cache_keeps_all_that_something_names(root: Path) -> None:
    Repo.init(str(root)).close()
    named = {}

    def commit(content: str, *, message: str) -> None:
        named[content] = version(root, content)
        git(root, "add", "-A")
        git(root, "commit", "-qm", message)

    git(root, "checkout", "-qb", "side")
    commit("an old commit of a branch", message="old")
    commit("the tip of a branch", message="tip")
    git(root, "checkout", "-q", "main")
    commit("a tag", message="tagged")
    git(root, "tag", "v1")
    git(root, "reset", "-q", "--hard", "HEAD~1")
    lost = version(root, "nothing")
    named["a registered model"] = version(root, "a registered model")
    git(root, "add", "-A")
    named["an experiment"] = version(root, "an experiment")
    with Repo(str(root)) as repo:
        repo.experiments.save(name="kept", include_untracked=["out.dvc"])
    tree = root / ".djepa/worktrees" / f"{HOST}-run"
    git(root, "worktree", "add", "-q", "--detach", str(tree), "side")
    (tree / ".dvc/config.local").write_text(f"[cache]\n    dir = {root}/.dvc/cache\n")
    named["a worktree, not committed"] = version(tree, "a worktree, not committed")
    named["the checkout, not committed"] = version(root, "the checkout, not committed")

    def cached(digest: str) -> bool:
        return (root / ".dvc/cache/files/md5" / digest[:2] / digest[2:]).exists()

    registered = [named["a registered model"], "0" * 32 + ".dir"]
    files, size = collect(root, registered, dry=True)
    assert files == 2 and size > 0 and cached(lost), "a listing removes nothing"
    # While an experiment runs, what it has made is named nowhere.
    (root / ".dvc/tmp/exps/tmprunning").mkdir(parents=True)
    sleeper = subprocess.Popen(["sleep", "60"], cwd=root / ".dvc/tmp/exps/tmprunning")
    try:
        with pytest.raises(UserError, match="an experiment is running in"):
            collect(root, registered, dry=False)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert collect(root, registered, dry=False) == (files, size)
    assert not cached(lost)
    assert [what for what, digest in named.items() if not cached(digest)] == []
    # It was the registry's word alone that kept the model.
    assert collect(root, [], dry=True)[0] == 2
    # A cache that others may share is theirs to judge.
    (root / ".dvc/config.local").write_text(f"[cache]\n    dir = {root.parent}/shared\n")
    with pytest.raises(UserError, match="which other checkouts may share"):
        collect(root, registered, dry=False)
