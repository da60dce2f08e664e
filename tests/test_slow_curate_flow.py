"""Curation on Prefect's task runners: local processes and a real Ray give one process's bytes."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from components.compose import defaults
from components.curation.curate import curate
from components.errors import UserError
from components.tracking import Tracker
from flows.curate import spread_on
from tests.conftest import ROOT
from tests.test_curation import digest, raw

pytestmark = pytest.mark.slow
OVERRIDES = [
    "curation.resolution.shorter_side=96",
    "curation.sharpness.ratio=0.25",
    "curation.notions.least=1",
    "curation.contract.rows=4",
    "curation.contract.tail=1",
    "curation.contract.required=[]",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return raw(tmp_path_factory.mktemp("flow") / "data", shards=5)


@pytest.fixture(scope="module")
def wanted(data: Path) -> dict[str, str]:
    """The bytes that one process makes, without a flow."""
    params = defaults(OVERRIDES)
    params["curation"]["workers"] = 1
    curate(data, data.parent / "one", params, Tracker())
    return digest(data.parent / "one")


def flow(
    data: Path, out: Path, *more: str, watch: Callable[[list[psutil.Process]], None]
) -> tuple[int, str]:
    """Run the flow's command, showing `watch` its processes; returns exit code and output."""
    # The workers' Python is to find this checkout, not the one that is installed.
    extra = {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(out.parent / "prefect")}
    log = out.with_suffix(".log")
    with log.open("wb") as file:
        process = psutil.Popen(
            [sys.executable, "-m", "flows.curate", data, out, *OVERRIDES, *more],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"} | extra,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            with suppress(psutil.Error):
                watch(process.children(recursive=True))
            time.sleep(0.5)
    return process.returncode, log.read_text()


def result(out: Path) -> dict[str, str]:
    """Digest of the curated set; the contract's pages say when it was checked."""
    return {name: sha for name, sha in digest(out).items() if not name.startswith("contract")}


def test_ray_gives_the_bytes_of_one_process(
    data: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    heard: set[str] = set()
    names: set[str] = set()

    def watch(children: list[psutil.Process]) -> None:
        for child in children:
            with suppress(psutil.Error):
                names.add(child.name())
                found = child.net_connections("inet")
                heard.update(c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN)

    code, log = flow(data, tmp_path / "out", "--workers=2", "--engine=ray", watch=watch)
    assert code == 0, log
    assert result(tmp_path / "out") == wanted
    assert "raylet" in names and {ip.removeprefix("::ffff:") for ip in heard} == {"127.0.0.1"}
    with closing(sqlite3.connect(tmp_path / "prefect" / "prefect.db")) as database:
        runs = {name for (name,) in database.execute("select name from task_run")}
        pages = database.execute("select data from artifact where key = 'curation'").fetchall()
    assert {f"{name} 0000{i}" for name in ("scan", "judge", "pack") for i in range(5)} <= runs
    assert [json.loads(page) for (page,) in pages] == [(tmp_path / "out/report.md").read_text()]


def test_a_worker_that_is_killed_is_replaced(
    data: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    killed: list[int] = []

    def watch(children: list[psutil.Process]) -> None:
        for child in children:
            if not killed and any("spawn_main" in part for part in child.cmdline()):
                child.kill()
                killed.append(child.pid)

    code, log = flow(data, tmp_path / "out", "--workers=2", watch=watch)
    assert code == 0 and killed, log
    assert result(tmp_path / "out") == wanted


@pytest.mark.parametrize(
    ("engine", "address", "words"),
    [
        ("spark", None, "There is no engine 'spark': choose processes or ray"),
        ("processes", "ray://host:10001", "choose --engine ray"),
        ("ray", "ray://host:10001", "set PREFECT_API_URL"),
    ],
)
def test_engines_that_do_not_fit_are_named(
    engine: str, address: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(UserError, match=words), spread_on(engine, address, 1):
        pass


def test_the_command_names_a_bad_parameter(data: Path, tmp_path: Path) -> None:
    code, log = flow(data, tmp_path / "out", "--workers=0", watch=lambda _: None)
    assert code == 2 and "curate: curation.workers is 0" in log and "Traceback" not in log
