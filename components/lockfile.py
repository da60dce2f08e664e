"""What a full disk or a kill does to DVC's own files, and the way out of it.

DVC writes dvc.lock in place, and takes a stage's files into its cache after the stage has ended:
both can be cut off. Neither loses anything, if one knows what to do.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from components.errors import FULL, UserError

LOCK = Path("dvc.lock")
NOT_TAKEN = re.compile(r"ERROR: failed to reproduce '.+': \[Errno (\d+)\]")


def check_lock(root: Path = Path()) -> None:
    """Refuse a dvc.lock that was cut off.

    Raises:
        UserError: it is there and does not say what is recorded.
    """
    file = root / LOCK
    if not file.exists():
        return
    try:
        whole = isinstance(yaml.safe_load(file.read_text())["stages"], dict)
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError):
        whole = False
    if not whole:
        raise UserError(
            f"{file.absolute()} is damaged (a full disk, or a kill, cut it off): run `git checkout "
            f"{LOCK}` there and the same command again; stages that it does not know then are "
            f"taken from DVC's run cache, not run."
        )


def not_taken(stage: str, said: Iterable[str]) -> str | None:
    """The sentence for a stage that ended well, and whose files DVC had no room for; else None.

    said: the lines that `dvc repro` printed.
    """
    for line in said:
        found = NOT_TAKEN.match(line)
        if found and int(found[1]) in FULL:
            return (
                f"The disk was full when DVC took the files of the finished stage: make room, then "
                f"run `dvc commit --force {stage}` and the same command again; without that commit "
                f"the stage would run anew."
            )
    return None
