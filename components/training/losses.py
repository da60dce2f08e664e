"""The two losses, both on hidden tokens only (paper, section 3.1; spec of D-JEPA for L_pred).

Shapes as in components/model/djepa.py; K is the number of draws of (t, noise) a token.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from components.model.djepa import DJEPA, Encoder, gather

BETA = 2.0  # of the smooth-L1, from D-JEPA


@dataclass(frozen=True)
class Draw:
    """Everything random about one loss, so that two models can be compared on the same draw."""

    order: Tensor  # (B, N) permutation of raster positions; the first `visible` are seen
    visible: int
    drop: Tensor  # (B,) bool, prompts left out
    t: Tensor  # (B, 1, K) in [0, 1]
    noise: Tensor  # (B, H, K, C)

    def of(self, rows: np.ndarray) -> "Draw":
        """The draw of some of the pictures."""
        order, drop, t, noise = (x[rows] for x in (self.order, self.drop, self.t, self.noise))
        return Draw(order, self.visible, drop, t, noise)

    def to(self, device: str) -> "Draw":
        """The same draw on another device."""
        order, drop, t, noise = (x.to(device) for x in (self.order, self.drop, self.t, self.noise))
        return Draw(order, self.visible, drop, t, noise)


def flow_path(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x^t = t·x + (1 − t)·ε and its velocity x − ε; t = 0 is noise, t = 1 is data."""
    return t * x + (1 - t) * noise, x - noise


def velocity_error(head: torch.nn.Module, x: Tensor, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Mean over draws and channels of ‖v_θ(x^t, t, z) − (x − ε)‖², (B, H).

    x (B, H, C) are the hidden tokens in the order's order, z (B, H, D), t (B, 1, K),
    noise (B, H, K, C).
    """
    moved, velocity = flow_path(x[:, :, None], noise, t[..., None])
    return (head(moved, t, z) - velocity).square().mean(dim=(2, 3))


def losses(
    model: DJEPA,
    target_encoder: Encoder,
    tokens: Tensor,
    states: Tensor,
    mask: Tensor,
    size: tuple[int, int],
    draw: Draw,
) -> tuple[Tensor, Tensor]:
    """(L_flow, L_pred), scalars, of tokens (B, N, C) under text states (B, L, E), mask (B, L)."""
    z = model.condition(states, mask, tokens, draw.order, draw.visible, size, draw.drop)
    hidden = gather(tokens, draw.order[:, draw.visible :])
    flow = velocity_error(model.head, hidden, z, draw.t, draw.noise).mean()
    target = model.target(target_encoder, states, mask, tokens, draw.order, draw.visible, size)
    return flow, F.smooth_l1_loss(model.projection(z), target, beta=BETA)


def flow_error(
    model: DJEPA,
    latents: Tensor,
    text_states: Tensor,
    text_mask: Tensor,
    order: Tensor,
    visible: int,
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """Mean velocity error over the hidden tokens, (B,); what preference optimisation compares.

    latents (B, C, h, w); order (B, N) and `visible` as in `Draw`; t (B, 1, K);
    noise (B, N − visible, K, C).
    """
    size = (latents.shape[3], latents.shape[2])
    tokens = latents.flatten(2).transpose(1, 2)
    z = model.condition(text_states, text_mask, tokens, order, visible, size)
    hidden = gather(tokens, order[:, visible:])
    return velocity_error(model.head, hidden, z, t, noise).mean(dim=1)


def draw_for(tokens: Tensor, settings: dict, generator: torch.Generator) -> Draw:
    """Draw order, mask ratio, dropped prompts, times and noise for tokens (B, N, C).

    `settings` is params.training: mask {mean, std, low, high} of the hidden share, text_drop,
    flow_samples (K), time {mean, std} of the logit-normal times. One mask ratio a batch, so that
    it stays rectangular.
    """
    batch, count, channels = tokens.shape
    order = torch.rand(batch, count, generator=generator).argsort(dim=1)
    ratio = truncated_normal(**settings["mask"], generator=generator)
    hidden = min(max(round(ratio * count), 1), count)
    draws = settings["flow_samples"]
    normal = torch.randn(batch, 1, draws, generator=generator)
    t = torch.sigmoid(settings["time"]["mean"] + settings["time"]["std"] * normal)
    return Draw(
        order=order,
        visible=count - hidden,
        drop=torch.rand(batch, generator=generator) < settings["text_drop"],
        t=t,
        noise=torch.randn(batch, hidden, draws, channels, generator=generator),
    )


def truncated_normal(
    mean: float, std: float, low: float, high: float, generator: torch.Generator
) -> float:
    """One number from a normal distribution cut to [low, high] (absolute bounds)."""
    lower, upper = (
        0.5 * (1 + torch.erf(torch.tensor((bound - mean) / (std * 2**0.5), dtype=torch.float64)))
        for bound in (low, high)
    )
    u = torch.rand((), generator=generator, dtype=torch.float64) * (upper - lower) + lower
    value = mean + std * 2**0.5 * float(torch.erfinv(2 * u - 1))
    return min(max(value, low), high)
