"""Two-stream blocks: text and image have their own weights and meet in one attention.

Shapes: B pictures, L text tokens, N image tokens, H heads, D width, d = D/H head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.model.vope import rotate


class Stream(nn.Module):
    """One stream's half of a block: norms, Q/K/V, projection and MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        # RMSNorm with a learned scale on Q and on K (supplement "QK-norm").
        self.qk_scale = nn.Parameter(torch.ones(2, 1, width // heads))
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        # Every block starts as the identity.
        for layer in (self.proj, self.down):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised queries and keys (B, N, 2, H, d) and values (B, N, H, d) of x (B, N, D)."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        qk = F.rms_norm(qkv[:, :, :2], qkv.shape[-1:], eps=1e-6) * self.qk_scale
        return qk, qkv[:, :, 2]

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the attention's result (B, N, D) and the MLP to the residual stream x (B, N, D)."""
        x = x + self.proj(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TwoStreamBlock(nn.Module):
    """Joint, bidirectional attention of a text and an image stream (paper, "Architecture")."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.text = Stream(width, heads, mlp_ratio)
        self.image = Stream(width, heads, mlp_ratio)

    def forward(
        self, text: Tensor, image: Tensor, rotations: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Text (B, L, D) and image (B, N, D) to the same shapes.

        rotations (B or 1, L+N, d/2) are the positions of text then image; bias (B, 1, 1, L+N)
        is 0 where a key may be seen and −inf at the text's padding.
        """
        length = text.shape[1]
        qk_text, v_text = self.text.queries_keys_values(text)
        qk_image, v_image = self.image.queries_keys_values(image)
        qk = rotate(torch.cat([qk_text, qk_image], dim=1), rotations)
        v = torch.cat([v_text, v_image], dim=1)
        q, k = qk.permute(2, 0, 3, 1, 4).unbind(0)  # B H L+N d
        attended = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=bias)
        attended = attended.transpose(1, 2).flatten(2)
        return (
            self.text.finish(text, attended[:, :length]),
            self.image.finish(image, attended[:, length:]),
        )
