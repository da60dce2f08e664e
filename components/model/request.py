"""What a call of the pipeline asks for, checked before any work starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from components.errors import UserError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Request:
    """One picture: its prompt, its size (W, H) in tokens, VoPE's b (None = centred)."""

    prompt: str
    size: tuple[int, int]
    shift: float | None


def requests(
    prompt: str | Sequence[str],
    width: int | Sequence[int],
    height: int | Sequence[int],
    layout_offset: float | Sequence[float | None] | None,
    copies: int,
    patch: int,
) -> list[Request]:
    """The pictures of a call, prompt by prompt, each prompt's `copies` together.

    Lists have one value a prompt, in pixels where they are sizes; patch: pixels a token's side.
    Raises UserError for whatever does not fit.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise UserError("There is no prompt: give a text or a list of texts.")
    for number, text in enumerate(prompts):
        if not isinstance(text, str):
            raise UserError(f"Prompt {number} is {text!r}, no text: give a text or a list of them.")
        if not text.strip():
            raise UserError(f"Prompt {number} is empty: say what to draw.")
    if not isinstance(copies, int) or copies < 1:
        raise UserError(f"num_images_per_prompt is {copies!r}: give a whole number from 1 on.")
    widths = _one_a_prompt("width", width, len(prompts))
    heights = _one_a_prompt("height", height, len(prompts))
    offsets = _one_a_prompt("layout_offset", layout_offset, len(prompts))
    wanted = []
    for text, wide, high, offset in zip(prompts, widths, heights, offsets, strict=True):
        sides = (wide, high)
        if any(not isinstance(s, int) or s < patch or s % patch for s in sides):
            raise UserError(
                f"Size {wide}x{high} does not fit: width and height must be multiples of {patch} "
                "pixels, from there on."
            )
        size = (wide // patch, high // patch)
        spare = abs(size[0] - size[1])
        if offset is not None and not 0 <= offset <= spare:
            raise UserError(
                f"layout_offset {offset} takes a picture of {wide}x{high} off the reference field: "
                f"give 0 to {spare} tokens (centred: {spare / 2:g})."
            )
        wanted += [Request(text, size, offset)] * copies
    return wanted


def one_generator_a_picture(
    generator: torch.Generator | Sequence[torch.Generator] | None, pictures: int
) -> list[torch.Generator | None]:
    """A list as long as the pictures; a single generator is drawn from picture by picture.

    UserError for another number of generators.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return [generator] * pictures
    generators = list(generator)
    if len(generators) != pictures:
        raise UserError(
            f"{len(generators)} generators for {pictures} pictures: give one for each, prompts × "
            "num_images_per_prompt, or a single one for all."
        )
    if not all(isinstance(each, torch.Generator) for each in generators):
        raise UserError("generator must be a torch.Generator, or a list of them; not seeds.")
    return list(generators)


def _one_a_prompt(name: str, value: Value | Sequence[Value], prompts: int) -> Sequence[Value]:
    if not isinstance(value, list | tuple):
        return [value] * prompts  # type: ignore[list-item]
    if len(value) != prompts:
        raise UserError(f"{name} has {len(value)} values for {prompts} prompts: give one for each.")
    return value
