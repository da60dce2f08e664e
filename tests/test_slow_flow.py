"""Kills, servers and the browser: what happens when things are stopped, and what people see."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml

from tests.conftest import CHROMIUM, Checkout
from tests.test_graph import copy

pytestmark = pytest.mark.slow


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def processes_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@contextmanager
def started(checkout: Checkout, *command: str, **extra: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, its output in a file, killed at the end."""
    with (checkout.root / "started.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=checkout.root,
            env=checkout.environment | extra,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def longer_training(checkout: Checkout) -> None:
    """Another seed, so that phase 1 runs again, and long enough to be stopped in the middle."""
    checkout.djepa("compose", "scale=micro", "seed=1", "training.phase1.images=2500")
    checkout.dvc("repro", "encode")


def trained(checkout: Checkout) -> str:
    """The hash of the weights of phase 1 in dvc.lock."""
    lock = yaml.safe_load((checkout.root / "dvc.lock").read_text())
    (model,) = (o for o in lock["stages"]["phase1"]["outs"] if o["path"] == "models/phase1")
    return model["md5"]


def snapshots(checkout: Checkout) -> list[Path]:
    return list((checkout.root / ".djepa" / "resume").glob("*/**/state.json"))


def test_training_killed_at_any_moment_resumes_to_the_same_weights(
    micro: Checkout, undisturbed: str, tmp_path: Path
) -> None:
    killed = copy(micro, tmp_path / "killed")
    longer_training(killed)
    repro = (sys.executable, "-m", "dvc", "repro", "--single-item", "phase1")
    with started(killed, *repro):
        wait_for("a snapshot", lambda: bool(snapshots(killed)))
    killed.ok(*repro)
    assert trained(killed) == undisturbed
    assert not snapshots(killed)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            return page.status == 200
    except (urllib.error.URLError, OSError):
        return False


def rendered(url: str, folder: Path) -> str:
    """The page's text after its scripts ran, from a real browser."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    assert browser, "install Debian's package chromium"
    answer = subprocess.run(
        [
            browser,
            *CHROMIUM,
            f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=30000",
            "--dump-dom",
            url,
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    return answer.stdout


def test_mlflow_page_shows_the_pipeline_and_its_stages(micro: Checkout, tmp_path: Path) -> None:
    port = free_port()
    command = (sys.executable, "-m", "components.cli", "ui", "--port", str(port))
    with started(micro, *command):
        address = f"http://127.0.0.1:{port}"
        wait_for("the MLflow server", lambda: answers(f"{address}/health"))
        said = (micro.root / "started.log").read_text()
        address = re.search(r"^MLflow: (http\S+) \(micro, one row a run\)", said, re.M)[1]
        page = rendered(address, tmp_path)
    # MLflow's page understood the view: its columns, the run, the experiment's note.
    for shown in ("geneval.overall", "geneval.chance", "micro seed 0", "to compare with one"):
        assert shown in page
    assert "evaluate@phase1" not in page, "stages are below the runs that are compared"


def test_offline_report_renders(micro: Checkout, tmp_path: Path) -> None:
    page = rendered((micro.root / "reports/run/report.html").as_uri(), tmp_path)
    assert "single_object" in page
