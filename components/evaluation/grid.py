"""A grid of pictures with their prompts under them."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

TEXT_HEIGHT = 48
RIGHT, WRONG = (30, 150, 60), (200, 40, 40)


def grid(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    notes: Sequence[str],
    right: Sequence[bool],
    columns: int,
    cell: int,
) -> Image.Image:
    """Pictures enlarged to fit `cell` x `cell` pixels; under each its caption and a grey note.

    A green frame stands for right, a red one for wrong.
    """
    font = ImageFont.load_default(11)
    rows = -(-len(pictures) // columns)
    step_x, step_y = cell + 8, cell + TEXT_HEIGHT
    sheet = Image.new("RGB", (columns * step_x + 8, rows * step_y + 8), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    cells = zip(pictures, captions, notes, right, strict=True)
    for i, (picture, caption, note, good) in enumerate(cells):
        x, y = 8 + (i % columns) * step_x, 8 + (i // columns) * step_y
        scale = cell / max(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        sheet.paste(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), (x, y))
        frame = (x - 3, y - 3, x + size[0] + 2, y + size[1] + 2)
        draw.rectangle(frame, outline=RIGHT if good else WRONG, width=2)
        lines = textwrap.wrap(caption.removeprefix("a photo of "), max(cell // 6, 8))[:2]
        draw.text((x, y + cell + 1), "\n".join(lines), fill=(0, 0, 0), font=font, spacing=1)
        draw.text((x, y + cell + 27), note, fill=(120, 120, 120), font=font)
    return sheet
