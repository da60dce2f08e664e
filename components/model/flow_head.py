"""Flow head: the small network that gives each hidden token its velocity.

After MAR's denoising MLP: residual blocks with adaptive layer norm, zero-initialised. Here the
modulation is a sum of a part of z, each block's own, and a part of t that all blocks share (as in
PixArt-α): the part of z is computed once a token, however many times are drawn for it in training
or stepped through in sampling, and the part of t once a time.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def time_features(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of t ∈ [0, 1] at `width`/2 frequencies: (…) to (…, width)."""
    frequencies = torch.exp(
        torch.arange(width // 2, device=t.device, dtype=torch.float32)
        * (-math.log(1000.0) / (width // 2 - 1))
    )
    angles = t[..., None].float() * 100.0 * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class FlowBlock(nn.Module):
    """Residual MLP under an adaptive layer norm; starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.from_z = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, width, bias=False)
        self.down = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.from_z.weight)
        nn.init.zeros_(self.from_z.bias)

    def forward(self, x: Tensor, from_z: Tensor, from_t: Tensor) -> Tensor:
        """x (…, width); the modulations by z and by t, (…, 3·width) each, broadcast."""
        shift, scale, gate = (from_z + from_t).chunk(3, dim=-1)
        h = torch.addcmul(shift, self.norm(x), 1 + scale)
        return torch.addcmul(x, gate, self.down(F.silu(self.up(h))))


class FlowHead(nn.Module):
    """v_θ(x^t, t, z), velocity x − ε of the path x^t = t·x + (1 − t)·ε (paper, section 3.1)."""

    def __init__(self, channels: int, condition_width: int, width: int, blocks: int) -> None:
        super().__init__()
        self.width = width
        self.input = nn.Linear(channels, width)
        self.condition = nn.Linear(condition_width, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.from_t = nn.Linear(width, 3 * width, bias=False)
        nn.init.zeros_(self.from_t.weight)
        self.blocks = nn.ModuleList(FlowBlock(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, channels)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def conditions(self, z: Tensor) -> list[Tensor]:
        """What z (B, H, D) adds to the input and to each block's modulation, (B, H, 1, …) each."""
        condition = self.condition(z)[:, :, None]
        activated = F.silu(condition)
        blocks = cast(list[FlowBlock], self.blocks)
        return [condition, *(block.from_z(activated) for block in blocks)]

    def moments(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """What times t (…) add to the input, (…, width), and to each modulation, (…, 3·width)."""
        moment = self.time(time_features(t, self.width).to(self.from_t.weight.dtype))
        return moment, self.from_t(F.silu(moment))

    def velocity(
        self, x: Tensor, moments: tuple[Tensor, Tensor], conditions: list[Tensor]
    ) -> Tensor:
        """Velocity (B, H, K, C) of x (B, H, K, C) at the `moments` of t under `conditions` of z."""
        moment, from_t = moments
        h = self.input(x) + conditions[0] + moment
        for block, from_z in zip(self.blocks, conditions[1:], strict=True):
            h = block(h, from_z, from_t)
        return self.output(self.norm(h))

    def forward(self, x: Tensor, t: Tensor, z: Tensor, picture: Tensor | None = None) -> Tensor:
        """Velocity (B, H, K, C) of x (B, H, K, C) at t (B or 1, 1, K), under z (B, H, D).

        K is the number of draws of (t, noise) a token. Packed pictures, B = 1: t is
        (1, pictures, K), and `picture` (H,) says which is whose.
        """
        moment, from_t = self.moments(t)
        if picture is not None:
            moment, from_t = moment[:, picture], from_t[:, picture]
        return self.velocity(x, (moment, from_t), self.conditions(z))
