"""Files that are either whole or absent: write under a temporary name, then rename."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from components.errors import FULL, UserError


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put the file's name to a refusal for want of room, which a write has no name for."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with _named(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_other(path: Path, ours: Sequence[str]) -> None:
    """UserError for a path that is to be replaced and is neither absent, nor an empty folder, nor
    one with any of the files `ours`: what a user keeps there would be lost."""
    if not path.exists() or any((path / name).exists() for name in ours):
        return
    if not path.is_dir() or any(path.iterdir()):
        raise UserError(
            f"{path} holds something else (no {' or '.join(ours)}), which would be overwritten: "
            "name another folder, or empty that one."
        )


@contextlib.contextmanager
def atomic_folder(path: Path, ours: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it replaces `path` when the block ends well.

    What was there is moved aside and then removed: a kill leaves no half of it under its name.

    ours: for a `path` that a user names, the file by which a folder is known as an earlier one of
    the kind. UserError for any other that is not empty: all that it holds would be lost.
    """
    path = Path(path)
    if ours:
        refuse_other(path, (ours,))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        aside = _aside(path)
        if path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there, so that a kill leaves no half of it under its name."""
    aside = _aside(Path(path))
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(path: Path) -> Path:
    """A free name for a folder that is to go."""
    aside = path.with_name(f"{path.name}.old.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)  # of a killed process with this number
    return aside


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, keys in the order given."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text())


def read_yaml(path: Path) -> Any:
    """Read a YAML file with libyaml: dvc.lock of ten rounds takes the pure parser a second."""
    return yaml.load(Path(path).read_text(), Loader=yaml.CSafeLoader)


def hash_of(value: Any) -> str:
    """Sixteen hex digits of SHA-256 over the canonical JSON of `value`."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
