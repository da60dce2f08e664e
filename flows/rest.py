"""What is asked of a Prefect server without importing Prefect, which takes a second and 80 MB."""

import json
import time
import urllib.error
import urllib.request
from base64 import b64encode
from http import HTTPStatus
from http.client import HTTPException
from typing import Any
from urllib.parse import unquote, urlsplit

from components.errors import without_password

# Seconds before asking again a server whose SQLite was locked: it answers 503 and has done nothing.
# A run that is created or a state that is set while a worker writes meets that now and then.
AGAIN = (0.25, 0.5, 1.0, 2.0, 4.0)


class Server:
    """A Prefect server at the address `api`, as PREFECT_API_URL has it: //NAME:PASSWORD@ too."""

    def __init__(self, api: str) -> None:
        self.api, self.headers = without_password(api), {"Content-Type": "application/json"}
        who = urlsplit(api).netloc.rpartition("@")[0]
        if who:  # urllib takes it for a part of the host
            self.headers["Authorization"] = f"Basic {b64encode(unquote(who).encode()).decode()}"

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """The answer to a GET, or with a `body` to a POST or `method`; None where there is none."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.api}/{path}", data, self.headers, method=method)
        for pause in (*AGAIN, None):
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    return json.loads(answer.read() or "null")
            except urllib.error.HTTPError as error:
                if error.code != HTTPStatus.SERVICE_UNAVAILABLE or pause is None:
                    return None
                time.sleep(pause)
            # URLError is an OSError. The others: a server that ended in the middle of its answer.
            except (OSError, HTTPException, ValueError):
                return None

    def end(self, run: str, kind: str, message: str) -> bool:
        """Say of a flow run how it ended (`FAILED`, `CRASHED`), if nobody has said it.

        False where the server is away: it has still to be said.
        """
        # Not by its address: an answer that failed would look like a run that is not known there.
        found = self.ask("flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        if found is None:
            return False
        # Who resumes a paused run on its page has it running for ever, too.
        if found and found[0]["state_type"] in ("PENDING", "RUNNING", "PAUSED", "CANCELLING"):
            state = {"type": kind, "name": kind.capitalize(), "message": message}
            path = f"flow_runs/{run}/set_state"
            return self.ask(path, {"state": state, "force": True}) is not None
        return True  # a run it does not know is over
