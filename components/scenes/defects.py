"""What is wrong with some raw pictures, so that the curation has something to find."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from components.errors import UserError

Pixels = NDArray[np.uint8]
Settings = Mapping[str, Any]

KINDS = ("lettering", "too_small", "blurred", "noisy", "blank", "repeated")
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


@functools.cache
def _font(capital: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, its capitals `capital` px tall or one more."""
    size = capital
    while True:
        font = ImageFont.load_default(size=size)
        assert isinstance(font, ImageFont.FreeTypeFont)
        _, top, _, bottom = font.getbbox("H")
        if bottom - top >= capital:
            return font
        size += 1


def lettering(pixels: Pixels, rng: np.random.Generator, settings: Settings) -> Pixels:
    """A word drawn over the picture, on a plate or outlined; black or white against its ground.

    Args:
        pixels: (H, W, 3).
        rng: draws word, place, size and colours.
        settings: `height` of a capital [least, most] and `outline` in px, `plate` the share of
            words that stand on a plate, `words`.

    Raises:
        UserError: no word is narrow enough for the picture.
    """
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    font = _font(int(rng.integers(settings["height"][0], settings["height"][1] + 1)))
    edge = 2 * int(settings["outline"])
    fitting = []
    for word in settings["words"]:
        x1, y1, x2, y2 = (round(v) for v in font.getbbox(word))
        if x2 - x1 + 2 * edge <= image.width and y2 - y1 + 2 * edge <= image.height:
            fitting.append((word, x1, y1, x2 - x1, y2 - y1))
    if not fitting:
        raise UserError(
            f"No word of data.defects.lettering.words fits into {image.width}x{image.height} "
            "pixels: add shorter words or lower data.defects.lettering.height in params/data."
        )
    word, x1, y1, width, height = fitting[int(rng.integers(len(fitting)))]
    left = int(rng.integers(edge, image.width - width - edge + 1))
    top = int(rng.integers(edge, image.height - height - edge + 1))
    plate = (left - edge, top - edge, left + width + edge, top + height + edge)
    on_plate = rng.random() < settings["plate"]
    dark = rng.random() < 0.5
    if not on_plate:
        dark = pixels[top : top + height, left : left + width].mean() >= 128
    ink, ground = (BLACK, WHITE) if dark else (WHITE, BLACK)
    if on_plate:
        draw.rectangle(plate, fill=ground)
    draw.text(
        (left - x1, top - y1),
        word,
        fill=ink,
        font=font,
        stroke_width=0 if on_plate else int(settings["outline"]),
        stroke_fill=ground,
    )
    return np.asarray(image)


def blurred(pixels: Pixels, rng: np.random.Generator, settings: Settings) -> Pixels:
    """Gaussian blur; `settings["sigma"]` [least, most] in px."""
    sigma = rng.uniform(*settings["sigma"])
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def noisy(pixels: Pixels, rng: np.random.Generator, settings: Settings) -> Pixels:
    """Gaussian noise, each channel its own; `settings["sigma"]` [least, most] in levels of 255."""
    sigma = rng.uniform(*settings["sigma"])
    noise = sigma * rng.standard_normal(pixels.shape)
    return np.clip(np.floor(pixels + noise + 0.5), 0, 255).astype(np.uint8)


def blank(pixels: Pixels, rng: np.random.Generator, settings: Settings) -> Pixels:
    """One colour and nothing else, or a faint gradient; `settings["spread"]` is its most levels."""
    width = pixels.shape[1]
    color = rng.uniform(0, 255, size=3)
    # Half are perfectly flat.
    spread = max(0.0, rng.uniform(-1, 1)) * settings["spread"]
    slope = (np.arange(width) + 0.5) / width - 0.5
    flat = np.broadcast_to(color + spread * slope[None, :, None], pixels.shape)
    return np.clip(np.floor(flat + 0.5), 0, 255).astype(np.uint8)


# Defects of the pixels alone; the size and the repetition are made where pictures are drawn.
PIXELS: dict[str, Callable[[Pixels, np.random.Generator, Settings], Pixels]] = {
    "lettering": lettering,
    "blurred": blurred,
    "noisy": noisy,
    "blank": blank,
}


def nearly(
    pixels: Pixels, rng: np.random.Generator, settings: Settings
) -> tuple[Pixels, int | None, tuple[int, int]]:
    """A near copy: encoded again, moved, or a little lighter or darker.

    Args:
        pixels: (H, W, 3), the decoded original.
        rng: draws which of the three.
        settings: `quality` of the new encoding, `shift` in px, `brightness` in levels of 255.

    Returns:
        The pixels, the JPEG quality to write them with (None: the usual), and by how many
        pixels the content moved right and down.
    """
    way = int(rng.integers(3))
    if way == 0:
        return pixels, int(settings["quality"]), (0, 0)
    if way == 1:
        shift = int(settings["shift"])
        dx, dy = (shift, 0) if rng.random() < 0.5 else (0, shift)
        height, width, _ = pixels.shape
        padded = np.pad(pixels, ((dy, 0), (dx, 0), (0, 0)), mode="edge")
        return padded[:height, :width], None, (dx, dy)
    change = int(settings["brightness"]) * (1 if rng.random() < 0.5 else -1)
    return np.clip(pixels.astype(np.int16) + change, 0, 255).astype(np.uint8), None, (0, 0)
