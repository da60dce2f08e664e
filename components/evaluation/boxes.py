"""Boxes that something else found: read from a file, and held against the pictures they are of."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.errors import UserError
from components.evaluation.folder import Sample, refuse
from components.evaluation.prompts import COCO

Boxes = dict[str, dict[str, list[list[Any]]]]  # filename → class → detections


def read_detections(file: Path) -> Boxes:
    """Detections made elsewhere: filename → class → [[x1, y1, x2, y2, score, colour], …].

    One JSON line a picture: {"filename": "00000/samples/0000.png", "detections": {…}}; boxes in
    pixels, score 0–1, colour a name; it may be "", null or left out where no colour is asked for.

    Raises:
        UserError: a damaged line, or two lines for one picture.
    """
    found: Boxes = {}
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Detections {file} cannot be read as text: {error}.") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            filename = str(record["filename"])
            boxes = {
                name: [_item(item) for item in items]
                for name, items in record["detections"].items()
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"{file}, line {number} is no line of detections ({error!r}); it needs filename "
                "and detections: {class: [[x1, y1, x2, y2, score, colour], …]}."
            ) from None
        if filename in found:
            raise UserError(f"{file}, line {number}: {filename} has a line already; leave one.")
        found[filename] = boxes
    return found


def check_detections(file: Path, found: Boxes, samples: Sequence[Sample]) -> None:
    """Hold the detections of a file against the pictures that are to be scored by them.

    Raises:
        UserError: pictures without a line, classes under other names, or pictures whose prompt
            asks for the colour of a class that was detected without colours.
    """
    refuse(
        [f"{file} has no line for {s.filename}" for s in samples if s.filename not in found],
        "detect them too; a picture in which nothing was found has a line with no boxes.",
    )
    check_names(str(file), samples, [found[s.filename] for s in samples])
    bare = []
    for sample in samples:
        asked = {c["class"] for c in sample.metadata["include"] if "color" in c}
        for name in sorted(asked):
            if any(not item[5] for item in found[sample.filename].get(name, [])):
                bare.append(
                    f"{file} names no colour for a {name} in {sample.filename}, whose prompt "
                    f"('{sample.metadata['prompt']}') asks for one"
                )
    refuse(bare, "add it as the sixth entry after the score.")


def check_names(
    source: str, samples: Sequence[Sample], detections: Sequence[dict[str, list[list[Any]]]]
) -> None:
    """Refuse other names for the classes of the prompts: nothing would ever be found.

    source: what made the detections, for the message.
    """
    seen = {name for boxes in detections for name in boxes}
    asked = {clause["class"] for sample in samples for clause in sample.metadata["include"]}
    others = seen - asked - set(COCO)
    wrong = []
    for name in sorted(asked - seen):
        words = set(name.casefold().split())
        for other in sorted(others):
            letters = [re.sub(r"[^a-z0-9]", "", text.casefold()) for text in (name, other)]
            if letters[0] == letters[1] or set(other.casefold().split()) <= words:
                wrong.append(f"{source} has no '{name}', which prompts ask for, but '{other}'")
    refuse(wrong, "name classes as the prompts do (`djepa prompts geneval` has GenEval's).")


def _item(item: list[Any]) -> list[Any]:
    """A detection with six entries; ValueError where it is none."""
    values = [float(v) for v in item[:5]]
    if len(values) < 5 or not all(map(math.isfinite, values)) or not 0 <= values[4] <= 1:
        raise ValueError("a detection is x1, y1, x2, y2, a score of 0 to 1 and a colour")
    return [*values, (item[5] if len(item) > 5 else None) or ""]
