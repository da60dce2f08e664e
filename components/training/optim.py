"""Muon for the matrices inside the network, AdamW for everything else, and the rate's schedule.

torch.optim.Muon orthogonalises in bfloat16, which a CPU without bfloat16 units does a hundred
times slower than float32, and one matrix at a time; here matrices of one shape go together.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from components.training.distribution import Team


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton–Schulz iteration: (M, r, c) to nearly orthogonal matrices, M at once.

    Each step multiplies X by p(XXᵀ) = aI + bXXᵀ + c(XXᵀ)². All these factors commute, so for a
    long matrix the steps are done on the small r×r Gram matrix and X is multiplied once.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.transpose(-2, -1) if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.shape[-1] < 2 * x.shape[-2]:
        for _ in range(steps):
            gram = x @ x.transpose(-2, -1)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.transpose(-2, -1) if tall else x
    gram = x @ x.transpose(-2, -1)
    identity = torch.eye(gram.shape[-1], device=x.device, dtype=x.dtype)
    total = None
    for step in range(steps):
        factor = torch.baddbmm(a * identity + b * gram, gram, gram, alpha=c)
        total = factor if total is None else factor @ total
        if step < steps - 1:
            gram = factor @ factor @ gram
    x = total @ x
    return x.transpose(-2, -1) if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024); float32, matrices of one shape batched.

    A parameter whose rows stack three square matrices (Q, K and V in one) is orthogonalised
    piece by piece. Each process of the team does its share of the matrices.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.team = Team()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            buffers = [
                self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters
            ]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, buffers, group["momentum"])
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p, update in zip(parameters, updates, strict=True):
                pieces = 3 if p.shape[0] == 3 * p.shape[1] else 1
                for piece, target in zip(update.chunk(pieces), p.chunk(pieces), strict=True):
                    shapes[piece.shape].append((piece, target))
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            results = self._orthogonalised([[u for u, _ in pairs] for pairs in shapes.values()])
            for pairs, orthogonal in zip(shapes.values(), results, strict=True):
                targets = [target for _, target in pairs]
                # The usual scaling: a step's size does not depend on the matrix's shape.
                rate = -group["lr"] * max(1.0, targets[0].shape[0] / targets[0].shape[1]) ** 0.5
                torch._foreach_add_(targets, list(orthogonal.unbind(0)), alpha=rate)

    def _orthogonalised(self, groups: list[list[Tensor]]) -> list[Tensor]:
        """One stack (M, r, c) a group of M matrices of one shape, the same in every process."""
        rank, size = self.team.rank, self.team.size
        sizes = [len(group) * group[0].numel() for group in groups]
        flat = groups[0][0].new_zeros(sum(sizes))
        stacks = [
            part.view(len(group), *group[0].shape)
            for part, group in zip(flat.split(sizes), groups, strict=True)
        ]
        for stack, group in zip(stacks, groups, strict=True):
            mine = group[rank::size]
            if mine:
                stack[rank::size] = orthogonalise(torch.stack(mine))
        self.team.sum(flat)
        return stacks


def optimizers(
    model: nn.Module, settings: dict[str, Any], place: Team | None = None
) -> list[torch.optim.Optimizer]:
    """The optimisers of `model`: [Muon, AdamW], or AdamW alone as in the paper (section 7).

    `settings` is params.training.optimizer. Muon shares its work over the team `place`; it needs
    whole matrices, so a sharded model takes AdamW alone (components/limits.py refuses the rest).
    """
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inside = ".blocks." in f".{name}" and parameter.dim() == 2
        if settings["kind"] == "muon" and inside and min(parameter.shape) > 2:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    chosen: list[torch.optim.Optimizer] = []
    if matrices:
        muon = Muon(
            matrices, settings["muon_rate"], settings["muon_momentum"], settings["muon_decay"]
        )
        muon.team = place or Team()
        chosen.append(muon)
    adam = torch.optim.AdamW(
        rest,
        lr=settings["adam_rate"],
        betas=tuple(settings["adam_betas"]),
        weight_decay=settings["adam_decay"],
        fused=True,
    )
    chosen.append(adam)
    for optimizer in chosen:
        for group in optimizer.param_groups:
            group["base"] = group["lr"]
    return chosen


def rate_at(done: float, shape: str, warmup: float, decay: float, last: float) -> float:
    """Factor on the learning rate at the share `done` of a budget: up, constant, then down.

    `warmup` and `decay` are shares of the budget at its beginning and end; `last` is the factor
    at the very end, and `shape` how it gets there: linear or cosine (the paper's).
    """
    up = min(1.0, (done + 1e-3) / warmup) if warmup > 0 else 1.0
    left = min(1.0, max(0.0, (1.0 - done) / decay)) if decay > 0 else 1.0
    if shape == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return min(up, last + (1 - last) * left)


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set each group's learning rate to `factor` times the rate it began with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor
