"""What the detector saw, drawn into the pictures: a sheet a task."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from components.evaluation.geneval import found
from components.evaluation.grid import RIGHT, WRONG
from components.evaluation.scoring import Scored
from components.scenes.tasks import TASKS

BLACK, GREY, WHITE = (0, 0, 0), (110, 110, 110), (255, 255, 255)
COUNTED, IGNORED = (255, 0, 220), (150, 150, 150)  # magenta: no colour that things have
GAP, LINE, LETTER = 12, 15, 12  # pixels between pictures, of a line of text, of its letters
SHOWN = 8  # detections a picture; a detector of 80 classes gives a hundred, nearly all of them weak


@dataclass(frozen=True)
class Thing:
    """One detection: its number on the sheet, box in pixels, what is said, whether it counts."""

    number: int
    box: Sequence[float]
    words: str
    counts: bool


def things(scored: Scored) -> list[Thing]:
    """All detections of a picture, those that count by GenEval's rules first, best first."""
    counted = found(scored.sample.metadata, scored.detections)
    flat = []
    for name, items in scored.detections.items():
        for item in items:
            words = f"{item[5]} {name}".strip() + f" {item[4]:.2f}"
            flat.append((item in counted.get(name, []), item, words))
    flat.sort(key=lambda one: (not one[0], -one[1][4]))
    return [
        Thing(number, item[:4], words if counts else f"{words} (not counted)", counts)
        for number, (counts, item, words) in enumerate(flat, 1)
    ]


def chosen(scored: Sequence[Scored], task: str, count: int) -> list[Scored]:
    """The first picture of each prompt of a task, held-out and seen ones in turn, not picked."""
    firsts: dict[str, dict[str, Scored]] = {}
    for one in scored:
        if one.sample.metadata["tag"] == task:
            firsts.setdefault(one.split, {}).setdefault(one.sample.metadata["prompt"], one)
    queues = [list(group.values()) for _, group in sorted(firsts.items())]
    order = [q[i] for i in range(max(map(len, queues), default=0)) for q in queues if i < len(q)]
    return order[:count]


def write_seen(scored: Sequence[Scored], folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """Write TASK.png of each task into `folder`; returns them in the tasks' order.

    settings: `evaluation.grid`; `each_task` pictures a sheet, `columns` of them beside each other,
    enlarged to about `seen_cell` pixels.
    """
    folder.mkdir()
    tasks = {one.sample.metadata["tag"] for one in scored}
    files = []
    for task in [t for t in TASKS if t in tasks] + sorted(tasks - set(TASKS)):
        of_task = [one for one in scored if one.sample.metadata["tag"] == task]
        right = sum(one.correct for one in of_task)
        title = (
            f"{task}: {right} of {len(of_task)} pictures right. Shown: the first picture of each "
            "of these prompts, right or wrong."
        )
        shown = chosen(scored, task, int(settings["each_task"]))
        picture = sheet(shown, title, int(settings["seen_columns"]), int(settings["seen_cell"]))
        files.append(folder / f"{task}.png")
        # Enlarged pixels and flat colours need few shades: a tenth of the bytes.
        picture.quantize(255, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            files[-1], optimize=True
        )
    return files


def sheet(shown: Sequence[Scored], title: str, columns: int, cell: int) -> Image.Image:
    """Pictures with boxes and, under each, verdict, prompt, and what each box was taken for."""
    font, bold = ImageFont.load_default(LETTER), ImageFont.load_default(LETTER + 3)
    letters = cell * 2 // LETTER  # a letter is half as wide as high
    texts = [_text(one, letters) for one in shown]
    drawn = [_picture(one, cell) for one in shown]
    rows = [
        range(start, min(start + columns, len(shown))) for start in range(0, len(shown), columns)
    ]
    heights = [max(drawn[i].height + LINE * len(texts[i]) for i in row) + 2 * GAP for row in rows]
    top = 30
    size = (columns * (cell + GAP) + GAP, top + sum(heights))
    page = Image.new("RGB", size, WHITE)
    pen = ImageDraw.Draw(page)
    pen.text((GAP, 6), title, fill=BLACK, font=bold)
    y = top
    for row, height in zip(rows, heights, strict=True):
        for place, i in enumerate(row):
            x = GAP + place * (cell + GAP)
            page.paste(drawn[i], (x, y))
            for n, (words, ink) in enumerate(texts[i]):
                pen.text((x, y + drawn[i].height + 3 + n * LINE), words, fill=ink, font=font)
        y += height
    return page


def _text(one: Scored, letters: int) -> list[tuple[str, tuple[int, int, int]]]:
    ink = RIGHT if one.correct else WRONG
    verdict = "right" if one.correct else f"wrong: {one.reason.replace(chr(10), '; ')}"
    if one.split:
        verdict = f"{one.split.replace('_', '-')}, {verdict}"
    lines = [(line, BLACK) for line in textwrap.wrap(one.sample.metadata["prompt"], letters)]
    lines += [(line, ink) for line in textwrap.wrap(verdict, letters)]
    seen = things(one)
    said = [f"{thing.number} {thing.words}" for thing in seen[:SHOWN]] or ["nothing seen"]
    if len(seen) > SHOWN:
        said.append(f"and {len(seen) - SHOWN} weaker ones, not drawn")
    return lines + [(line, GREY) for each in said for line in textwrap.wrap(each, letters)]


def _picture(one: Scored, cell: int) -> Image.Image:
    """The picture, its pixels kept square and sharp, with numbered boxes and a frame."""
    source = one.sample.open()
    scale = cell / max(source.size)
    size = (round(source.width * scale), round(source.height * scale))
    # Small pictures keep their pixels visible; large ones are made smaller smoothly.
    way = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    picture = source.resize(size, way)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(LETTER)
    for thing in reversed(things(one)[:SHOWN]):  # what counts most is drawn last, on top
        ink = COUNTED if thing.counts else IGNORED
        x1, y1, x2, y2 = (round(v * scale) for v in thing.box)
        x1, x2 = max(x1, 3), min(max(x2, x1 + 6), size[0] - 4)
        y1, y2 = max(y1, 3), min(max(y2, y1 + 6), size[1] - 4)
        pen.rectangle((min(x1, x2), min(y1, y2), x2, y2), outline=WHITE, width=3)
        pen.rectangle((min(x1, x2) + 1, min(y1, y2) + 1, x2 - 1, y2 - 1), outline=ink, width=1)
        number = str(thing.number)
        wide = 5 + 7 * len(number)
        x, y = min(x1, size[0] - wide - 3), max(y1 - 14, 3)
        pen.rectangle((x, y, x + wide, y + 14), fill=ink)
        pen.text((x + 3, y), number, fill=WHITE, font=font)
    frame = Image.new("RGB", size, RIGHT if one.correct else WRONG)
    frame.paste(picture.crop((3, 3, size[0] - 3, size[1] - 3)), (3, 3))
    return frame
