"""What `make serve` finds on a machine, and what it refuses; test_slow_serve.py has it running."""

import logging
import os
import re
import socket
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
import yaml

from components.compose import PARAMS
from components.errors import BUSY, Busy
from components.files import read_yaml
from components.processes import only_one
from flows import deployments, rest, serve
from flows.command import StageFailed
from flows.rest import Server
from tests.conftest import ROOT
from tests.test_slow_flow import free_port


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its own folder of programs."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_one_worker_a_gpu_and_one_for_the_cpu(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = machine / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: GPU-1)'\necho 'GPU 1: B (UUID: GPU-2)'\n")
    tool.chmod(0o755)

    def seen() -> dict[str, list[tuple[str | None, bool]]]:
        return {
            pool: [
                (each.environment.get("CUDA_VISIBLE_DEVICES"), "--limit" in each.command)
                for each in made
            ]
            for pool, made in serve.workers(serve.environment(4200)).items()
        }

    assert seen() == {"cpu": [("", False)], "gpu": [("0", True), ("1", True)]}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert seen() == {"cpu": [("", False)], "gpu": [("3", True)]}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert seen() == {"cpu": [(None, False)], "gpu": [(None, True)]}


def test_a_port_that_is_taken_and_a_folder_without_deployments_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    with socket.socket() as other:
        other.bind((serve.HOST, port))
        other.listen()
        assert serve.main(["--port", str(port)]) == 2
    assert f"Port {port} of 127.0.0.1 is taken" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert serve.main(["--port", str(port)]) == 2
    assert "no prefect.yaml" in capsys.readouterr().err
    (tmp_path / "prefect.yaml").write_text("deployments: [")
    assert serve.main(["--port", str(port)]) == 2
    assert "prefect.yaml is no YAML" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("who", "sent"), [("", None), ("me:se%40cret@", "Basic " + b64encode(b"me:se@cret").decode())]
)
def test_a_server_is_asked_with_the_password_of_its_address(who: str, sent: str | None) -> None:
    heard = []

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append((self.path, self.headers["Authorization"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"true")

    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        address = f"http://{who}127.0.0.1:{server.server_port}/api"
        assert Server(address).ask("health") is True
    assert heard == [("/api/health", sent)]
    assert Server(address).ask("health") is None, "it is away now"


def test_a_server_whose_database_is_locked_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "AGAIN", (0.01, 0.01))
    codes, heard = [503, 503, 200, 503, 503, 503, 404], []

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(codes[len(heard) - 1])
            self.end_headers()
            self.wfile.write(b'{"id": "run"}')

    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asked = Server(f"http://127.0.0.1:{server.server_port}/api")
        assert asked.ask("create", {"name": "x"}) == {"id": "run"}
        assert len(heard) == 3 and set(heard) == {b'{"name": "x"}'}
        assert asked.ask("create", {}) is None and len(heard) == 6, "it gives up in the end"
        assert asked.ask("create", {}) is None and len(heard) == 7, "what is not there stays away"
        server.shutdown()


@pytest.mark.parametrize("body", [b'{"id": "ru', b"<html>"])
def test_a_server_that_ends_in_the_middle_of_its_answer_gives_none(body: bytes) -> None:
    """`make serve` itself asks: an error there would end it, and with it all runs."""

    class Ending(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "100" if body.startswith(b"{") else str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with HTTPServer(("127.0.0.1", 0), Ending) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asked = Server(f"http://127.0.0.1:{server.server_port}/api")
        assert asked.ask("health") is None
        assert asked.end("run", "CRASHED", "gone") is False, "it has still to be said"
        server.shutdown()


@pytest.mark.parametrize(
    ("found", "told"), [("PAUSED", True), ("RUNNING", True), ("FAILED", False), (None, False)]
)
def test_a_run_whose_process_is_gone_is_over_in_whatever_state_it_was(
    monkeypatch: pytest.MonkeyPatch, found: str | None, told: bool
) -> None:
    asked: dict[str, Any] = {}

    def ask(self: Server, path: str, body: Any = None, method: str | None = None) -> Any:
        asked[path] = body
        return [{"state_type": found}] if found else []

    monkeypatch.setattr(Server, "ask", ask)
    assert Server("http://127.0.0.1:1/api").end("7", "CRASHED", "gone")
    state = asked.get("flow_runs/7/set_state")
    assert (state["state"]["type"] == "CRASHED") if told else state is None


def test_a_locked_database_is_not_taken_for_a_run_that_nobody_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server is well by its own account then: it looks into no database for that."""

    def ask(self: Server, path: str, body: Any = None, method: str | None = None) -> Any:
        return True if path == "health" else None

    monkeypatch.setattr(Server, "ask", ask)
    assert Server("http://127.0.0.1:1/api").end("7", "CRASHED", "gone") is False


def test_a_stage_that_another_process_runs_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from prefect.logging import disable_run_logger

    from flows import pipeline

    codes = [BUSY, BUSY]
    params = read_yaml(PARAMS)
    params["feedback"]["rounds"]["my-round"] = params["feedback"]["rounds"]["r1"]

    def run(name: str, command: list[str], heard: Callable[[str], None]) -> None:
        # A second flow does not begin before DVC has kept this one's result.
        (lock,) = (tmp_path / "resume").glob("*.dvc")
        with pytest.raises(Busy), only_one(lock, name):
            pass
        if codes:
            raise StageFailed(name, codes.pop(), "another process runs it")

    monkeypatch.setenv("DJEPA_HOME", str(tmp_path))
    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(pipeline, "AGAIN", 0)
    with disable_run_logger():
        pipeline.stage.fn("evaluate-phase1")
        assert codes == []
        monkeypatch.setattr(pipeline, "read_yaml", lambda path: params)
        pipeline.stage.fn("phase2@my-round")  # a dash of the user's own
        codes = [2]
        with pytest.raises(StageFailed):
            pipeline.stage.fn("evaluate@r1")
    assert not list((tmp_path / "resume").glob("*.dvc"))


@pytest.mark.parametrize("name", ["r1", "My_other-round2"])
def test_prefect_takes_the_key_that_a_rounds_progress_is_shown_as(name: str) -> None:
    from prefect.client.schemas.actions import ArtifactCreate

    from flows.people import shown_as

    assert ArtifactCreate(key=shown_as(name)).key == f"labels-{name}".lower().replace("_", "-")


def test_the_link_to_a_flow_run_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.process import _environment

    run = "00000000-0000-0000-0000-000000000007"
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", run)
    with temporary_settings({PREFECT_API_URL: "http://me:secret@there:4200/api"}):
        made = _environment()
    assert made["DJEPA_FLOW_RUN"] == run
    assert re.fullmatch(f"http://there:4200/.*/{run}", made["DJEPA_FLOW_LINK"])


def test_the_form_of_each_deployment_knows_types_and_bounds() -> None:
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.callables import parameter_schema

    bounds = {}
    for entry in yaml.safe_load((ROOT / deployments.FILE).read_text())["deployments"]:
        # As `prefect deploy` does.
        shown = parameter_schema(load_flow_from_entrypoint(entry["entrypoint"])).properties
        assert all({"type", "anyOf"} & set(each) for each in shown.values()), entry["name"]
        for name, each in shown.items():
            least = [kind["minimum"] for kind in each.get("anyOf", [each]) if "minimum" in kind]
            bounds |= {f"{entry['name']}.{name}": least[0]} if least else {}
    assert bounds == {
        "nightly.workers": 1,
        "registered.pictures": 1,
        "registered.seed": 0,
        "table-4.seeds": 1,
        "table-4.at_once": 1,
        "table-4.hours": 0,
        "tidy.days": 0,
    }


def test_the_wait_lasts_until_dvc_has_kept_the_result() -> None:
    from flows.process import wait_for_other

    stage = "import time; time.sleep(0.5)"
    dvc = (
        "import subprocess, sys, time\n"
        f"stage = subprocess.Popen([sys.executable, '-c', {stage!r}])\n"
        "print(stage.pid, flush=True); stage.wait(); time.sleep(1)"
    )
    with subprocess.Popen([sys.executable, "-c", dvc, "dvc"], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        pid = int(other.stdout.readline())
        wait_for_other(f"The stage phase1 is being run by process {pid} in /here: wait for it")
        assert other.poll() is not None
    wait_for_other("The stage phase1 is being run by another process")


def test_what_a_killed_guard_leaves_ends_before_it_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = serve.Process("server", ["sleep", "60"], dict(os.environ))
    kept.start()
    guard, stop = psutil.Process(kept.running.pid), threading.Event()
    while not guard.children():
        kept.running.poll()
    (below,) = guard.children()
    guard.kill()
    kept.running.wait()
    monkeypatch.setattr(serve, "REST", 0)
    monkeypatch.setattr(serve, "give_up", lambda server: None)
    monkeypatch.setattr(kept, "start", stop.set)
    serve._keep([kept], Server("http://127.0.0.1:1/api"), stop)
    try:
        psutil.wait_procs([below], 10)
        assert not below.is_running()
    finally:
        with suppress(psutil.NoSuchProcess):
            below.kill()


def test_a_command_that_starts_as_all_are_stopped_is_stopped_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flows import process

    start = subprocess.Popen

    def late(*command: Any, **options: Any) -> Any:
        process.stop_all()
        return start(*command, **options)

    monkeypatch.setattr(process, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(process, "_stopping", threading.Event())
    monkeypatch.setattr(process.subprocess, "Popen", late)
    with pytest.raises(StageFailed, match="is being stopped"):
        process.run("sleep", ["sleep", "20"])


def test_people_are_waited_for_though_a_request_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from httpx import ReadTimeout

    from flows import people

    class Labels:
        references, least, given = Path("references/r1"), 2, 0

        def done(self) -> int:
            self.given += 1
            return self.given

    asked: list[str] = []

    def failing(*words: Any) -> None:
        asked.append("shown")
        raise ReadTimeout("the database is locked")

    def resume(run: Any) -> None:
        asked.append("resume")
        if asked.count("resume") == 1:
            raise ReadTimeout("the database is locked")
        watch.ended.set()

    shown = uuid4()
    monkeypatch.setattr(people, "create_progress_artifact", lambda *words: shown)
    monkeypatch.setattr(people, "update_progress_artifact", failing)
    monkeypatch.setattr(people, "resume_flow_run", resume)
    monkeypatch.setattr(people.flow_run, "get_id", lambda: str(shown))
    watch = people._Watch(Labels(), "words", 60, 0.01)  # type: ignore[arg-type]
    watch.start()
    watch.join(20)
    assert not watch.is_alive() and asked == ["shown", "shown", "resume", "resume"]
    assert watch.end() is False, "nothing went wrong that the run has to end for"
