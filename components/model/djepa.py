"""D-JEPA·T2I: context encoder, predictor and flow head (paper, sections 2 and 3.1).

Shapes: B pictures, L text tokens, N image tokens of which the first V in a random order are
visible and H = N − V hidden, C channels a token, D width.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.model.blocks import TwoStreamBlock
from components.model.flow_head import FlowHead
from components.model.vope import image_positions, image_rotations, text_rotations


@dataclass(frozen=True)
class DJEPAConfig:
    """Sizes of the network."""

    channels: int  # of an image token
    text_width: int  # of a text state
    width: int  # of both streams
    heads: int
    encoder_blocks: int
    predictor_blocks: int
    mlp_ratio: float  # MLP width over stream width
    head_width: int
    head_blocks: int
    reference_grid: float  # VoPE's g, in tokens
    rope_base: float  # ω


class Encoder(nn.Module):
    """φ: text states and the given image tokens to features. Its EMA is the target encoder φ̄."""

    def __init__(self, config: DJEPAConfig) -> None:
        super().__init__()
        self.text_in = nn.Sequential(
            nn.LayerNorm(config.text_width), nn.Linear(config.text_width, config.width)
        )
        # Stands for a dropped prompt (classifier-free guidance).
        self.null_text = nn.Parameter(torch.randn(config.width) * 0.02)
        self.image_in = nn.Linear(config.channels, config.width)
        self.blocks = nn.ModuleList(
            TwoStreamBlock(config.width, config.heads, config.mlp_ratio)
            for _ in range(config.encoder_blocks)
        )
        self.text_norm = nn.LayerNorm(config.width)
        self.image_norm = nn.LayerNorm(config.width)

    def forward(
        self, states: Tensor, drop: Tensor, tokens: Tensor, rotations: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features of text (B, L, D) and of image tokens (B, V, D).

        states (B, L, text width); drop (B,) bool replaces a prompt by the null text;
        tokens (B, V, C); rotations and bias as in `TwoStreamBlock`, over L+V.
        """
        text = torch.where(drop[:, None, None], self.null_text, self.text_in(states))
        image = self.image_in(tokens)
        for block in self.blocks:
            text, image = block(text, image, rotations, bias)
        return self.text_norm(text), self.image_norm(image)


class Predictor(nn.Module):
    """γ: the encoder's output and a mask token at each hidden position to z (paper, section 2)."""

    def __init__(self, config: DJEPAConfig) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(config.width) * 0.02)
        last = config.predictor_blocks - 1
        self.blocks = nn.ModuleList(
            TwoStreamBlock(config.width, config.heads, config.mlp_ratio, text_ends=n == last)
            for n in range(config.predictor_blocks)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(
        self, text: Tensor, visible: Tensor, rotations: Tensor, bias: Tensor, count: int
    ) -> Tensor:
        """z (B, count, D) of the first hidden tokens; rotations over L+V+H.

        text (B, L, D), visible (B, V, D).
        """
        hidden = rotations.shape[1] - text.shape[1] - visible.shape[1]
        masks = self.mask_token.expand(visible.shape[0], hidden, -1)
        image = torch.cat([visible, masks], dim=1)
        *before, last = self.blocks
        for block in before:
            text, image = block(text, image, rotations, bias)
        seen = visible.shape[1]
        _, image = last(text, image, rotations, bias, slice(seen, seen + count))
        return self.norm(image)


class DJEPA(nn.Module):
    """Context encoder, predictor, feature projection and flow head; the target encoder is apart."""

    def __init__(self, config: DJEPAConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.predictor = Predictor(config)
        # The small MLP between z and the target features (D-JEPA, as this paper's L_pred).
        self.projection = nn.Sequential(
            nn.Linear(config.width, config.width), nn.GELU(), nn.Linear(config.width, config.width)
        )
        self.head = FlowHead(config.channels, config.width, config.head_width, config.head_blocks)

    def positions(self, order: Tensor, size: tuple[int, int], length: int) -> Tensor:
        """Rotations (B, L+N, d/2) of `length` text tokens, then image tokens in `order` (B, N)."""
        head_width = self.config.width // self.config.heads
        image = image_rotations(
            image_positions(*size, self.config.reference_grid), head_width, self.config.rope_base
        ).to(order.device)
        text = text_rotations(length, head_width, self.config.rope_base).to(order.device)
        return torch.cat([text.expand(order.shape[0], -1, -1), image[order]], dim=1)

    def bias(self, mask: Tensor, drop: Tensor, count: int) -> Tensor:
        """Attention bias (B, 1, 1, L+count): −inf at padding; a dropped prompt is one token."""
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = torch.where(drop[:, None], first, mask)
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
        return F.pad(bias, (0, count))[:, None, None]

    def condition(
        self,
        states: Tensor,
        mask: Tensor,
        tokens: Tensor,
        order: Tensor,
        visible: int,
        size: tuple[int, int],
        drop: Tensor | None = None,
        count: int | None = None,
    ) -> Tensor:
        """z (B, H, D) of the hidden tokens, in the order's order; of the first `count` if given.

        states (B, L, text width), mask (B, L) bool; tokens (B, N, C) in raster order; order (B, N)
        a permutation of raster positions whose first `visible` are seen; size (W, H) in tokens;
        drop (B,) bool the prompts to leave out.
        """
        batch, length = mask.shape
        if drop is None:
            drop = torch.zeros(batch, dtype=torch.bool, device=mask.device)
        rotations = self.positions(order, size, length)
        bias = self.bias(mask, drop, order.shape[1])
        # Only visible tokens are gathered: hidden ones reach nothing before the flow head.
        seen = gather(tokens, order[:, :visible])
        end = length + visible
        text, image = self.encoder(states, drop, seen, rotations[:, :end], bias[..., :end])
        hidden = order.shape[1] - visible
        return self.predictor(text, image, rotations, bias, hidden if count is None else count)

    def target(
        self,
        encoder: Encoder,
        states: Tensor,
        mask: Tensor,
        tokens: Tensor,
        order: Tensor,
        visible: int,
        size: tuple[int, int],
    ) -> Tensor:
        """Normalised features (B, H, D) of the hidden tokens by the target encoder; no gradient."""
        with torch.no_grad():
            drop = torch.zeros(mask.shape[0], dtype=torch.bool, device=mask.device)
            raster = torch.arange(tokens.shape[1], device=tokens.device)[None]
            rotations = self.positions(raster, size, mask.shape[1])
            bias = self.bias(mask, drop, tokens.shape[1])
            _, features = encoder(states, drop, tokens, rotations, bias)
            return F.layer_norm(gather(features, order[:, visible:]), features.shape[-1:])

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and the weights as diffusers names them."""
        from components.parts import save_part

        save_part(folder, self, asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder: Path) -> "DJEPA":
        """Read what `save_pretrained` wrote; UserError names what is missing or unfit."""
        from components.parts import load_part

        return load_part(folder, lambda config: cls(DJEPAConfig(**config)))


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, N, C) at index (B, K): (B, K, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
