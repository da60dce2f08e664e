"""What is random about a loss: order, mask, dropped prompts, times and noise.

Shapes: B pictures of N image tokens, H of them hidden, C channels a token, K draws of (t, noise) a
token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """Everything random about one loss, so that two models can be compared on the same draw."""

    order: Tensor  # (B, V+H) different raster positions; the first `visible` are seen
    visible: int  # V
    drop: Tensor  # (B,) bool, prompts left out
    t: Tensor  # (B, 1, K) in [0, 1]
    noise: Tensor  # (B, H, K, C)

    def of(self, rows: np.ndarray) -> Draw:
        """The draw of some of the pictures."""
        order, drop, t, noise = (x[rows] for x in (self.order, self.drop, self.t, self.noise))
        return Draw(order, self.visible, drop, t, noise)

    def to(self, device: str) -> Draw:
        """The same draw on another device."""
        parts = (self.order, self.drop, self.t, self.noise)
        order, drop, t, noise = (moved(x, device) for x in parts)
        return Draw(order, self.visible, drop, t, noise)


def moved(tensor: Tensor, device: str) -> Tensor:
    """A tensor of the CPU's memory on `device`; a GPU need not have finished what it is at."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def draw_for(tokens: Tensor, settings: Mapping[str, Any], generator: torch.Generator) -> Draw:
    """Draw for pictures of one shape, tokens (B, N, C).

    `settings` is params.training: `mask` {mean, std, low, high} of the hidden share (MAR's
    truncated normal); `most_tokens`, beyond which a random subset of a picture's tokens is trained
    on, each at its own position (paper, supplement 9); `text_drop`; `flow_samples` (K); `time`
    {distribution: uniform | logit_normal, mean, std}. One mask ratio a batch, so that it stays
    rectangular.
    """
    batch, everything, channels = tokens.shape
    count, hidden = hidden_count(everything, settings, generator)
    order = torch.rand(batch, everything, generator=generator).argsort(dim=1)
    draws = int(settings["flow_samples"])
    time = settings["time"]
    if time["distribution"] == "uniform":
        t = torch.rand(batch, 1, draws, generator=generator)
    else:
        normal = torch.randn(batch, 1, draws, generator=generator)
        t = torch.sigmoid(time["mean"] + time["std"] * normal)
    return Draw(
        order=order[:, :count],
        visible=count - hidden,
        drop=torch.rand(batch, generator=generator) < settings["text_drop"],
        t=t,
        noise=torch.randn(batch, hidden, draws, channels, generator=generator),
    )


def hidden_count(
    tokens: int, settings: Mapping[str, Any], generator: torch.Generator
) -> tuple[int, int]:
    """How many of a picture's tokens are trained on, and how many of these are hidden.

    The first numbers that `draw_for` takes from a generator.
    """
    count = min(tokens, int(settings["most_tokens"]))
    ratio = truncated_normal(**settings["mask"], generator=generator)
    return count, min(max(round(ratio * count), 1), count)


def truncated_normal(
    mean: float, std: float, low: float, high: float, generator: torch.Generator
) -> float:
    """One number from a normal distribution cut to [low, high] (absolute bounds)."""
    u = torch.rand((), generator=generator, dtype=torch.float64)
    if std == 0 or low == high:
        return min(max(mean, low), high)
    lower, upper = (
        0.5 * (1 + torch.erf(torch.tensor((bound - mean) / (std * 2**0.5), dtype=torch.float64)))
        for bound in (low, high)
    )
    u = u * (upper - lower) + lower
    value = mean + std * 2**0.5 * float(torch.erfinv(2 * u - 1))
    return min(max(value, low), high)
