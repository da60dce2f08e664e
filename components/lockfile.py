"""Where DVC's own record needs help: cut off by a full disk or a kill, or of results that are lost.

DVC writes dvc.lock in place, and takes a stage's files into its cache after the stage has ended:
both can be cut off. Neither loses anything, if one knows what to do.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from components.errors import FULL, UserError, first_line
from components.files import atomic_file, read_yaml

LOCK, RAW = Path("dvc.lock"), Path("data.dvc")
NOT_TAKEN = re.compile(r"ERROR: failed to reproduce '.+': \[Errno (\d+)\]")


def check_lock(root: Path = Path()) -> None:
    """Refuse a dvc.lock or data.dvc that was cut off.

    Raises:
        UserError: it is there and does not say what is recorded.
    """
    for name, section, kind in ((LOCK, "stages", dict), (RAW, "outs", list)):
        file = root / name
        if not file.exists():
            continue
        try:
            whole = isinstance(read_yaml(file)[section], kind)
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError):
            whole = False
        if not whole:
            raise UserError(
                f"{file.absolute()} is damaged (a full disk, or a kill, cut it off): run `git "
                f"checkout {name}` there and the same command again; what it does not know then is "
                f"taken from DVC's run cache, not run."
            )


def forget_lost() -> list[str]:
    """Take the stages out of dvc.lock whose results are nowhere; returns their names.

    A clone has the record of results that it has not. For a stage with the inputs of that record
    DVC looks for those results alone, and runs it anew where they are neither here nor in its
    cache: each time, in every worktree and experiment, though its run cache has what another one
    made. With a remote nothing is forgotten, as `dvc pull` may bring it.

    Raises:
        UserError: DVC cannot read what this checkout records.
    """
    check_lock()
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    with Repo() as repo:
        if not LOCK.exists() or repo.config["core"].get("remote"):
            return []
        try:
            with repo.lock:
                stages = [each for each in repo.index.stages if isinstance(each, PipelineStage)]
                lost = [each.name for each in stages if any(_is_lost(out) for out in each.outs)]
                if lost:
                    record = read_yaml(LOCK)
                    for name in lost:
                        del record["stages"][name]
                    with atomic_file(LOCK) as temporary:
                        temporary.write_text(yaml.safe_dump(record, sort_keys=False))
        except LockError:  # somebody's `dvc repro` writes it now
            return []
        except DvcException as error:
            raise UserError(
                f"DVC cannot read what {Path.cwd()} records ({first_line(error)}): mend it and run "
                f"the same command again."
            ) from error
    return lost


def _is_lost(out: Any) -> bool:
    recorded = bool(out.hash_info)
    return recorded and out.changed_cache() and (not out.exists or out.changed_checksum())


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
