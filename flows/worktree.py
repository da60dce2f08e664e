"""A git worktree of its own for a scheduled run: `python -m flows.worktree BRANCH`.

The first step of every deployment (prefect.yaml) calls it and goes on in the folder that it
prints. The run sees what is committed on the branch, whatever is edited in the checkout
meanwhile, and shares DVC's cache and DJEPA_HOME with it, so that neither does the other's work.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from components.errors import UserError, explain, say
from components.home import checkout, djepa_home
from components.processes import occupied
from flows.rest import Server

_HERE = f"{socket.gethostname()}-"  # DJEPA_HOME may be shared by machines
RUN = "PREFECT__FLOW_RUN_ID"  # in the environment where a worker started this process
GONE = "Its process is gone; finished stages and snapshots are kept: start the run again."
GRACE = 60  # seconds that a worktree may have no process in it: not yet, or not any more


def folder() -> Path:
    """Where the worktrees lie: $DJEPA_HOME/worktrees, one a run as HOST-ID."""
    return djepa_home() / "worktrees"


def add(branch: str, deployed: str) -> Path:
    """A new worktree at the branch's commit, with the results that DVC's cache has for it.

    Its id is the flow run's where Prefect started this process; `deployed` is the commit that the
    run's deployment was made from. Worktrees of runs that are gone are removed, by a run alone: by
    hand nobody would tell the server of them.

    Raises UserError where there is no such branch, or the flow there takes other parameters.
    """
    root = checkout()
    if RUN in os.environ:
        give_up(Server(os.environ["PREFECT_API_URL"]))
    found = _git("rev-parse", "--verify", "--quiet", f"{branch}^{{commit}}", cwd=root)
    commit = found.stdout.strip()
    if found.returncode:
        raise UserError(
            f"There is no branch or commit {branch} in {root}, which this deployment runs: check "
            f"out the one to run and deploy anew with `make serve`."
        )
    name = os.environ.get(RUN) or str(uuid.uuid4())
    path = _of(name)
    made = _git("worktree", "add", "--quiet", "--force", "--detach", str(path), commit, cwd=root)
    if made.returncode:
        raise UserError(f"git made no worktree of {root} in {path}: {made.stderr.strip()}")
    os.chdir(path)  # from here on a process is in it
    if _git("diff", "--quiet", deployed, commit, "--", "flows", cwd=path).returncode:
        _check_fit(branch, deployed)
    _share_cache(root, path)
    # People's answers outlive the worktree: the run that goes on with a round finds them.
    answers = path / "references" / "ratings.sqlite"
    answers.parent.mkdir(exist_ok=True)
    answers.symlink_to(djepa_home() / "ratings.sqlite")
    fill()
    return path


def _git(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True)


def _check_fit(branch: str, deployed: str) -> None:
    """Refuse what the flow here would refuse without saying why: flows/ is another version."""
    if RUN not in os.environ:
        return
    answer = subprocess.run([sys.executable, "-m", "flows.fit"], capture_output=True, text=True)
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"The deployment is from another version ({deployed[:10]}) than the branch {branch}, "
            f"whose flow does not take this run's parameters ({last}): deploy anew with `make "
            f"serve`."
        )


def _share_cache(root: Path, path: Path) -> None:
    """Have DVC in the worktree use the checkout's own settings and its cache, without copies."""
    from dvc.config import Config, merge

    main = Config(str(root / ".dvc"), validate=False)
    with Config(str(path / ".dvc"), validate=False).edit("local", validate=False) as local:
        for level in ("repo", "local"):  # paths in them are relative to the checkout's .dvc
            merge(local, main.load_one(level))
        cache = local.setdefault("cache", {})
        cache.setdefault("dir", str(root / ".dvc" / "cache"))
        # One copy of each file on the disk: DVC write-protects what it links.
        cache["type"] = "reflink,hardlink,symlink,copy"


def fill() -> None:
    """Put there what DVC's cache has of the results in dvc.lock; the rest is for the stages."""
    command = [sys.executable, "-m", "dvc", "checkout", "--quiet", "--force", "--allow-missing"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise UserError(
            f"DVC could not fill the worktree {Path.cwd()} from its cache: {answer.stderr.strip()}"
        )


def _of(run: str) -> Path:
    return folder() / f"{_HERE}{run}"


def runs() -> list[str]:
    """The ids of the runs that have a worktree on this machine."""
    # Of just a run's id: another machine's name may begin with this one's.
    return [path.name.removeprefix(_HERE) for path in folder().glob(f"{_HERE}{'?' * 36}")]


def leftovers() -> list[str]:
    """The ids of the runs whose worktree on this machine no process is in any more.

    A folder's time is when it was last seen in use: for GRACE seconds from then on it is left to
    whoever ended the run, who may have its state still to note.
    """
    used = occupied()
    gone = []
    for run in runs():
        path = _of(run)
        with suppress(FileNotFoundError):  # another process may be removing it
            if any(place.is_relative_to(path) for place in used):
                os.utime(path)
            elif time.time() - path.stat().st_mtime > GRACE:
                gone.append(run)
    return gone


def remove(gone: Sequence[str]) -> None:
    """Remove these runs' worktrees."""
    for run in gone:
        shutil.rmtree(_of(run), ignore_errors=True)
    if gone:
        _git("worktree", "prune", cwd=checkout())


def give_up(server: Server) -> None:
    """Say of leftovers' runs that they are over if nobody has said it, and remove the leftovers.

    What the server could not be told stays for the next look: else the run would be running for
    ever.
    """
    remove([run for run in leftovers() if server.end(run, "CRASHED", GONE)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the new worktree's folder; what the user can mend is one sentence and exit code 2."""
    parser = argparse.ArgumentParser("python -m flows.worktree", description=__doc__)
    parser.add_argument("branch", help="a branch or commit; HEAD for what is checked out")
    parser.add_argument("deployed", help="the commit that the deployment was made from")
    options = parser.parse_args(arguments)
    try:
        print(add(options.branch, options.deployed))
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        if RUN in os.environ:  # Prefect itself would note no more than that a step failed
            Server(os.environ["PREFECT_API_URL"]).end(os.environ[RUN], "FAILED", sentence)
        return say("worktree", sentence)
    return 0


if __name__ == "__main__":
    sys.exit(main())
