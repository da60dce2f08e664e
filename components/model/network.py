"""What D-JEPA and its baseline share: sizes, a prompt's and an image's places, saving.

Shapes: B pictures, L text tokens, N image tokens, d head width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from components.errors import UserError
from components.model.layout import Layout
from components.model.prompt import Prompt
from components.model.vope import POSITIONS, rotary_grid, text_rotations


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes that both networks have. Raises UserError for heads or positions that cannot be."""

    channels: int  # of an image token
    text_width: int  # of a text state
    width: int  # of both streams
    heads: int
    mlp_ratio: float  # MLP width over stream width
    buffer_tokens: int  # learned tokens before the text, as MAR's before its image
    positions: str  # vope | rope | ntk_rope
    reference_grid: float  # VoPE's g, in tokens; NTK-RoPE: longest side that ω was trained for
    rope_base: float  # ω

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 4:
            raise UserError(
                f"model.network.width {self.width} over {self.heads} heads must be a multiple of "
                "4 a head, for two axes of rotated pairs; change params/model."
            )
        if self.positions not in POSITIONS:
            raise UserError(
                f"model.network.positions is {self.positions!r}: set it to "
                f"{' or '.join(POSITIONS)} in params/model."
            )


class Network(nn.Module):
    """A network over text and image tokens."""

    Config: ClassVar[type[NetworkConfig]]

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config

    def prompt(self, states: Tensor, mask: Tensor, drop: Tensor | None = None) -> Prompt:
        """Text states (B, L, text width) and their mask (B, L) bool, buffer tokens put before.

        drop (B,) bool: the prompts to leave out, each a single null token then.
        """
        return Prompt.of(states, mask, drop, self.config.buffer_tokens)

    def layout(
        self, prompt: Prompt, order: Tensor, size: tuple[int, int], shift: float | None = None
    ) -> Layout:
        """Layout of a prompt's text, then image tokens in `order` (B, N), raster positions.

        size (W, H) in tokens; shift: VoPE's b, None = centred.
        """
        rotations = self.rotations(prompt.states.shape[1], order, size, shift)
        owner = torch.cat([prompt.owner, torch.zeros_like(order)], dim=1)
        return Layout(rotations, owner, packed=False)

    def rotations(
        self, length: int, order: Tensor, size: tuple[int, int], shift: float | None = None
    ) -> Tensor:
        """Rotations (B, L+N, d/2) of `length` text tokens, then image tokens in `order` (B, N)."""
        c = self.config
        head_width = c.width // c.heads
        field = (c.positions, size, c.reference_grid, head_width, c.rope_base, shift)
        image = rotary_grid(*field, device=order.device)[order]
        text = text_rotations(length, head_width, c.rope_base, order.device)
        return torch.cat([text.expand(order.shape[0], -1, -1), image], dim=1)

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and the weights as diffusers names them."""
        from components.parts import save_part

        save_part(folder, self, asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """Read what `save_pretrained` wrote; UserError names what is missing or unfit."""
        from components.parts import load_part

        return load_part(folder, lambda config: cls(cls.Config(**config)))


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, N, C) at index (B, K): (B, K, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
