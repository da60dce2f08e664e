"""Shared fixtures: a checkout in a temporary folder, and the graph run in one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
Answer = subprocess.CompletedProcess[str]
# Of every browser that a test starts; without the last three it asks the network for its own ends.
CHROMIUM = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update",
            "--disable-sync")  # fmt: skip


@dataclass
class Checkout:
    """A clone with its own DJEPA_HOME and Prefect home; commands run in it as a user's would."""

    root: Path
    environment: dict[str, str]

    def call(self, *command: str, timeout: float = 1200, **extra: str) -> Answer:
        return subprocess.run(
            command,
            cwd=self.root,
            env=self.environment | extra,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def ok(self, *command: str, timeout: float = 1200) -> str:
        answer = self.call(*command, timeout=timeout)
        assert answer.returncode == 0, f"{command}:\n{answer.stdout}\n{answer.stderr}"
        return answer.stdout

    def djepa(self, *arguments: str) -> str:
        return self.ok(sys.executable, "-m", "components.cli", *arguments)

    def dvc(self, *arguments: str) -> str:
        return self.ok(sys.executable, "-m", "dvc", *arguments)


def make_checkout(root: Path) -> Checkout:
    """Copy what git would take (tracked and untracked, not ignored) and commit it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    environment = dict(os.environ)
    for name in ("MLFLOW_TRACKING_URI", "DJEPA_PARENT_RUN", "DJEPA_FLOW_RUN", "PREFECT_API_URL"):
        environment.pop(name, None)
    environment |= {
        "DJEPA_HOME": str(root / ".djepa"),
        "PREFECT_HOME": str(root / ".djepa" / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
        "GIT_AUTHOR_NAME": "test",
        "GIT_AUTHOR_EMAIL": "test@example.org",
        "GIT_COMMITTER_NAME": "test",
        "GIT_COMMITTER_EMAIL": "test@example.org",
    }
    (root / ".djepa" / "prefect").mkdir(parents=True)
    checkout = Checkout(root, environment)
    checkout.ok("git", "init", "-q", "-b", "main")
    checkout.ok("git", "add", "-A")
    checkout.ok("git", "commit", "-qm", "the tree under test")
    return checkout


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A fresh checkout, nothing run in it."""
    return make_checkout(tmp_path)


@pytest.fixture(scope="session")
def encoded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny curated set, encoded; for reading only."""
    from components.tokens.encode import encode
    from components.tracking import Tracker
    from tests.tiny_curated import tiny_params, write_curated

    folder, params = tmp_path_factory.mktemp("encoded"), tiny_params()
    # 72x54 loses 11 % to 24x16; it may.
    params["model"]["encode"]["most_cropped"] = 0.12
    curated = write_curated(folder / "curated")
    encode(curated, folder / "encoded", folder / "encode.json", params, Tracker())
    return folder / "encoded"


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """A checkout in which `python -m flows.pipeline` has run the whole graph at scale micro."""
    made = make_checkout(tmp_path_factory.mktemp("micro"))
    made.djepa("compose", "scale=micro")
    answer = made.call(sys.executable, "-m", "flows.pipeline")
    (made.root / "pipeline.log").write_text(answer.stdout + answer.stderr)
    assert answer.returncode == 0, f"{answer.stdout}\n{answer.stderr}"
    yield made


@pytest.fixture(scope="session")
def undisturbed(micro: Checkout, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the weights that `longer_training` gives when nothing disturbs it."""
    from tests.test_graph import copy
    from tests.test_slow_flow import longer_training, trained

    checkout = copy(micro, tmp_path_factory.mktemp("undisturbed") / "checkout")
    longer_training(checkout)
    checkout.dvc("repro", "--single-item", "phase1")
    return trained(checkout)
