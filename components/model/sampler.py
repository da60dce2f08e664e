"""Sampling: Algorithm 1 of the paper, masked autoregression with a flow head a token."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from components.model.dit import FlowDiT
from components.model.djepa import DJEPA
from components.model.network import Network


@dataclass(frozen=True)
class SamplerConfig:
    """How pictures are drawn; the paper: 64 steps, 250 Euler steps, scale 6, shift 4.5."""

    steps: int  # T, autoregressive steps
    flow_steps: int  # Euler steps a token
    guidance_scale: float  # s of v = v_u + s·(v_c − v_u); 1 leaves guidance out
    temperature: float  # standard deviation of the initial noise
    time_shift: float  # s of t' = t / (t + s·(1 − t)); 1 leaves the times even


def cosine_step(steps: int, tokens: int) -> list[int]:
    """How many tokens each step draws: they add up to `tokens`, each is at least 1.

    After step n the share still hidden is cos(π/2 · n/T), as in MaskGIT. With more steps than
    tokens there is one step a token.
    """
    if steps < 1 or tokens < 1:
        raise ValueError(f"{steps} steps for {tokens} tokens: both must be at least 1")
    steps = min(steps, tokens)
    counts, hidden = [], tokens
    for n in range(1, steps + 1):
        goal = math.floor(tokens * math.cos(math.pi / 2 * n / steps)) if n < steps else 0
        # Take at least one now, and leave at least one for each later step.
        left = max(min(goal, hidden - 1), steps - n)
        counts.append(hidden - left)
        hidden = left
    return counts


def shifted_times(flow_steps: int, shift: float) -> Tensor:
    """Times 0 … 1, (flow_steps + 1,), shifted towards the noise: t' = t / (t + s·(1 − t))."""
    t = torch.linspace(0, 1, flow_steps + 1)
    return t / (t + shift * (1 - t))


@torch.no_grad()
def sample_tokens(
    model: Network,
    states: Tensor,
    mask: Tensor,
    size: tuple[int, int],
    config: SamplerConfig,
    generators: list[torch.Generator],
) -> Tensor:
    """Tokens (B, N, C) in raster order for text states (B, L, E), mask (B, L).

    size (W, H) in tokens. generators: one a picture, on the CPU, so that a picture depends on its
    own seed and not on its batch. The baseline transformer (components/model/dit.py) has no order:
    it moves all tokens at once.
    """
    batch, count, device = states.shape[0], size[0] * size[1], states.device
    channels = model.config.channels
    order = torch.stack([torch.randperm(count, generator=g) for g in generators]).to(device)
    noise = torch.stack([torch.randn(count, channels, generator=g) for g in generators]).to(device)
    noise = noise * config.temperature  # B N C, in the order's order
    times = shifted_times(config.flow_steps, config.time_shift).to(device)
    guided = config.guidance_scale != 1.0
    drop = torch.zeros(batch, dtype=torch.bool, device=device)
    if guided:
        states, mask = torch.cat([states, states]), torch.cat([mask, mask])
        drop = torch.cat([drop, ~drop])
    if isinstance(model, FlowDiT):
        return _whole(model, states, mask, drop, order, size, noise, times, config.guidance_scale)
    assert isinstance(model, DJEPA)
    tokens = torch.zeros(batch, count, channels, device=device)
    visible = 0
    for step in cosine_step(config.steps, count):
        twice = (lambda x: torch.cat([x, x])) if guided else (lambda x: x)
        z = model.condition(states, mask, twice(tokens), twice(order), visible, size, drop, step)
        x = noise[:, visible : visible + step]
        x = _flow(model, z, x, times, config.guidance_scale)
        place = order[:, visible : visible + step, None].expand(-1, -1, channels)
        tokens = tokens.scatter(1, place, x)
        visible += step
    return tokens


def _flow(model: DJEPA, z: Tensor, x: Tensor, times: Tensor, scale: float) -> Tensor:
    """Euler steps from noise x (B, n, C) to data under z (B or 2B, n, D)."""
    guided = scale != 1.0
    conditions = model.head.conditions(z)
    for start, end in pairwise(times):
        both = torch.cat([x, x]) if guided else x
        v = model.head.velocity(both[:, :, None], start.view(1, 1, 1), conditions)[:, :, 0]
        if guided:
            conditional, unconditional = v.chunk(2)
            v = unconditional + scale * (conditional - unconditional)
        x = x + (end - start) * v
    return x


def _whole(
    model: FlowDiT,
    states: Tensor,
    mask: Tensor,
    drop: Tensor,
    order: Tensor,
    size: tuple[int, int],
    noise: Tensor,
    times: Tensor,
    scale: float,
) -> Tensor:
    """Tokens (B, N, C) in raster order by Euler steps from noise (B, N, C), in the order's order.

    states, mask and drop are those of B pictures, or of 2B with guidance.
    """
    prompt = model.prompt(states, mask, drop)
    text = model.text_in(prompt)
    guided = len(states) > len(noise)
    twice = (lambda x: torch.cat([x, x])) if guided else (lambda x: x)
    layout = model.layout(prompt, twice(order), size)
    x = noise
    for start, end in pairwise(times):
        v = model.velocity(twice(x), start.expand(len(states)), text, layout)
        if guided:
            conditional, unconditional = v.chunk(2)
            v = unconditional + scale * (conditional - unconditional)
        x = x + (end - start) * v
    return torch.zeros_like(x).scatter(1, order[..., None].expand_as(x), x)
