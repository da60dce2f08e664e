"""The baseline of the paper's question of equal compute: a flow-matching diffusion transformer.

The same two-stream blocks over the same tokens, text states and positions as D-JEPA; no masks, no
order, no flow head. All tokens of a picture are at one time t, which modulates the image stream
of each block: adaptive layer norm with one network for all blocks and a table a block (PixArt-α).

Shapes: B pictures, L text tokens, N image tokens, C channels a token, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.model.blocks import TwoStreamBlock
from components.model.flow_head import time_features
from components.model.layout import Layout, Mask, attend
from components.model.network import Network, NetworkConfig
from components.model.prompt import TextInput


@dataclass(frozen=True)
class FlowDiTConfig(NetworkConfig):
    """Sizes of the network."""

    blocks: int


class TimedBlock(TwoStreamBlock):
    """A two-stream block whose image stream is shifted, scaled and gated by the time."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, text_ends: bool) -> None:
        super().__init__(width, heads, mlp_ratio, text_ends)
        # Two triples of shift, scale and gate: for the attention and for the MLP.
        self.table = nn.Parameter(torch.zeros(6, width))

    def forward(  # type: ignore[override]
        self, text: Tensor, image: Tensor, rotations: Tensor, mask: Mask, moment: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `TwoStreamBlock`; moment (B, 6, D) is what the time says to every block."""
        length = text.shape[1]
        shift, scale, gate, shift2, scale2, gate2 = (moment + self.table)[:, :, None].unbind(1)
        qk_text, v_text = self.text.queries_keys_values(text, rotations[:, :length])
        normed = torch.addcmul(shift, self.image.norm(image), 1 + scale)
        qk_image, v_image = self.image.projected(normed, rotations[:, length:])
        q, k = torch.cat([qk_text, qk_image], dim=1).permute(2, 0, 3, 1, 4).unbind(0)
        v = torch.cat([v_text, v_image], dim=1).transpose(1, 2)
        if self.text.ends:
            q = q[:, :, length:]
        attended = attend(q, k, v, mask)
        if not self.text.ends:
            text = self.text.finish(text, attended[:, :length])
            attended = attended[:, length:]
        image = image + gate * self.image.proj(attended)
        normed = torch.addcmul(shift2, self.image.norm(image), 1 + scale2)
        image = image + gate2 * self.image.down(F.gelu(self.image.up(normed)))
        return text, image


class FlowDiT(Network):
    """v_θ(x^t, t, text) over all tokens of a picture at once."""

    Config = FlowDiTConfig

    def __init__(self, config: FlowDiTConfig) -> None:
        super().__init__(config)
        width = config.width
        self.text_in = TextInput(config.text_width, width, config.buffer_tokens)
        self.image_in = nn.Linear(config.channels, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.from_t = nn.Linear(width, 6 * width)
        last = config.blocks - 1
        self.blocks = nn.ModuleList(
            TimedBlock(width, config.heads, config.mlp_ratio, text_ends=n == last)
            for n in range(config.blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, config.channels)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        nn.init.zeros_(self.from_t.weight)
        with torch.no_grad():  # every gate is open at first: the blocks' own zeros close them
            self.from_t.bias.zero_().view(6, width)[[2, 5]] = 1.0

    def velocity(self, x: Tensor, t: Tensor, text: Tensor, layout: Layout) -> Tensor:
        """Velocity (B, N, C) of x (B, N, C) at times t (B,).

        text (B, L, D) of `text_in`; the layout is that of L+N tokens.
        """
        moment = F.silu(self.time(time_features(t, self.config.width).to(x.dtype)))
        shared = self.from_t(moment).unflatten(-1, (6, -1))
        image, length = self.image_in(x), text.shape[1]
        mask = layout.mask(layout.rotations.shape[1])
        *before, last = self.blocks
        for block in before:
            text, image = block(text, image, layout.rotations, mask, shared)
        mask = layout.mask(layout.rotations.shape[1], slice(length, None))
        _, image = last(text, image, layout.rotations, mask, shared)
        return self.output(self.norm(image))
