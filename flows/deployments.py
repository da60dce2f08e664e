"""Deploys prefect.yaml to a Prefect server, and leaves switched off what somebody switched off."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.errors import UserError
from components.files import read_json, write_json
from components.home import djepa_home
from flows.rest import Server

FILE = Path("prefect.yaml")
OFF = "switched-off.json"  # in DJEPA_HOME: schedules to switch off again; see `deploy`


def deploy(environment: Mapping[str, str], server: Server) -> None:
    """Deploy prefect.yaml; a schedule that somebody switched off on its page stays off.

    Raises UserError with Prefect's last words where that fails.
    """
    # Deploying switches all on. Kept in a file until they are off again: who is killed in between
    # leaves it to the next `make serve`.
    note = djepa_home() / OFF
    off = {key for key, schedule in _schedules(server) if not schedule["active"]}
    if note.exists():
        off |= {(deployment, slug) for deployment, slug in read_json(note)}
    write_json(note, list(off))
    answer = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        env=dict(environment),
        capture_output=True,
        text=True,
    )
    if answer.returncode:
        lines = [line.strip(" │\t") for line in (answer.stdout + answer.stderr).splitlines()]
        last = [line for line in lines if line][-1:]
        raise UserError(
            f"Prefect could not deploy {FILE} ({''.join(last) or 'no reason given'}): mend it and "
            f"run `make serve` again."
        )

    def on_again() -> list[tuple[tuple[str, str], dict[str, Any]]]:
        return [(key, each) for key, each in _schedules(server) if key in off and each["active"]]

    for key, schedule in on_again():
        path = f"deployments/{key[0]}/schedules/{schedule['id']}"
        server.ask(path, {"active": False}, "PATCH")  # answers with nothing, done or not
        print(f"The schedule {schedule['slug']} is off, as before", flush=True)
    if on_again():
        raise UserError(
            "The Prefect server did not switch off again all schedules that were off: run `make "
            "serve` again."
        )
    note.unlink()


def _schedules(server: Server) -> list[tuple[tuple[str, str], dict[str, Any]]]:
    """Of all deployments: (the deployment's id, the schedule's name), the schedule."""
    found = server.ask("deployments/filter", {})
    if found is None:
        raise UserError(
            "The Prefect server did not say which schedules are switched off: run `make serve` "
            "again."
        )
    return [((entry["id"], each["slug"]), each) for entry in found for each in entry["schedules"]]
