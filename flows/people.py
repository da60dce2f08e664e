"""A flow run that waits for people: paused until enough pictures are labelled, or for too long."""

import re
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import UUID

from httpx import HTTPError  # what Prefect's client raises
from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import NotPausedError
from prefect.flow_runs import pause_flow_run, resume_flow_run
from prefect.runtime import flow_run

from components.rating.waiting import Labelling

SLACK = 3600  # seconds that Prefect's own limit of a pause lies beyond ours


def wait_for_labels(round_name: str, file: Path, people: dict[str, Any]) -> None:
    """Pause this flow run until people labelled `references/ROUND`, then write `file`.

    `people` is feedback.people: `least` pictures, `hours` to wait at most, `every` so many
    seconds a look. After the time-out, `file` has the critic use the automatic labels. Who
    presses Resume on Prefect's page goes on with the labels given so far.
    """
    log = get_run_logger()
    labelling = Labelling(Path("references") / round_name, file, int(people["least"]))
    hours, done = float(people["hours"]), labelling.done()
    over = False
    if done < labelling.least:
        how = f"`{labelling.how()}` in {Path.cwd()}"
        words = f"{labelling.least} labelled pictures of {round_name}: {how}"
        log.warning("Waiting for %s, at most %g h; there are %d", words, hours, done)
        watch = _Watch(labelling, words, 3600 * hours, float(people["every"]))
        watch.start()
        pause_flow_run(timeout=int(3600 * hours) + SLACK, poll_interval=int(people["every"]))
        over, done = watch.end(), labelling.done()
    if done >= labelling.least or (done and not over):
        log.info(labelling.take())
    else:
        asked = f"after {hours:g} h" if over else "when the run was resumed by hand"
        log.warning(labelling.give_up(f"{done} of {labelling.least} labels {asked}"))


def shown_as(round_name: str) -> str:
    """The key of the round's artifact: Prefect takes small letters, digits and dashes only."""
    return re.sub(r"[^a-z0-9]", "-", f"labels-{round_name}".lower())


class _Watch(Thread):
    """Shows how many labels there are, and resumes the run when they are enough or time is up."""

    def __init__(self, labelling: Labelling, words: str, seconds: float, every: float) -> None:
        super().__init__(daemon=True)
        self.labelling, self.seconds, self.every = labelling, seconds, every
        self.run_id = UUID(str(flow_run.get_id()))
        shown = create_progress_artifact(0, shown_as(labelling.references.name), words)
        assert isinstance(shown, UUID)  # a coroutine only in asynchronous flows
        self.shown = shown
        self.over = False
        self.problem: Exception | None = None
        self.ended = Event()

    def run(self) -> None:
        """Look every so many seconds until the run goes on."""
        try:
            self._look()
        except Exception as problem:
            self.problem = problem
        while not self.ended.wait(1):
            # Not paused yet, or somebody pressed Resume in the same moment; or the server is
            # busy, and without a second try the run would wait for ever.
            with suppress(NotPausedError, HTTPError):
                resume_flow_run(self.run_id)

    def _look(self) -> None:
        end, before = time.monotonic() + self.seconds, 0
        while not self.ended.wait(self.every):
            done = self.labelling.done()
            if done != before:
                share = min(1.0, done / self.labelling.least)
                with suppress(HTTPError):  # shown at the next look
                    update_progress_artifact(self.shown, 100 * share)
                    before = done
            self.over = done < self.labelling.least and time.monotonic() >= end
            if self.over or done >= self.labelling.least:
                return

    def end(self) -> bool:
        """Stop looking; whether the time was up. Raises what went wrong while looking."""
        self.ended.set()
        self.join()
        if self.problem is not None:
            raise self.problem
        return self.over
