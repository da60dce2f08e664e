"""A batch as the losses read it: pictures of one shape side by side, or of any shapes packed.

Shapes: B rows, L text tokens, V visible and H hidden image tokens, C channels a token, K draws of
(t, noise) a token. Packed pictures lie end to end in one row (B = 1): no token is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from components.model.layout import Layout
from components.model.network import Network, gather
from components.model.prompt import Prompt
from components.training.draw import Draw, moved


@dataclass(frozen=True)
class Batch:
    """Tokens in the order of a draw, where they stand, and what is random about the loss."""

    x: Tensor  # (B, V+H, C), the visible first
    visible: int  # V
    prompt: Prompt  # some of the prompts dropped
    layout: Layout  # of prompt, visible, hidden
    whole_prompt: Prompt  # none dropped: what the target encoder reads
    whole_layout: Layout
    t: Tensor  # (B, 1, K), or (1, pictures, K) packed
    noise: Tensor  # (B, H, K, C)
    picture: Tensor | None  # packed: the picture of each hidden token, (H,)


def grouped(
    network: Network,
    tokens: Tensor,
    states: Tensor,
    mask: Tensor,
    size: tuple[int, int],
    draw: Draw,
) -> Batch:
    """Pictures of one shape: tokens (B, W·H, C) in raster order, states (B, L, E), mask (B, L)."""
    prompt, whole = network.prompt(states, mask, draw.drop), network.prompt(states, mask)
    layout = network.layout(prompt, draw.order, size)
    owner = torch.cat([whole.owner, torch.zeros_like(draw.order)], dim=1)
    return Batch(
        x=gather(tokens, draw.order),
        visible=draw.visible,
        prompt=prompt,
        layout=layout,
        whole_prompt=whole,
        whole_layout=replace(layout, owner=owner),
        t=draw.t,
        noise=draw.noise,
        picture=None,
    )


@dataclass(frozen=True)
class Picture:
    """One picture on its own: tokens (1, W·H, C) in raster order, text states (1, L, E).

    In the CPU's memory, where its draw can be looked at without waiting for a GPU.
    """

    tokens: Tensor
    states: Tensor
    size: tuple[int, int]
    draw: Draw


def packed(network: Network, pictures: Sequence[Picture], device: str = "cpu") -> Batch:
    """Pictures of any shapes and mask ratios end to end, each with a draw of its own."""
    parts = []
    for each in pictures:
        tokens, states = moved(each.tokens, device), moved(each.states, device)
        everything = torch.ones(states.shape[:2], dtype=torch.bool, device=device)
        parts.append(grouped(network, tokens, states, everything, each.size, each.draw.to(device)))
    visible = [part.visible for part in parts]
    hidden = [part.noise.shape[1] for part in parts]
    seen = [part.x[:, :v] for part, v in zip(parts, visible, strict=True)]
    rest = [part.x[:, v:] for part, v in zip(parts, visible, strict=True)]
    # Nothing is padded but a dropped prompt, behind its buffers and the null token.
    words = [part.whole_prompt.owner.shape[1] for part in parts]
    kept = [
        length - each.states.shape[1] + 1 if each.draw.drop else length
        for length, each in zip(words, pictures, strict=True)
    ]
    prompt, layout = _row([part.prompt for part in parts], [p.layout for p in parts], visible, kept)
    whole, whole_layout = _row(
        [part.whole_prompt for part in parts], [p.whole_layout for p in parts], visible, words
    )
    return Batch(
        x=torch.cat(seen + rest, dim=1),
        visible=sum(visible),
        prompt=prompt,
        layout=layout,
        whole_prompt=whole,
        whole_layout=whole_layout,
        t=torch.cat([part.t for part in parts], dim=1),
        noise=torch.cat([part.noise for part in parts], dim=1),
        picture=_numbers(hidden, device),
    )


def _row(
    prompts: Sequence[Prompt],
    layouts: Sequence[Layout],
    visible: Sequence[int],
    lengths: Sequence[int],
) -> tuple[Prompt, Layout]:
    """Prompts' first `lengths` tokens end to end, then all visible, then all hidden tokens."""
    device = str(prompts[0].states.device)
    numbers = _numbers(lengths, device)
    row = Prompt(
        torch.cat([p.states[:, :n] for p, n in zip(prompts, lengths, strict=True)], dim=1),
        torch.cat([p.learned[:, :n] for p, n in zip(prompts, lengths, strict=True)], dim=1),
        numbers[None],
    )
    texts, seen, rest, counts = [], [], [], []
    for prompt, layout, length, v in zip(prompts, layouts, lengths, visible, strict=True):
        image = layout.rotations[:, prompt.states.shape[1] :]
        texts.append(layout.rotations[:, :length])
        seen.append(image[:, :v])
        rest.append(image[:, v:])
        counts.append(image.shape[1] - v)
    owner = torch.cat([numbers, _numbers(visible, device), _numbers(counts, device)])
    return row, Layout(torch.cat(texts + seen + rest, dim=1), owner[None], packed=True)


def _numbers(counts: Sequence[int], device: str) -> Tensor:
    """0 counts[0] times, 1 counts[1] times, and so on."""
    return moved(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), device)
