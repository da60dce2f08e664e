"""A stage's outputs made on another machine: packed there, checked and taken into DVC here.

The other machine needs neither DVC nor git. Beside the outputs lie the stage's part of the
parameters and a hash of each input, code among them; `import_stage` takes only what was made
from what lies here.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from components.compose import load
from components.errors import UserError
from components.files import read_json, write_json
from components.stages import definition, dependencies, filled, section

RECORD = "stage.json"


def content_hash(path: Path) -> str:
    """SHA-256 over names and bytes of a file or folder; Python's own caches are no content."""
    total = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if not file.is_file() or "__pycache__" in file.parts:
            continue
        with file.open("rb") as stream:
            digest = hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()
        total.update(f"{file.relative_to(path).as_posix()} {digest}\n".encode())
    return total.hexdigest()


def outputs(stage: str, params: Mapping[str, Any]) -> list[Path]:
    """The paths that dvc.yaml lists as the stage's outputs."""
    return [Path(out) for out in filled(stage, params, definition(stage)["outs"])]


def export_stage(stage: str, folder: Path, most: int) -> None:
    """Pack the outputs of a stage that has run here into files of at most `most` bytes.

    Raises:
        UserError: an input or an output is not there.
    """
    params = load()
    made = outputs(stage, params)
    inputs = [Path(path) for path in dependencies(stage, params)]
    absent = [str(path) for path in [*inputs, *made] if not path.exists()]
    if absent:
        raise UserError(
            f"The stage {stage} cannot be exported: {', '.join(absent)} is not here; run "
            f"`python -m components.cli stage {stage}` first."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob("part-*"):
        part.unlink()
    with tempfile.TemporaryFile() as packed:
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for path in made:
                archive.add(path)
        packed.seek(0)
        parts = {}
        for number, data in enumerate(iter(lambda: packed.read(most), b"")):
            name = f"part-{number:03}"
            (folder / name).write_bytes(data)
            parts[name] = hashlib.sha256(data).hexdigest()
    record = {
        "stage": stage,
        "params": section(stage, params),
        "inputs": {str(path): content_hash(path) for path in inputs},
        "outputs": {str(path): content_hash(path) for path in made},
        "parts": parts,
    }
    write_json(folder / RECORD, record)
    print(f"{stage}: {len(parts)} parts in {folder}", flush=True)


def import_stage(folder: Path) -> None:
    """Take what `export_stage` packed into its place and into DVC, as if the stage had run here.

    Raises:
        UserError: parts are missing or damaged, or it was made with other parameters or inputs.
    """
    try:
        record = read_json(folder / RECORD)
        stage, parts = str(record["stage"]), record["parts"]
        inputs, said = record["inputs"], record["params"]
        recorded = record["outputs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is not what `djepa export-stage` writes ({RECORD}: {error}); name the "
            "folder that it wrote."
        ) from error
    params = load()
    if section(stage, params) != said:
        raise UserError(
            f"{folder} was made with other parameters of {stage} than params.yaml has: compose "
            "those that it was made with (`djepa compose …`), or run the stage here."
        )
    wanted = dependencies(stage, params)
    other = [
        path
        for path in sorted({*wanted, *inputs})
        if path not in inputs or not Path(path).exists() or content_hash(Path(path)) != inputs[path]
    ]
    if other:
        raise UserError(
            f"{folder} was made from other inputs of {stage} than those here: {', '.join(other)}; "
            "check out what it was made from, or run the stage here."
        )
    damaged = [name for name, digest in parts.items() if _digest(folder / name) != digest]
    if damaged:
        raise UserError(
            f"{', '.join(damaged)} in {folder} is missing or damaged: copy it from where "
            "`djepa export-stage` wrote it."
        )
    made = outputs(stage, params)
    with tempfile.TemporaryDirectory(dir=Path()) as name:
        unpacked = Path(name)
        joined: Any = _Joined(folder / part for part in sorted(parts))
        with tarfile.open(fileobj=joined, mode="r|") as archive:
            archive.extractall(unpacked, filter="data")
        wrong = [
            str(path)
            for path in made
            if not (unpacked / path).exists()
            or content_hash(unpacked / path) != recorded.get(str(path))
        ]
        if wrong:
            raise UserError(f"{', '.join(wrong)} in {folder} is not what its {RECORD} says.")
        for path in made:
            if path.is_dir():
                shutil.rmtree(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            (unpacked / path).replace(path)
    name = definition(stage)["name"]
    command = [sys.executable, "-m", "dvc", "commit", "--force", "--quiet", name]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise UserError(f"`dvc commit --force {name}` failed: {answer.stderr.strip()}")
    print(f"{stage}: taken from {folder}; dvc.lock records it", flush=True)


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


class _Joined:
    """Files read as one, from first to last."""

    def __init__(self, files: Iterator[Path]) -> None:
        self._files, self._now = files, b""

    def read(self, size: int = -1) -> bytes:
        """The next bytes; fewer than `size` only at the end."""
        while len(self._now) < size:
            file = next(self._files, None)
            if file is None:
                break
            self._now += file.read_bytes()
        data, self._now = self._now[:size], self._now[size:]
        return data
