"""What killed runs, old experiments and superseded results leave on the disk, and its removal.

Only below DJEPA_HOME, in .dvc and under temporary names of this project (`NAME.tmp-…`). What a
process works in or holds, and what was touched within the days asked for, stays.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from components.errors import Busy, UserError
from components.files import remove_folder
from components.processes import occupied, only_one

DAY = 86400  # seconds
# Of a name in DJEPA_HOME/resume, and of one whose removal was cut off.
SNAPSHOT = re.compile(r"[0-9a-f]{16}(\.old\.tmp-\d+)?")
# Of a file or folder that was being written: by a process, by a curation, by the contract.
TEMPORARY = re.compile(r".+\.tmp-(?P<by>\d+|[0-9a-f]{16}|tables)")
# Not looked into: others' folders, and those that have a rule of their own.
CLOSED = (".git", ".venv", ".dvc", "worktrees", "resume", "artifacts", "prefect")
EXPERIMENTS = (".dvc/tmp/exps", ".dvc/tmp/exps/standalone")
REMOVING = re.compile(r"Removing (/.+)")  # what `dvc gc --dry` says of a file


@dataclass(frozen=True)
class Leftover:
    """Something that can go: `bytes` are those that it alone holds on the disk."""

    kind: str  # snapshot | worktree | experiment | temporary
    path: Path
    bytes: int
    days: float  # since anything in it was touched


def leftovers(home: Path, root: Path, days: float) -> list[Leftover]:
    """What nobody uses and nobody touched for so many days, the largest first.

    home: DJEPA_HOME. root: the main checkout.
    """
    places = occupied()
    found = []
    for kind, path in (*_snapshots(home), *_copies(home, root), *_temporary(home, root)):
        size, touched = _measure(path)
        age = (time.time() - touched) / DAY
        if age >= days and not _in_use(kind, path, places):
            found.append(Leftover(kind, path, size, age))
    return sorted(found, key=lambda one: (-one.bytes, str(one.path)))


def remove(one: Leftover, root: Path) -> bool:
    """Remove a leftover; False where somebody has begun to use it since, or it cannot be removed.

    root: the main checkout.
    """
    if _in_use(one.kind, one.path, occupied()):
        return False
    if one.kind == "snapshot":
        try:
            with only_one(_lock(one.path), f"The clean-up of {one.path}"):
                remove_folder(one.path)  # a stage that finds one goes on from it
        except Busy:
            return False
    elif one.kind == "worktree":
        known = _git(root, "worktree", "list", "--porcelain").splitlines()
        if f"worktree {one.path}" in known:  # one that somebody locked is refused by git
            _git(root, "worktree", "remove", "--force", str(one.path))
        else:
            shutil.rmtree(one.path, ignore_errors=True)
    elif one.path.is_dir() and not one.path.is_symlink():
        shutil.rmtree(one.path, ignore_errors=True)
    else:
        one.path.unlink(missing_ok=True)
    return not one.path.exists()


def _snapshots(home: Path) -> Iterator[tuple[str, Path]]:
    """Of stages that were stopped and never gone on with."""
    for path in (home / "resume").glob("*"):
        if path.is_dir() and SNAPSHOT.fullmatch(path.name):
            yield "snapshot", path


def _copies(home: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """Worktrees of this machine's scheduled runs, copies in which DVC ran experiments."""
    for path in (home / "worktrees").glob(f"{socket.gethostname()}-*"):
        if path.is_dir():
            yield "worktree", path
    for folder in EXPERIMENTS:
        for path in (root / folder).glob("tmp*"):
            if path.is_dir():
                yield "experiment", path


def _temporary(home: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """What was being written when its process was killed, ours and in DVC's cache."""
    for path in (root / ".dvc" / "cache").rglob(".*.tmp"):
        yield "temporary", path
    for top in dict.fromkeys((home, root)):
        for folder, folders, files in os.walk(top):
            here = Path(folder)
            for name in (*folders, *files):
                if TEMPORARY.fullmatch(name):
                    yield "temporary", here / name
            folders[:] = [
                name
                for name in folders
                if name not in CLOSED and not TEMPORARY.fullmatch(name) and here / name != home
            ]


def _measure(path: Path) -> tuple[int, float]:
    """Bytes on the disk that go with it, and when anything in it was last touched.

    A file with another name elsewhere (a link into DVC's cache) frees nothing.
    """
    size, touched = 0, path.lstat().st_mtime
    inside = (
        os.path.join(folder, name)
        for folder, folders, files in os.walk(path)
        for name in (*folders, *files)
    )
    for each in (str(path), *inside):
        try:
            state = os.lstat(each)
        except OSError:  # gone meanwhile
            continue
        touched = max(touched, state.st_mtime)
        if state.st_nlink == 1:
            size += state.st_size
    return size, touched


def _in_use(kind: str, path: Path, places: set[Path]) -> bool:
    if any(place.is_relative_to(path) for place in places):
        return True
    if kind == "snapshot":
        try:
            with only_one(_lock(path), "A look"):
                return False
        except Busy:
            return True
    writer = TEMPORARY.fullmatch(path.name) if kind == "temporary" else None
    return writer is not None and writer["by"].isdigit() and psutil.pid_exists(int(writer["by"]))


def _lock(snapshot: Path) -> Path:
    """What a stage holds as long as it runs (components/stages.py)."""
    return snapshot.with_name(f"{snapshot.name}.lock")


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
    ).stdout


def collect(root: Path, registered: Sequence[str], dry: bool) -> tuple[int, int]:
    """Remove from DVC's cache what nothing names; returns the number of files and their bytes.

    What stays: all that a commit on any branch or tag, an experiment, the checkout or one of its
    worktrees names, committed or not, and the registered models. What goes is made again by the
    stage where it is wanted again: of DVC's run cache only the bytes go, so that it finds nothing.

    Args:
        root: the main checkout.
        registered: DVC hashes of registered models.
        dry: only say what would go.

    Raises:
        UserError: an experiment is running, the cache is not the checkout's own, or DVC refuses.
    """
    copies = [path for kind, path in _copies(root, root) if kind == "experiment"]
    places = occupied()
    running = [path for path in copies if _in_use("experiment", path, places)]
    if running:
        raise UserError(
            f"DVC's cache is left as it is: an experiment is running in {running[0]}, and what it "
            f"has made is named nowhere yet; clean up when it is done."
        )
    cache = root / ".dvc" / "cache"
    if (asked := _cache_folder(root)) != cache:
        raise UserError(
            f"DVC's cache is left as it is: it lies in {asked}, which other checkouts may share; "
            f"run `dvc gc` with --projects and all of their folders yourself."
        )
    listed = _git(root, "worktree", "list", "--porcelain").splitlines()
    trees = [Path(line.removeprefix("worktree ")) for line in listed if line.startswith("worktree")]
    others = [str(tree) for tree in trees if tree != root and (tree / ".dvc").is_dir()]
    with tempfile.TemporaryDirectory() as folder:
        kept = _project(Path(folder), cache, registered)
        command = ["--wait-for-lock", "gc", "--force"]
        # --all-commits and not --all-branches: that keeps the last commit of a branch alone.
        command += ["--workspace", "--all-commits", "--all-experiments"]
        said = _dvc(root, *command, "--dry", "--projects", kept, *others)
        files = [Path(line[1]) for line in map(REMOVING.fullmatch, said.splitlines()) if line]
        size = sum(file.stat().st_size for file in files if file.exists())
        if files and not dry:
            _dvc(root, *command, "--projects", kept, *others)
    return len(files), size


def _cache_folder(root: Path) -> Path:
    said = _dvc(root, "cache", "dir")
    return (root / said.strip()).resolve()


def _project(folder: Path, cache: Path, registered: Sequence[str]) -> str:
    """A DVC project that names these hashes: `dvc gc` keeps what its --projects name."""
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text(f"[cache]\n    dir = {cache}\n")
    for number, digest in enumerate(registered):
        if (cache / "files" / "md5" / digest[:2] / digest[2:]).exists():
            text = f"outs:\n- md5: {digest}\n  hash: md5\n  path: kept-{number}\n"
            (folder / f"kept-{number}.dvc").write_text(text)
    _git(folder, "init", "--quiet")
    return str(folder)


def _dvc(root: Path, *arguments: str) -> str:
    """What DVC prints. UserError with its last words where it fails."""
    answer = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=root, capture_output=True, text=True
    )
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"DVC could not look through its cache in {root} ({last}): mend that, then clean up "
            f"again; `dvc gc --dry --workspace --all-commits` says more."
        )
    return answer.stdout
