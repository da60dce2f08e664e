"""Results on DVC's default remote, so that another machine has them with `dvc pull`."""

import subprocess
import sys
from collections.abc import Sequence

from components.errors import UserError, without_password
from components.rawdata import RECORD


def remote_name() -> str | None:
    """The name of DVC's default remote for this checkout, or None where there is none."""
    from dvc.config import Config

    return Config.from_cwd(validate=False)["core"].get("remote")


def push(names: Sequence[str]) -> None:
    """Send the outputs of these stages, and the raw pictures, to the default remote.

    What the remote has already is not sent again. With dvc.lock committed, a clone elsewhere
    needs no more: `dvc pull` brings everything, and `dvc repro` finds nothing to do. DVC's run
    cache, which only helps runs that are in no commit, is not sent.

    Args:
        names: of stages in dvc.yaml that have run.

    Raises:
        UserError: there is no default remote, or it did not take everything.
    """
    remote = remote_name()
    if remote is None:
        raise UserError(
            "DVC has no default remote to push to: give it one with `dvc remote add -d NAME URL`."
        )
    # The first stage's input is no stage's output, and without it `dvc pull` fails elsewhere.
    targets = [*([str(RECORD)] if RECORD.exists() else []), *names]
    answer = subprocess.run(
        [sys.executable, "-m", "dvc", "--wait-for-lock", "push", *targets],
        capture_output=True,
        text=True,
    )
    if answer.returncode:
        lines = [line for line in answer.stderr.splitlines() if line.startswith("ERROR: ")]
        # The last one counts the files; why one of them did not go stands before it.
        last = "; ".join(line.removeprefix("ERROR: ") for line in lines[-2:]) or "no reason given"
        last = without_password(last)
        raise UserError(
            f"`dvc push` of {', '.join(names)} to the remote {remote} failed ({last}): the results "
            f"are kept here; see to the remote (`dvc remote list` names its place), then run "
            f"`dvc push`."
        )
