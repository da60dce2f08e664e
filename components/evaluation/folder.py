"""GenEval's folder of pictures: `00000/metadata.jsonl` and `00000/samples/0000.png …`."""

import contextlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from components.errors import UserError
from components.files import atomic_file

RUN = "run.json"  # beside pictures that we drew: of what run they are
# A picture larger than this is refused before it is unpacked (width x height, pixels).
MAX_PIXELS = 64_000_000
NAME = re.compile(r"\d+/samples/[^/]+")  # of a picture, from its folder
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Sample:
    """One picture of an evaluation folder; `filename` is relative to the folder."""

    filename: str
    metadata: dict[str, Any]
    path: Path

    def open(self) -> Image.Image:
        """The picture as RGB, turned as its EXIF says.

        Raises:
            UserError: damaged, too large or no picture.
        """
        try:
            with Image.open(self.path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(
                        f"{self.path} has more than {MAX_PIXELS} pixels; scale it down."
                    )
                return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(
                f"{self.path} cannot be read as a picture ({error}); draw it again or remove it."
            ) from None


def write_prompt(folder: Path, index: int, metadata: Mapping[str, Any]) -> Path:
    """Make `folder/00000` with its metadata.jsonl, where need be; returns its samples folder."""
    place = folder / f"{index:05d}"
    (place / "samples").mkdir(parents=True, exist_ok=True)
    line = json.dumps(metadata) + "\n"
    with contextlib.suppress(OSError):
        if (place / "metadata.jsonl").read_text() == line:
            return place / "samples"
    with atomic_file(place / "metadata.jsonl") as temporary:
        temporary.write_text(line)
    return place / "samples"


def refuse(problems: Sequence[str], way_out: str) -> None:
    """Raise a UserError that names every problem, one a line; none passes."""
    if problems:
        lines = [*problems, f"{len(problems)} problems, no score: {way_out}"]
        raise UserError("\n".join(lines) if len(problems) > 1 else f"{problems[0]}; {way_out}")


def read_folder(folder: Path, named: Collection[str] = ()) -> list[Sample]:
    """Every picture of an evaluation folder, in order.

    named: filenames (`00000/samples/0000.png`) that count as pictures though they may not be
        there: boxes are given for them.

    Raises:
        UserError: no such folder, none of its folders is GenEval's, or metadata is damaged or
            pictures are missing: all of them by name.
    """
    if not folder.is_dir():
        raise UserError(f"No folder {folder}: give one that holds GenEval's 00000, 00001, ….")
    wanted: dict[str, set[str]] = {}
    for filename in named:
        place = filename.split("/")[0] if NAME.fullmatch(filename) else ""
        wanted.setdefault(place, set()).add(filename)
    samples, damaged, empty = [], [], []
    for where in sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()):
        file = where / "metadata.jsonl"
        try:
            metadata = json.loads(file.read_text())
            check_metadata(metadata)
        except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
            damaged.append(f"{file} is no line of GenEval's metadata ({error!r})")
            continue
        found = {str(p.relative_to(folder)) for p in (where / "samples").glob("*")
                 if p.suffix.lower() in SUFFIXES}  # fmt: skip
        if not found | wanted.get(where.name, set()):
            empty.append(f"{where / 'samples'} holds no picture")
        samples += [
            Sample(name, metadata, folder / name)
            for name in sorted(found | wanted.pop(where.name, set()))
        ]
    refuse(damaged, "metadata.jsonl needs tag, include and prompt, as `djepa prompts geneval`.")
    refuse(empty, "draw these prompts again.")
    if not samples:
        raise UserError(f"{folder} holds no folder like 00000 with metadata.jsonl and samples/.")
    refuse(
        [f"{name} is in no folder of {folder}" for names in wanted.values() for name in names],
        "boxes need the metadata.jsonl of their prompt and names like 00000/samples/0000.png.",
    )
    return samples


def check_metadata(metadata: Any) -> None:
    """Raise KeyError, TypeError or ValueError when a line is not GenEval's."""
    if not isinstance(metadata["tag"], str) or not isinstance(metadata["prompt"], str):
        raise TypeError("tag and prompt are text")
    for clause in [*metadata["include"], *metadata.get("exclude", [])]:
        if not isinstance(clause["class"], str) or type(clause["count"]) is not int:
            raise TypeError("a clause needs a class, which is text, and a count, a whole number")
        if clause["count"] < 1:
            raise ValueError("a count is at least 1")
        if "position" in clause:
            relation, index = clause["position"]
            if not isinstance(relation, str) or type(index) is not int:
                raise TypeError("position needs a relation and the number of a clause")
            if index not in range(len(metadata["include"])):
                raise ValueError("position needs a relation and the number of a clause")
