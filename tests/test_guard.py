"""Commands under guard: they end as they would without, and with whoever started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.guard import guarded

ROOT = Path(__file__).parents[1]
# A stage below its dvc: it takes its time after the signal, to write a snapshot.
STAGE = """
import signal, sys, time
def stop(*_):
    time.sleep(0.5)
    open(sys.argv[1], "w").write("snapshot")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
open(sys.argv[1] + ".up", "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("command", "code"),
    [("raise SystemExit(75)", 75), ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM)],
)
def test_a_command_ends_as_it_would_alone(command: str, code: int) -> None:
    line = guarded([sys.executable, "-c", command])
    assert subprocess.run(line, cwd=ROOT).returncode == code


def test_a_command_ends_with_who_started_it_and_what_it_started_may_finish(tmp_path: Path) -> None:
    note = tmp_path / "note"
    dvc = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {STAGE!r}, {str(note)!r}])"
    )
    flow = (
        "import subprocess, sys, time; from flows.guard import guarded\n"
        f"subprocess.Popen(guarded([sys.executable, '-c', {dvc!r}]), start_new_session=True)\n"
        "time.sleep(60)"
    )
    started = subprocess.Popen([sys.executable, "-c", flow], cwd=ROOT)
    while not note.with_name("note.up").exists():
        time.sleep(0.05)
    below = psutil.Process(started.pid).children(recursive=True)
    assert len(below) == 3  # guard, dvc, stage
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    gone, alive = psutil.wait_procs(below, 10)
    assert not alive and len(gone) == 3
    assert note.read_text() == "snapshot"
