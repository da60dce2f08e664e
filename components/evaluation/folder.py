"""GenEval's folder of pictures: `00000/metadata.jsonl` and `00000/samples/0000.png …`."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from components.errors import UserError
from components.evaluation.prompts import COCO

# A picture larger than this is refused before it is unpacked (width x height, pixels).
MAX_PIXELS = 64_000_000
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
    """Make `folder/00000` with its metadata.jsonl; returns its samples folder."""
    place = folder / f"{index:05d}"
    (place / "samples").mkdir(parents=True)
    (place / "metadata.jsonl").write_text(json.dumps(metadata) + "\n")
    return place / "samples"


def read_folder(folder: Path) -> list[Sample]:
    """Every picture of an evaluation folder, in order.

    Raises:
        UserError: no such folder, none of its folders is GenEval's, or metadata is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"No folder {folder}: give one that holds GenEval's 00000, 00001, ….")
    samples = []
    for place in sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()):
        file = place / "metadata.jsonl"
        try:
            metadata = json.loads(file.read_text().splitlines()[0])
            check_metadata(metadata)
        except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is no line of GenEval's metadata ({error!r}); it needs tag, include and "
                "prompt."
            ) from None
        pictures = sorted(p for p in (place / "samples").glob("*") if p.suffix.lower() in SUFFIXES)
        if not pictures:
            raise UserError(f"{place / 'samples'} holds no picture; draw its prompt again.")
        samples += [Sample(str(p.relative_to(folder)), metadata, p) for p in pictures]
    if not samples:
        raise UserError(f"{folder} holds no folder like 00000 with metadata.jsonl and samples/.")
    return samples


def gaps(samples: Sequence[Sample]) -> list[str]:
    """What a whole run would not lack, a sentence each: folders between others, pictures."""
    counts = Counter(int(sample.filename.split("/")[0]) for sample in samples)
    said = []
    absent = sorted(set(range(max(counts))) - set(counts))
    if absent:
        said.append(f"{len(absent)} folders are missing ({_some(absent)}); the score is without.")
    most = max(counts.values())
    fewer = sorted(index for index, count in counts.items() if count < most)
    if fewer:
        said.append(
            f"{len(fewer)} prompts have fewer than {most} pictures ({_some(fewer)}): a task's "
            "score is the mean of its pictures, so these prompts count less."
        )
    return said


def _some(indices: Sequence[int]) -> str:
    return ", ".join(f"{index:05d}" for index in indices[:5]) + (", …" if len(indices) > 5 else "")


def check_metadata(metadata: Any) -> None:
    """Raise KeyError, TypeError or ValueError when a line is not GenEval's."""
    if not isinstance(metadata["tag"], str) or not isinstance(metadata["prompt"], str):
        raise TypeError("tag and prompt are text")
    for clause in [*metadata["include"], *metadata.get("exclude", [])]:
        if not isinstance(clause["class"], str) or int(clause["count"]) < 1:
            raise ValueError("a clause needs class and count")
        if "position" in clause:
            relation, index = clause["position"]
            if not isinstance(relation, str) or not 0 <= int(index) < len(metadata["include"]):
                raise ValueError("position needs a relation and the number of a clause")


def read_detections(file: Path, samples: Sequence[Sample]) -> dict[str, dict[str, list[list[Any]]]]:
    """Detections made elsewhere: filename → class → [[x1, y1, x2, y2, score, colour], …].

    One JSON line a picture: {"filename": "00000/samples/0000.png", "detections": {…}}; boxes in
    pixels, score 0–1, colour a name; it may be "", null or left out where no colour is asked for.

    Raises:
        UserError: a damaged line, a picture without a line, or one whose prompt asks for the
            colour of a class that was detected without colours.
    """
    found: dict[str, dict[str, list[list[Any]]]] = {}
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise UserError(f"Detections {file} cannot be read: {error.strerror}.") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            found[record["filename"]] = {
                name: [_item(item) for item in items]
                for name, items in record["detections"].items()
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"{file}, line {number} is no line of detections ({error!r}); it needs filename "
                "and detections: {class: [[x1, y1, x2, y2, score, colour], …]}."
            ) from None
    absent = [s.filename for s in samples if s.filename not in found]
    if absent:
        raise UserError(
            f"{file} has no line for {len(absent)} pictures (e.g. {absent[0]}); detect them too."
        )
    _check_names(file, samples, {name for detections in found.values() for name in detections})
    for sample in samples:
        asked = {c["class"] for c in sample.metadata["include"] if "color" in c}
        for name in sorted(asked):
            if any(not item[5] for item in found[sample.filename].get(name, [])):
                raise UserError(
                    f"{file} names no colour for a {name} in {sample.filename}, whose prompt "
                    f"('{sample.metadata['prompt']}') asks for one; add it as the sixth entry "
                    "after the score."
                )
    return found


def _check_names(file: Path, samples: Sequence[Sample], seen: set[str]) -> None:
    """Refuse other names for the classes of the prompts: nothing would ever be found."""
    asked = {clause["class"] for sample in samples for clause in sample.metadata["include"]}
    others = seen - asked - set(COCO)
    for name in sorted(asked - seen):
        words = set(name.casefold().split())
        for other in sorted(others):
            letters = [re.sub(r"[^a-z0-9]", "", text.casefold()) for text in (name, other)]
            if letters[0] == letters[1] or set(other.casefold().split()) <= words:
                raise UserError(
                    f"{file} has no '{name}', which prompts ask for, but '{other}': name classes "
                    "as the prompts do (`djepa prompts geneval` has GenEval's)."
                )


def _item(item: list[Any]) -> list[Any]:
    """A detection with six entries; ValueError where it is none."""
    values = [float(v) for v in item[:5]]
    if len(values) < 5 or not all(map(math.isfinite, values)) or not 0 <= values[4] <= 1:
        raise ValueError("a detection is x1, y1, x2, y2, a score of 0 to 1 and a colour")
    return [*values, (item[5] if len(item) > 5 else None) or ""]
