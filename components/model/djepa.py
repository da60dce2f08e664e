"""D-JEPA·T2I: context encoder, predictor and flow head (paper, sections 2 and 3.1).

Shapes: B pictures, L text tokens, N image tokens of which the first V in a random order are
visible and H = N − V hidden, C channels a token, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.model.blocks import TwoStreamBlock
from components.model.flow_head import FlowHead
from components.model.layout import Layout, Mask
from components.model.network import Network, NetworkConfig, gather
from components.model.prompt import Prompt, TextInput


@dataclass(frozen=True)
class DJEPAConfig(NetworkConfig):
    """Sizes of the network."""

    encoder_blocks: int
    predictor_blocks: int
    head_width: int
    head_blocks: int


class Encoder(nn.Module):
    """φ: text and the given image tokens to features. Its EMA is the target encoder φ̄."""

    def __init__(self, config: DJEPAConfig) -> None:
        super().__init__()
        self.text_in = TextInput(config.text_width, config.width, config.buffer_tokens)
        self.image_in = nn.Linear(config.channels, config.width)
        self.blocks = nn.ModuleList(
            TwoStreamBlock(config.width, config.heads, config.mlp_ratio)
            for _ in range(config.encoder_blocks)
        )
        self.text_norm = nn.LayerNorm(config.width)
        self.image_norm = nn.LayerNorm(config.width)

    def forward(
        self, text: Tensor, tokens: Tensor, rotations: Tensor, mask: Mask
    ) -> tuple[Tensor, Tensor]:
        """Features of text (B, L, D) and of image tokens (B, V, D).

        text (B, L, D) of `text_in`; tokens (B, V, C); rotations and mask as in `TwoStreamBlock`,
        over L+V.
        """
        image = self.image_in(tokens)
        for block in self.blocks:
            text, image = block(text, image, rotations, mask)
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

    def forward(self, text: Tensor, visible: Tensor, layout: Layout, count: int) -> Tensor:
        """z (B, count, D) of the first hidden tokens.

        text (B, L, D), visible (B, V, D); the layout is that of L+V+H tokens.
        """
        length, seen = text.shape[1], visible.shape[1]
        end = layout.rotations.shape[1]
        masks = self.mask_token.expand(visible.shape[0], end - length - seen, -1)
        image = torch.cat([visible, masks], dim=1)
        *before, last = self.blocks
        if before:
            mask = layout.mask(end)
            for block in before:
                text, image = block(text, image, layout.rotations, mask)
        wanted = slice(seen, seen + count)
        mask = layout.mask(end, slice(length + seen, length + seen + count))
        _, image = last(text, image, layout.rotations, mask, wanted)
        return self.norm(image)


class DJEPA(Network):
    """Context encoder, predictor, feature projection and flow head; the target encoder is apart."""

    Config = DJEPAConfig

    def __init__(self, config: DJEPAConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.predictor = Predictor(config)
        # The small MLP between z and the target features (D-JEPA, as this paper's L_pred).
        self.projection = nn.Sequential(
            nn.Linear(config.width, config.width), nn.GELU(), nn.Linear(config.width, config.width)
        )
        self.head = FlowHead(config.channels, config.width, config.head_width, config.head_blocks)

    def predict(
        self, text: Tensor, seen: Tensor, layout: Layout, count: int | None = None
    ) -> Tensor:
        """z (B, H, D) of the hidden tokens, of the first `count` if given.

        text (B, L, D) of `encoder.text_in`; seen (B, V, C) the visible tokens; the layout is that
        of text, visible and hidden tokens. Hidden tokens reach nothing before the flow head.
        """
        end = text.shape[1] + seen.shape[1]
        features = self.encoder(text, seen, layout.rotations[:, :end], layout.mask(end))
        hidden = layout.rotations.shape[1] - end
        return self.predictor(*features, layout, hidden if count is None else count)

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
        shift: float | None = None,
    ) -> Tensor:
        """z (B, H, D) of the hidden tokens, in the order's order; of the first `count` if given.

        states (B, L, text width), mask (B, L) bool; tokens (B, W·H, C) in raster order; order
        (B, N) different raster positions, all or some, whose first `visible` are seen; size (W, H)
        in tokens; drop (B,) bool the prompts to leave out; shift: VoPE's b.
        """
        prompt = self.prompt(states, mask, drop)
        layout = self.layout(prompt, order, size, shift)
        seen = gather(tokens, order[:, :visible])
        return self.predict(self.encoder.text_in(prompt), seen, layout, count)


@torch.no_grad()
def target_features(
    encoder: Encoder, prompt: Prompt, tokens: Tensor, layout: Layout, visible: int
) -> Tensor:
    """Normalised features (B, H, D) of the hidden tokens by the target encoder φ̄; no gradient.

    Paper, section 3.1. φ̄ sees the whole prompt and all image tokens (B, N, C), the `visible`
    first, as the layout of L+N tokens has them.
    """
    text = encoder.text_in(prompt)
    _, features = encoder(text, tokens, layout.rotations, layout.mask(layout.rotations.shape[1]))
    return F.layer_norm(features[:, visible:], features.shape[-1:])
