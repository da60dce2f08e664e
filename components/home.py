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
        UserError: DJEPA_HOME is not set, and there is no git or no checkout here.
    """
    named = os.environ.get("DJEPA_HOME")
    home = Path(named) if named else checkout() / ".djepa"
    home.mkdir(parents=True, exist_ok=True)
    return home.resolve()


def checkout() -> Path:
    """The top folder of the main git checkout.

    Raises:
        UserError: git is not installed, or this is no checkout.
    """
    here = Path.cwd()
    # DVC's experiment copies lie at <main checkout>/.dvc/tmp/exps/…, with a .git of their own.
    for parent in here.parents:
        if parent.name == "exps" and parent.parent.name == "tmp":
            here = parent.parents[2]
            break
    alone = "a stage alone also runs where DJEPA_HOME names a folder for its runs and snapshots"
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
            f"git is not installed, or not on PATH: install it and run the same command again "
            f"({alone})."
        ) from error
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"{here} is not in a git checkout: clone the project with git and run the same "
            f"command there ({alone})."
        ) from error
    return Path(answer.stdout.strip()).parent
