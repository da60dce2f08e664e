"""Errors that are the user's or the machine's to mend: one sentence, no traceback."""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REFUSED = 2  # exit code for what is not a defect of the program; a retry does not help
BUSY = 75  # exit code for what another process is at: a retry later helps (EX_TEMPFAIL)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What stands at a path is of another kind than what was to be written or read there.
IN_THE_WAY = (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
# Libraries that write through Rust, C++ or SQLite keep the system's words, not its number.
FULL_WORDS = ("no space left on device", "disk quota exceeded", "database or disk is full")
OURS = ("components", "flows")


class UserError(Exception):
    """A mistake in what was asked for or given, not in the program.

    The message names the thing, the place and the way out. The command line prints
    it alone and exits with 2.
    """


class Busy(UserError):
    """Another process is at the very same thing."""


def without_password(text: str) -> str:
    """The text without the name and password that an address in it may have: //NAME:WORD@HOST."""
    return re.sub(r"//[^/\s]*@", "//", text)


def first_line(error: BaseException) -> str:
    """What an error of a library says, in a line that may be shown and logged."""
    return without_password(str(error).strip().partition("\n")[0]) or "no reason given"


def explain(error: BaseException) -> str | None:
    """The sentence for a mistake, a missing package, a full disk, a path that cannot be written or
    read, or a store of MLflow's that is away; None for all other errors."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ImportError):
        return _missing_package(error)
    if isinstance(error, IN_THE_WAY) and error.filename is not None:
        # Of a rename the second is the name that was asked for.
        return (
            f"{error.filename2 or error.filename} cannot be written or read "
            f"({str(error.strerror).lower()}): name another path, or make way there."
        )
    # Where closing a file or a run fails too, that second error is the one that is raised.
    cause: BaseException | None = error
    while cause is not None:
        if _is_store_away(cause):
            from components.tracking import place

            return (
                f"MLflow at {place()} does not answer ({first_line(cause)}): see that it runs, and "
                f"that MLFLOW_TRACKING_URI names it, and run the same command again."
            )
        if _is_full(cause):
            where = getattr(cause, "filename", None) or Path.cwd()
            return (
                f"The disk is full (writing {where}): make room, for example with `dvc gc -w`, and "
                f"run the same command again; finished stages and snapshots are kept."
            )
        cause = cause.__cause__ or cause.__context__
    return None


@contextmanager
def needed(program: str, module: str) -> Iterator[None]:
    """Import what a program needs inside: for a missing package, one sentence and exit code 2.

    program: as the sentence begins. module: its `__name__`; imported by another module, the error
    is raised as it is.
    """
    try:
        yield
    except ImportError as missing:
        sentence = explain(missing)
        if module != "__main__" or sentence is None:
            raise
        sys.exit(say(program, sentence))


def _missing_package(error: ImportError) -> str | None:
    package = (error.name or "").partition(".")[0]
    if not package or package in OURS:
        return None
    # `make install` alone holds an installation that lost a package for finished.
    mend = "run `make -B install`, then `source .venv/bin/activate` and the same command again."
    if isinstance(error, ModuleNotFoundError):
        return f"The package {package!r} is not installed for {sys.executable}: {mend}"
    reason = (str(error).splitlines() or ["no reason given"])[0]
    return f"The package {package!r} cannot be loaded by {sys.executable} ({reason}): {mend}"


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    text = str(error).lower()
    return any(words in text for words in FULL_WORDS)


def _is_store_away(error: BaseException) -> bool:
    """MLflow has one class for all its errors; looked at without importing it."""
    code = getattr(error, "error_code", None)
    unanswered = code == "INTERNAL_ERROR" and str(error).startswith("API request to ")
    return type(error).__module__.startswith("mlflow.") and (
        unanswered or code == "TEMPORARILY_UNAVAILABLE"
    )


def say(program: str, sentence: str, error: BaseException | None = None) -> int:
    """Print `program: sentence` to stderr; returns the exit code to end with."""
    print(f"{program}: {sentence}", file=sys.stderr, flush=True)
    return BUSY if isinstance(error, Busy) else REFUSED
