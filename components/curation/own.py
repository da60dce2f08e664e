"""A user's own filters: one small file and one line of params each.

curation.own: {brightness: {file: brightness.py, threshold: 40.0}}

The file defines one subclass of components.curation.filters.Filter; it is made with the
threshold, and with the line's further keys as keyword arguments, and bears the line's name.
docs/own_filter.py is an example. The file is code and runs as such: it is trusted.
"""

import importlib.util
import math
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from components.curation.filters import Filter, Picture
from components.errors import UserError

PREFIX = "djepa_own_"  # of the names under which the files are imported
# Filters that are there already, and what else a picture can be rejected as.
TAKEN = (
    *("caption", "resolution", "aspect", "contrast", "noise", "sharpness"),
    *("faces", "text", "nsfw", "aesthetic"),
    *("damaged", "duplicate_key", "exact_duplicate", "near_duplicate", "synthetic"),
)


def own_files(own: Mapping[str, Any]) -> list[Path]:
    """The files of `params.curation.own` in its order; relative ones start at the current folder.

    Raises UserError for a line that cannot be meant and for a file that is not there.
    """
    return [_checked(name, line) for name, line in own.items()]


def own_filters(own: Mapping[str, Any]) -> list[Filter]:
    """Import the files of `params.curation.own` and make their filters, in its order.

    Raises UserError when a line cannot be meant, or its file is missing, fails, or has not one
    filter in it.
    """
    return [_made(name, line, _checked(name, line)) for name, line in own.items()]


def checked_setup(stage: Filter) -> None:
    """`stage.setup()`; raises UserError naming the filter and its file where an own one fails."""
    try:
        stage.setup()
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if not _is_own(stage):
            raise
        raise _failed(stage.name, _file(stage), "setup()", error) from error


def checked_score(stage: Filter, batch: Sequence[Picture]) -> np.ndarray:
    """`stage.score(batch)`, float64 (B,); what an own filter returns is checked first.

    Raises UserError naming the filter and its file when an own filter's score() fails or returns
    anything but one number (or NaN: not looked at) a picture.
    """
    if not _is_own(stage):
        return stage.score(batch)
    try:
        scores = np.asarray(stage.score(batch))
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise _failed(stage.name, _file(stage), "score()", error) from error
    if scores.shape != (len(batch),) or scores.dtype.kind not in "biuf" or np.isinf(scores).any():
        what = "infinite numbers" if scores.dtype.kind == "f" else f"{scores.dtype} values"
        raise UserError(
            f"The filter {stage.name!r} of {_file(stage)} returned {what} of shape {scores.shape} "
            f"for {len(batch)} pictures: let its score() return one finite number, or NaN, a "
            "picture."
        )
    return scores.astype(np.float64)


def _checked(name: str, line: Any) -> Path:
    """The line's file, if line and file can be meant."""
    place = f"curation.own.{name}"
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(f"{place} is no name for a filter: use letters, digits and underscores.")
    if name in TAKEN:
        raise UserError(f"{place} has the name of a built-in filter or verdict: choose another.")
    if not isinstance(line, Mapping) or not {"file", "threshold"} <= set(line):
        raise UserError(f"{place} is {line!r}: give it a file and a threshold in params/.")
    threshold = line["threshold"]
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not math.isfinite(threshold):
        raise UserError(f"{place}.threshold is {threshold!r}: set it to a number in params/.")
    path = Path(str(line["file"])).expanduser()
    if not path.is_file():
        raise UserError(
            f"{place}.file is {line['file']}, and {path.absolute()} is no file: write the filter "
            f"there, or take {place} out of params/."
        )
    return path


def _made(name: str, line: Mapping[str, Any], path: Path) -> Filter:
    kind = _filter_class(name, path)
    rest = {k: v for k, v in line.items() if k not in ("file", "threshold")}
    try:
        stage = kind(line["threshold"], **rest)
        stage.name = name
        if not hasattr(stage, "reason"):
            bound = "least" if stage.keep_high else "most"
            stage.reason = f"{name} {{score:g}}, at {bound} {{threshold:g}} wanted"
        stage.reason.format(score=0.0, threshold=stage.threshold)  # it has no other field
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise _failed(name, path, f"{kind.__name__}(threshold, …)", error) from error
    return stage


def _filter_class(name: str, path: Path) -> type[Filter]:
    """Import the file and find the one filter that it defines itself."""
    spec = importlib.util.spec_from_file_location(PREFIX + name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"curation.own.{name}.file is {path}: give the file the ending .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise _failed(name, path, "the import", error) from error
    found = {
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Filter) and value.__module__ == spec.name
    }
    if len(found) != 1:
        names = ", ".join(sorted(kind.__name__ for kind in found)) or "none"
        raise UserError(
            f"The file {path} of curation.own.{name} defines {len(found)} filters ({names}): "
            "define exactly one subclass of components.curation.filters.Filter in it."
        )
    return found.pop()


def _is_own(stage: Filter) -> bool:
    return type(stage).__module__.startswith(PREFIX)


def _file(stage: Filter) -> Path:
    return Path(str(sys.modules[type(stage).__module__].__file__))


def _failed(name: str, path: Path, what: str, error: Exception) -> UserError:
    """The sentence for an error in a user's file, with the line it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename) == path.absolute()]
    number = lines[-1] if lines else getattr(error, "lineno", None)
    place = f"{path}, line {number}" if number else str(path)
    reason = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
    return UserError(
        f"The filter {name!r} of {place} failed in {what} ({type(error).__name__}, {reason}): "
        f"correct the file, or take curation.own.{name} out of params/."
    )
