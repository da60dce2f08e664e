"""How the commands of the flows end: one sentence and an exit code, no traceback."""

import logging
import os
import signal
import sys
from collections.abc import Callable

from components.errors import UserError, explain, say, without_password
from components.processes import end_with


class StageFailed(RuntimeError):
    """A stage ended badly; `code` is the exit code of the stage's own command."""

    def __init__(self, name: str, code: int, last: str) -> None:
        super().__init__(f"{name} failed (exit code {code}): {last}")
        self.code = code


class _OneSentence(logging.Filter):
    """Leaves out Prefect's tracebacks of these: they show the flow, not what went wrong.

    A cause in them, such as MLflow's, could show a password too.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], StageFailed | UserError):
            record.exc_info = None
        return True


for _name in ("prefect.task_runs", "prefect.flow_runs", "prefect.engine"):
    logging.getLogger(_name).addFilter(_OneSentence())


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# A worker of Prefect's started this process. One that is killed cannot end its flows, and another
# would start the same work beside them. The signal has a flow end its stage, which writes its
# snapshot, and Prefect note the run as crashed.
if "PREFECT__FLOW_RUN_ID" in os.environ:
    end_with(os.getppid(), _interrupt)


def _server_away(error: BaseException) -> str | None:
    """The sentence for a Prefect server that cannot be reached; None for other errors."""
    from httpx import TransportError  # what Prefect's client raises

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TransportError) or str(cause).startswith("Failed to reach API"):
            named = without_password(os.environ.get("PREFECT_API_URL", "its address"))
            return (
                f"The Prefect server at {named} does not answer: start it (`make serve`), or unset "
                f"PREFECT_API_URL to run without one, and run the same command again; finished "
                f"stages are kept."
            )
        cause = cause.__cause__ or cause.__context__
    return None


def command(program: str, body: Callable[[], object], kept: str = "") -> int:
    """Run a command's body; returns its exit code.

    A stage that failed is one sentence and 1, with `kept`: what is left and how to go on. What
    the user can mend is one sentence and 2, what another process is at 75. Raises what is neither.
    """
    # Prefect hands a SIGTERM on after cancelling the run; an ordinary exit then stops its built-in
    # server too, which would go on without us otherwise.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        body()
    except StageFailed as failure:
        print(f"{program}: {failure}", file=sys.stderr)
        print(kept, file=sys.stderr)
        return 1
    except Exception as error:
        sentence = explain(error) or _server_away(error)
        if sentence is None:
            raise
        return say(program, sentence, error)
    return 0
