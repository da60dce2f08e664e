"""Folders are whole or absent under their names, whenever a process is killed."""

import signal
import subprocess
import sys
from pathlib import Path

from components.files import atomic_folder, remove_folder
from components.training.checkpoint import Snapshots
from tests.conftest import ROOT

# Dies as soon as the first file of a folder is removed.
DYING = """
import os, signal, sys
from pathlib import Path
remove = os.unlink
def last(*names, **places):
    remove(*names, **places)
    os.kill(os.getpid(), signal.SIGKILL)
os.unlink = last
path = Path(sys.argv[1])
"""
REPLACE = """
from components.files import atomic_folder
with atomic_folder(path) as new:
    for name in "abc":
        (new / name).write_text("new")
"""
REMOVE = "from components.files import remove_folder; remove_folder(path)"
CLEAR = "from components.training.checkpoint import Snapshots; Snapshots(path.parent).clear()"


def killed(code: str, path: Path) -> None:
    path.mkdir(parents=True)
    for name in "abc":
        (path / name).write_text("old")
    command = [sys.executable, "-c", DYING + code, str(path)]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL


def test_a_folder_is_whole_when_its_replacement_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    killed(REPLACE, path)
    assert sorted(file.name for file in path.iterdir()) == ["a", "b", "c"]
    assert {file.read_text() for file in path.iterdir()} == {"new"}
    with atomic_folder(path) as folder:
        (folder / "d").touch()
    assert [file.name for file in path.iterdir()] == ["d"]


def test_a_folder_is_gone_when_its_removal_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    killed(REMOVE, path)
    assert not path.exists()
    remove_folder(path)  # again, and nothing is there


def test_a_stage_killed_as_it_ends_finds_no_half_of_a_snapshot(tmp_path: Path) -> None:
    killed(CLEAR, tmp_path / "0123456789abcdef" / "step-7")
    assert Snapshots(tmp_path / "0123456789abcdef").newest() is None
