"""The text side of a network's input: states of a frozen encoder, buffer tokens, dropped prompts.

Shapes: B rows, L text tokens, E width of a text state, D width of the network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Prompt:
    """States (B, L, E); which learned token stands in for each, (B, L), 0 = none; owners (B, L).

    Owners are those of `Layout`: −1 is padding.
    """

    states: Tensor
    learned: Tensor
    owner: Tensor

    @classmethod
    def of(cls, states: Tensor, mask: Tensor, drop: Tensor | None, buffers: int) -> Prompt:
        """From states, their mask (B, L) bool and the prompts to drop (B,) bool.

        A dropped prompt becomes one null token; `buffers` learned tokens come before each.
        """
        learned = torch.zeros(mask.shape, dtype=torch.long, device=mask.device)
        if drop is not None:
            first = torch.arange(mask.shape[1], device=mask.device) == 0
            mask = torch.where(drop[:, None], first, mask)
            learned = torch.where(drop[:, None], NULL, learned)
        owner = mask.long() - 1
        if buffers:
            states = F.pad(states, (0, 0, buffers, 0))
            owner = F.pad(owner, (buffers, 0))
            own = torch.arange(NULL + 1, NULL + 1 + buffers, device=mask.device)
            learned = torch.cat([own.expand(mask.shape[0], -1), learned], dim=1)
        return cls(states, learned, owner)


NULL = 1  # the learned token of a dropped prompt (classifier-free guidance); buffers follow it


class TextInput(nn.Module):
    """A prompt to the first block's text stream: (B, L, D)."""

    def __init__(self, text_width: int, width: int, buffers: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(text_width)
        self.linear = nn.Linear(text_width, width)
        self.learned = nn.Parameter(torch.randn(1 + buffers, width) * 0.02)

    def forward(self, prompt: Prompt) -> Tensor:
        """Embed the states; put the learned tokens where the prompt has them."""
        text = self.linear(self.norm(prompt.states))
        own = self.learned[(prompt.learned - 1).clamp_min(0)]
        return torch.where((prompt.learned > 0)[..., None], own, text)
