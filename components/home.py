"""Where state lives that is nobody's output: runs, resume snapshots, the map of stages to runs."""

import os
import subprocess
from pathlib import Path

from components.errors import UserError


def djepa_home() -> Path:
    """The folder DJEPA_HOME, made if need be.

    By default `.djepa` beside the main checkout's git directory, so that worktrees, and the
    copies in which DVC runs queued experiments, share it.

    Raises:
        UserError: no git checkout here and DJEPA_HOME is not set.
    """
    named = os.environ.get("DJEPA_HOME")
    home = Path(named) if named else _beside_git() / ".djepa"
    home.mkdir(parents=True, exist_ok=True)
    return home.resolve()


def _beside_git() -> Path:
    here = Path.cwd()
    # DVC's experiment copies lie at <main checkout>/.dvc/tmp/exps/…, with a .git of their own.
    for parent in here.parents:
        if parent.name == "exps" and parent.parent.name == "tmp":
            here = parent.parents[2]
            break
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "--path-format=absolute", "--git-common-dir"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except FileNotFoundError as error:
        raise UserError(
            "git is not installed, and DJEPA_HOME is not set: install git, "
            "or name a folder for runs and snapshots in DJEPA_HOME."
        ) from error
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"{here} is not in a git checkout, and DJEPA_HOME is not set: clone the project with "
            f"git, or name a folder for runs and snapshots in DJEPA_HOME."
        ) from error
    return Path(answer.stdout.strip()).parent
