"""Where the tokens of a batch stand and which of them see each other.

Shapes: B pictures, L text tokens, N image tokens, d head width. The text comes first. A batch is
either B pictures of one shape, their texts padded to the longest, or pictures of any shapes packed
end to end in one row (B = 1), where nothing is padded and a token sees its own picture only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:  # its import takes half a second, and only packed batches on a GPU need it
    from torch.nn.attention.flex_attention import BlockMask

Mask: TypeAlias = "Tensor | BlockMask | None"


@dataclass(frozen=True)
class Layout:
    """Rotations (B, L+N, d/2) and owners (B, L+N) of the tokens of text, then image."""

    rotations: Tensor
    owner: Tensor  # int: the number of a token's picture in its row; −1 at the text's padding
    packed: bool  # several pictures a row
    padded: bool = True  # whether there may be padding, which takes a mask and a slower kernel

    def mask(self, end: int, asking: slice = slice(None)) -> Mask:
        """For the attention of the tokens `asking` to all before `end`.

        Pictures of one shape: additive (B, 1, 1, end), −inf at padding, or None where there is
        none. Packed: on a CPU (1, 1, queries, end) bool, on a GPU a block mask, which skips what
        nobody sees.
        """
        if not self.packed and not self.padded:
            return None
        keys = self.owner[:, :end]
        if not self.packed:
            bias = torch.zeros(keys.shape, device=keys.device)
            return bias.masked_fill(keys < 0, float("-inf"))[:, None, None]
        queries = keys[:, asking]
        if keys.device.type != "cuda":
            return (queries[:, :, None] == keys[:, None, :])[:, None]

        from torch.nn.attention.flex_attention import create_block_mask

        def same_picture(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return queries[0, query] == keys[0, key]

        return create_block_mask(
            same_picture, None, None, queries.shape[1], end, device=str(keys.device)
        )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention of q (B, H, n, d) to k and v (B, H, m, d) under a `Layout.mask`: (B, n, H·d)."""
    if mask is None or isinstance(mask, Tensor):
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        attended = _compiled_flex_attention()(q, k, v, block_mask=mask)
    return attended.transpose(1, 2).flatten(2)


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    # Without compilation it computes what the block mask leaves out too.
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
