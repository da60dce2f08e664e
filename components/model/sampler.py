"""Sampling: Algorithm 1 of the paper, masked autoregression with a flow head a token.

What stays the same while a picture is drawn is computed once for it: the frozen text states and
their projection, the tokens' places, the head's part of each time; and once a token the head's
part of z. `benchmarks/sampling.py` measures what that saves.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from components.errors import UserError
from components.model.dit import FlowDiT
from components.model.djepa import DJEPA
from components.model.flow_head import FlowHead
from components.model.layout import Layout
from components.model.network import Network
from components.model.order import ORDERS, spread
from components.model.solvers import SOLVERS, Course, solve

# Step, how much is done (share of the tokens drawn; of the baseline: t), tokens (B, N, C) in
# raster order; gives these tokens, or others to go on with.
AfterStep = Callable[[int, float, Tensor], Tensor]
Moment = tuple[Tensor, Tensor]  # a time as `FlowHead.moments` has it
Half = tuple[Tensor, Layout]  # the text (B, L, D) and the places of one half of the guidance


@dataclass(frozen=True)
class SamplerConfig:
    """How a model draws where a call does not say otherwise.

    The paper: 64 autoregressive steps, 250 Euler steps, guidance 6, time shift 4.5; what has a
    default here is as the paper has it then. docs/sampling-speed.md says what each gives. Raises
    UserError for a number or a name that cannot be.
    """

    autoregressive_steps: int  # T, in each of which more tokens are drawn
    num_inference_steps: int  # evaluations of the flow head, a token, in the first of these steps
    guidance_scale: float  # s of v = v_u + s·(v_c − v_u); 1 leaves guidance out
    temperature: float  # standard deviation of the initial noise
    time_shift: float  # s of t' = t / (t + s·(1 − t)); 1 leaves the times even
    width: int  # pixels
    height: int
    solver: str = "euler"  # of the flow head, a name of SOLVERS
    annealing: float = 1.0  # share of num_inference_steps in the last autoregressive step; linear
    guided_share: float = 1.0  # of the autoregressive steps: the first ones are guided
    order: str = "random"  # of the tokens, a name of ORDERS

    def __post_init__(self) -> None:
        for name in ("autoregressive_steps", "num_inference_steps", "width", "height"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} is {value!r}: give a whole number from 1 on.")
        for name in ("guidance_scale", "temperature", "time_shift"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{name} is {value!r}: give a finite number.")
        if self.temperature < 0 or self.time_shift <= 0:
            raise UserError(
                f"temperature is {self.temperature} and time_shift {self.time_shift}: give a "
                "temperature from 0 on and a time_shift above 0."
            )
        for name in ("annealing", "guided_share"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value <= 1:
                raise UserError(f"{name} is {value!r}: give a share above 0, at most 1.")
        for name, known in (("solver", SOLVERS), ("order", ORDERS)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}: give one of {', '.join(known)}."
                )

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> "SamplerConfig":
        """The settings and the size that `params.evaluation` draws with."""
        evaluation = params["evaluation"]
        width, height = (int(side) for side in evaluation["size"].split("x"))
        return cls(**evaluation["sampler"], width=width, height=height)


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


def chance(tokens: int, channels: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """All that is random in a picture: its tokens' order (N,) and, in that order, noise (N, C).

    On the generator's device; without one, of PyTorch's own generator.
    """
    device = torch.device("cpu") if generator is None else generator.device
    order = torch.randperm(tokens, generator=generator, device=device)
    return order, torch.randn(tokens, channels, generator=generator, device=device)


def step_count(model: Network, config: SamplerConfig, tokens: int) -> int:
    """Steps in which a picture of that many tokens is drawn: those of `AfterStep`."""
    if isinstance(model, FlowDiT):
        return _course(config, config.num_inference_steps).steps
    return min(config.autoregressive_steps, tokens)


def head_evaluations(config: SamplerConfig, steps: int) -> list[int]:
    """Evaluations of the flow head, a token, in each of so many autoregressive steps."""
    first, last = config.num_inference_steps, config.num_inference_steps * config.annealing
    return [
        max(round(first + (last - first) * step / max(steps - 1, 1)), 1) for step in range(steps)
    ]


def guided_steps(config: SamplerConfig, steps: int) -> int:
    """How many of so many autoregressive steps are guided, the first ones."""
    return 0 if config.guidance_scale == 1.0 else math.ceil(config.guided_share * steps)


def _course(config: SamplerConfig, evaluations: int) -> Course:
    return Course.of(config.solver, evaluations, config.time_shift)


@torch.no_grad()
def sample_tokens(
    model: Network,
    states: Tensor,
    mask: Tensor,
    size: tuple[int, int],
    config: SamplerConfig,
    order: Tensor,
    noise: Tensor,
    shift: float | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Tokens (B, N, C) in raster order for text states (B, L, E), mask (B, L).

    size (W, H) in tokens; order (B, N) and noise (B, N, C) as `chance` gives them for each
    picture, which depends on nothing else of its batch; shift: VoPE's b, None = centred.
    """
    if config.order == "spread":
        order = spread(order, size)

    def half(states: Tensor, mask: Tensor, drop: Tensor | None) -> Half:
        prompt = model.prompt(states, mask, drop)
        text_in = (model if isinstance(model, FlowDiT) else cast(DJEPA, model).encoder).text_in
        return text_in(prompt), model.layout(prompt, order, size, shift)

    halves = [half(states, mask, None)]
    if config.guidance_scale != 1.0:
        # A dropped prompt is one token, however long it was.
        drop = torch.ones(mask.shape[0], dtype=torch.bool, device=mask.device)
        halves.append(half(states[:, :1], mask[:, :1], drop))
    noise = noise * config.temperature
    scale = config.guidance_scale

    def heard(step: int, share: float, tokens: Tensor) -> Tensor:
        """What `after_step` makes of tokens in the order's order, in that order."""
        if after_step is None:
            return tokens
        raster = after_step(step, share, _raster(tokens, order))
        return raster.gather(1, order[..., None].expand_as(raster))

    if isinstance(model, FlowDiT):  # the baseline has no order: it moves all tokens at once
        baseline, course = model, _course(config, config.num_inference_steps)

        def velocity(asked: int, tokens: Tensor) -> Tensor:
            t = noise.new_full((len(noise),), course.asked[asked])
            v = torch.cat([baseline.velocity(tokens, t, *each) for each in halves])
            return _guided(v, scale, len(noise))

        return _raster(solve(course, velocity, noise, heard), order)
    model = cast(DJEPA, model)
    head = model.head

    @cache
    def course_of(evaluations: int) -> tuple[Course, list[Moment]]:
        course = _course(config, evaluations)
        moments = head.moments(noise.new_tensor(course.asked).view(-1, 1, 1, 1))
        return course, list(zip(*moments, strict=True))

    counts = cosine_step(config.autoregressive_steps, noise.shape[1])
    guided, evaluations = guided_steps(config, len(counts)), head_evaluations(config, len(counts))
    tokens, visible = torch.zeros_like(noise), 0
    for step, drawn in enumerate(counts):
        seen, now = tokens[:, :visible], slice(visible, visible + drawn)
        asked = halves if step < guided else halves[:1]
        z = torch.cat([model.predict(text, seen, layout, drawn) for text, layout in asked])
        tokens[:, now] = _denoise(head, z, noise[:, now], *course_of(evaluations[step]), scale)
        visible += drawn
        tokens = heard(step, visible / noise.shape[1], tokens)
    return _raster(tokens, order)


def _denoise(
    head: FlowHead, z: Tensor, x: Tensor, course: Course, moments: list[Moment], scale: float
) -> Tensor:
    """From noise x (B, n, C) to data under z (B, n, D), or (2B, n, D) if guided.

    moments: of the times that the course asks for v at.
    """
    conditions, guided = head.conditions(z), len(z) > len(x)

    def velocity(asked: int, x: Tensor) -> Tensor:
        v = head.velocity(torch.cat([x, x]) if guided else x, moments[asked], conditions)
        return _guided(v, scale, len(x))

    return solve(course, velocity, x[:, :, None])[:, :, 0]  # one draw a token


def _guided(v: Tensor, scale: float, batch: int) -> Tensor:
    """v_u + s·(v_c − v_u) of v (2B, …), conditional first; v itself where it is (B, …)."""
    conditional, unconditional = v[:batch], v[batch:]
    if not len(unconditional):
        return v
    return unconditional + scale * (conditional - unconditional)


def _raster(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens (B, N, C) in the order's order (B, N) put into raster order."""
    return torch.zeros_like(tokens).scatter(1, order[..., None].expand_as(tokens), tokens)
