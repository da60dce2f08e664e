"""Schedules that are switched off, whatever happens while prefect.yaml is deployed."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from components.errors import UserError
from flows import deployments
from flows.rest import Server


class Kill(BaseException):
    """Stands for a signal: nothing in the program catches it."""


class Schedules(Server):
    """A server with one deployment, whose schedule each deploying switches on."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1/api")
        self.active, self.away = False, False

    def deploy(self, *command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        self.active = True
        return subprocess.CompletedProcess([], 0, "", "")

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        if method == "PATCH":
            self.active = self.active and self.away
            return None  # as Prefect: No Content
        schedule = {"id": "1", "slug": "nightly", "active": self.active}
        return [{"id": "d", "schedules": [schedule]}]


@pytest.fixture
def schedules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Schedules:
    made = Schedules()
    monkeypatch.setenv("DJEPA_HOME", str(tmp_path))
    monkeypatch.setattr(deployments.subprocess, "run", made.deploy)
    return made


def test_a_schedule_that_is_off_stays_off_though_deploying_was_killed(
    monkeypatch: pytest.MonkeyPatch, schedules: Schedules
) -> None:
    def killed(*command: Any, **options: Any) -> None:
        schedules.deploy()
        raise Kill

    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(deployments.subprocess, "run", killed)
        deployments.deploy({}, schedules)
    assert schedules.active
    deployments.deploy({}, schedules)
    assert not schedules.active
    schedules.active = True  # by its user
    deployments.deploy({}, schedules)
    assert schedules.active


def test_a_server_that_fails_to_switch_a_schedule_off_is_said(schedules: Schedules) -> None:
    schedules.away = True
    with pytest.raises(UserError, match="did not switch off again"):
        deployments.deploy({}, schedules)
    schedules.away = False
    deployments.deploy({}, schedules)
    assert not schedules.active


def test_a_server_that_does_not_say_what_is_off_is_not_deployed_to(
    monkeypatch: pytest.MonkeyPatch, schedules: Schedules
) -> None:
    monkeypatch.setattr(Schedules, "ask", lambda *words: None)
    with pytest.raises(UserError, match="did not say which schedules"):
        deployments.deploy({}, schedules)
    assert not schedules.active
