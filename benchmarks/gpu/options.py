"""Each optimisation of a training step on and off: h at 256², 16 images, cached latents."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.record import Clock, Results
from benchmarks.gpu.training import Steps, free, is_djepa, measured
from benchmarks.gpu.world import parameters
from components.model.djepa import DJEPA, Predictor
from components.model.layout import Layout
from components.model.network import Network
from components.training import batches, losses
from components.training.batch import Batch, Picture
from components.training.draw import moved

SQUARE = ["256x256"]
MIXED = ["256x256", "256x192", "192x256", "256x144", "144x256"]  # those of scale=paper
IMAGES = 16  # a GPU's share of the paper's batch of 2048 on 128


def plain_optimizer(steps: Steps) -> None:
    """AdamW without its fused kernel: several passes over weights and moments."""
    steps.engine.optimizers[:] = [
        torch.optim.AdamW(
            optimizer.param_groups[0]["params"], lr=optimizer.param_groups[0]["lr"],
            betas=optimizer.param_groups[0]["betas"], foreach=True,
            weight_decay=optimizer.param_groups[0]["weight_decay"],
        )
        for optimizer in steps.engine.optimizers
    ]  # fmt: skip


def padded(network: Network, pictures: list[Picture], device: str) -> Batch:
    """Pictures side by side, tokens and texts padded to the longest: what packing spares.

    The losses are taken over the padding too, so that their values mean nothing; the time does.
    """
    parts = []
    for each in pictures:
        tokens, states = moved(each.tokens, device), moved(each.states, device)
        known = torch.ones(states.shape[:2], dtype=torch.bool, device=device)
        size = (tokens, states, known, each.size, each.draw.to(device))
        parts.append(batches.grouped(network, *size))
    visible = max(part.visible for part in parts)
    hidden = max(part.noise.shape[1] for part in parts)
    words = max(part.prompt.states.shape[1] for part in parts)

    def longer(x: Tensor, count: int, value: float = 0) -> Tensor:
        behind = (0, 0) * (x.dim() - 2) + (0, count - x.shape[1])
        if x.is_complex():
            return torch.view_as_complex(F.pad(torch.view_as_real(x), (0, 0, *behind)))
        return F.pad(x, behind, value=value)

    def row(part: Batch, x: Tensor, value: float = 0) -> Tensor:
        """Text, visible and hidden of one picture, each padded."""
        length = part.prompt.states.shape[1]
        text, seen, rest = x.split([length, part.visible, part.noise.shape[1]], dim=1)
        pieces = ((text, words), (seen, visible), (rest, hidden))
        return torch.cat([longer(piece, count, value) for piece, count in pieces], dim=1)

    def prompts(name: str) -> Any:
        each = [getattr(part, name) for part in parts]
        return replace(
            each[0],
            states=torch.cat([longer(p.states, words) for p in each]),
            learned=torch.cat([longer(p.learned, words) for p in each]),
            owner=torch.cat([longer(p.owner, words, -1) for p in each]),
        )

    def layouts(name: str) -> Layout:
        each = [(part, getattr(part, name)) for part in parts]
        turned = torch.cat([row(part, layout.rotations) for part, layout in each])
        owner = torch.cat([row(part, layout.owner, -1) for part, layout in each])
        return Layout(turned, owner, packed=False)

    seen = torch.cat([longer(part.x[:, : part.visible], visible) for part in parts])
    rest = torch.cat([longer(part.x[:, part.visible :], hidden) for part in parts])
    return Batch(
        x=torch.cat([seen, rest], dim=1),
        visible=visible,
        prompt=prompts("prompt"),
        layout=layouts("layout"),
        whole_prompt=prompts("whole_prompt"),
        whole_layout=layouts("whole_layout"),
        t=torch.cat([part.t for part in parts]),
        noise=torch.cat([longer(part.noise, hidden) for part in parts]),
        picture=None,
    )  # fmt: skip


def all_tokens(
    predictor: Predictor, text: Tensor, visible: Tensor, layout: Layout, count: int
) -> Tensor:
    """z of every image token: the last block asks for all of them."""
    end = layout.rotations.shape[1]
    masks = predictor.mask_token.expand(
        visible.shape[0], end - text.shape[1] - visible.shape[1], -1
    )
    image = torch.cat([visible, masks], dim=1)
    *before, last = predictor.blocks
    for block in before:
        text, image = block(text, image, layout.rotations, layout.mask(end))
    mask = layout.mask(end, slice(text.shape[1], end))
    _, image = last(text, image, layout.rotations, mask, slice(None))
    return predictor.norm(image)


def error_everywhere(model: DJEPA, batch: Batch, z: Tensor) -> Tensor:
    """The flow head for every token; the loss leaves out the visible ones afterwards."""
    x = batch.x[:, :, None]
    noise = F.pad(batch.noise, (0, 0, 0, 0, batch.visible, 0))
    moved, velocity = losses.flow_path(x, noise, batch.t[..., None])
    error = (model.head(moved, batch.t, z) - velocity).square().mean(dim=(2, 3))
    return error[:, batch.visible :]


@contextmanager
def not_gathered(steps: Steps) -> Iterator[None]:
    """Hidden tokens are taken after predictor and flow head, not before."""
    model = is_djepa(steps.training.model)
    predict, projection = model.predict, model.projection.forward

    def of_hidden(z: Tensor) -> Tensor:  # L_pred is of hidden tokens, as ever
        return projection(z[:, steps.visible :])

    def noted(*inputs: Any, **named: Any) -> Tensor:
        steps.visible = inputs[1].shape[1]
        return predict(*inputs, **named)

    with ExitStack() as stack:
        change = stack.enter_context
        change(mock.patch.object(Predictor, "forward", all_tokens))
        change(mock.patch.object(losses, "velocity_error", error_everywhere))
        change(mock.patch.object(model, "predict", noted))
        change(mock.patch.object(model.projection, "forward", of_hidden))
        yield


def with_padding(steps: Steps) -> Any:
    """Pads where the product packs."""
    return mock.patch.object(batches, "packed", padded)


def by_cudnn(steps: Steps) -> Any:
    """Attention by cuDNN's kernel, or, where it cannot, the plain way."""
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH])


def by_efficient(steps: Steps) -> Any:
    """The same with the kernel named efficient."""
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


Around = Callable[[Steps], Any]
# Name, changed settings, sizes of the pictures, what is changed while it is measured.
CASES: list[tuple[str, dict[str, Any], list[str], Around | None]] = [
    ("as it is", {}, SQUARE, None),
    ("without compilation", {"compile": False}, SQUARE, None),
    ("optimiser not fused", {}, SQUARE, plain_optimizer),
    ("blocks recomputed", {"checkpointing": "blocks"}, SQUARE, None),
    ("in two parts", {"accumulate": 2}, SQUARE, None),
    ("hidden tokens not gathered", {}, SQUARE, not_gathered),
    ("mixed shapes, packed", {"batches": "packed"}, MIXED, None),
    ("mixed shapes, padded", {"batches": "packed"}, MIXED, with_padding),
    ("mixed shapes, grouped", {}, MIXED, None),
    ("attention by cuDNN", {}, SQUARE, by_cudnn),
    ("attention by the efficient kernel", {}, SQUARE, by_efficient),
]  # fmt: skip


def run(results: Results, clock: Clock, device: str, tiny: bool, peak: float) -> Iterator[str]:
    """Measure all cases that are not there yet; yields what it left for want of time."""
    for name, settings, rungs, around in CASES:
        case: Mapping[str, Any] = {"kind": "options", "model": "h", "option": name}
        if results.has(case):
            continue
        if clock.left() < (5 if tiny else 75):
            yield f"options {name}"
            continue
        try:
            params = parameters("h", rungs, 1, tiny, **settings)
            steps = Steps(params, rungs, device)
            with ExitStack() as stack:
                context = around(steps) if around else None
                if context is not None:
                    stack.enter_context(context)
                images = len(rungs) if tiny else IMAGES
                found = measured(steps, rungs, images, peak, clock)
            results.add(case, found)
        except Exception as error:
            results.add_failure(case, error)
        steps = None  # type: ignore[assignment]
        free()
