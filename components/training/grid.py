"""Sample grids: what the model draws for a few fixed prompts, step by step."""

from pathlib import Path

from PIL import Image, ImageDraw

from components.files import atomic_file


def save_grid(path: Path, images: list[Image.Image], captions: list[str], columns: int) -> None:
    """Write pictures in rows, enlarged, each over its caption, as one PNG."""
    cell, text = 160, 26
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * cell, rows * (cell + text)), "white")
    draw = ImageDraw.Draw(grid)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = index % columns * cell, index // columns * (cell + text)
        scale = (cell - 8) / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        grid.paste(image.resize(size, Image.Resampling.NEAREST), (left + 4, top + 4))
        words, line, lines = caption.removeprefix("a photo of ").split(), "", []
        for word in words:
            if len(line) + len(word) > 25:
                lines.append(line)
                line = ""
            line = f"{line} {word}".strip()
        draw.text(
            (left + 4, top + cell - 2), "\n".join([*lines, line][:2]), fill="black", spacing=0
        )
    with atomic_file(path) as temporary:
        grid.save(temporary, format="PNG")
