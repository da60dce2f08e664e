"""Two-stream blocks: text and image have their own weights and meet in one attention.

Shapes: B pictures, L text tokens, N image tokens, H heads, D width, d = D/H head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.model.layout import Mask, attend
from components.model.vope import normalise_and_rotate


class Stream(nn.Module):
    """One stream's half of a block: norms, Q/K/V, projection and MLP.

    A stream that `ends` here gives keys and values only; nothing reads what would come after.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, ends: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.ends = ends
        hidden = int(width * mlp_ratio)
        # Norms without weights and layers without biases: their gradients are sums over all
        # tokens, a tenth of a small model's step, and the next layer's weights do their work.
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        # RMSNorm with a learned scale on Q and on K (supplement "QK-norm").
        self.qk_scale = nn.Parameter(torch.ones(2, 1, width // heads))
        if ends:
            return
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        # Every block starts as the identity.
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.down.weight)

    def queries_keys_values(self, x: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised, rotated queries and keys (B, N, 2, H, d) and values (B, N, H, d)."""
        return self.projected(self.norm(x), rotations)

    def projected(self, normed: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
        """As `queries_keys_values`, of tokens (B, N, D) that are normalised already."""
        qkv = self.qkv(normed).unflatten(-1, (3, self.heads, -1))
        return normalise_and_rotate(qkv[:, :, :2], self.qk_scale, rotations), qkv[:, :, 2]

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the attention's result (B, N, D) and the MLP to the residual stream x (B, N, D)."""
        x = x + self.proj(attended)
        return x + self.down(F.gelu(self.up(self.norm(x))))


class TwoStreamBlock(nn.Module):
    """Joint, bidirectional attention of a text and an image stream (paper, "Architecture")."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, text_ends: bool = False) -> None:
        super().__init__()
        self.text = Stream(width, heads, mlp_ratio, text_ends)
        self.image = Stream(width, heads, mlp_ratio)

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        rotations: Tensor,
        mask: Mask,
        wanted: slice = slice(None),
    ) -> tuple[Tensor, Tensor]:
        """Text (B, L, D) and image (B, N, D) to the same shapes; of the image the `wanted` rows.

        rotations (B or 1, L+N, d/2) are the positions of text then image; mask: of `Layout.mask`,
        for all tokens, or for the wanted image tokens where the text ends. A text that ends here
        is given back as it came.
        """
        length = text.shape[1]
        qk_text, v_text = self.text.queries_keys_values(text, rotations[:, :length])
        qk_image, v_image = self.image.queries_keys_values(image, rotations[:, length:])
        qk = torch.cat([qk_text, qk_image], dim=1)
        v = torch.cat([v_text, v_image], dim=1)
        q, k = qk.permute(2, 0, 3, 1, 4).unbind(0)  # B H L+N d
        if self.text.ends:  # only the wanted image tokens ask
            q = q[:, :, length:][:, :, wanted]
        attended = attend(q, k, v.transpose(1, 2), mask)
        if not self.text.ends:
            text = self.text.finish(text, attended[:, :length])
            attended = attended[:, length:][:, wanted]
        return text, self.image.finish(image[:, wanted], attended)
