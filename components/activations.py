"""What a batch keeps for its backward pass, counted on tensors that have a shape and no memory."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from components.model.blocks import TwoStreamBlock
from components.model.build import build_network
from components.model.djepa import DJEPA
from components.training.batch import grouped
from components.training.draw import draw_for
from components.training.losses import losses


class _Efficient(TorchFunctionMode):
    """Attention keeps what the kernel keeps that a GPU takes under a mask, not every weight."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (x.to(torch.bfloat16) for x in args)
        bias = (kwargs or {})["attn_mask"].to(q.dtype).expand(*q.shape[:3], k.shape[2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, bias, True)[0]


def saved_bytes(
    settings: Mapping[str, Any],
    training: Mapping[str, Any],
    widths: tuple[int, int],
    text: int,
    side: tuple[int, int],
) -> int:
    """Bytes that one more picture of a batch has its losses keep for the backward pass.

    bfloat16 is counted by the rules of CUDA's autocast, float32 by those of a CPU. Under
    activation checkpointing blocks keep what goes into them.

    settings: params.model.network; widths: channels and text width; side (W, H) in tokens.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    two, three = (
        _kept(settings, training, widths, text, side, images, FakeTensorMode()) for images in (2, 3)
    )
    # What is kept once a batch falls out, as the weights that autocast has cast. A picture alone
    # keeps less: some operations give back views where they copy otherwise.
    return three - two


def _kept(
    settings: Mapping[str, Any],
    training: Mapping[str, Any],
    widths: tuple[int, int],
    text: int,
    side: tuple[int, int],
    images: int,
    tensors_without_memory: Any,
) -> int:
    channels, text_width = widths
    half = training["precision"] == "bfloat16"
    device = "cuda" if half else "cpu"
    kept: dict[int, torch.UntypedStorage] = {}
    own: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    def keeping_inputs(module: nn.Module, forward: Any) -> Any:
        def run(*inputs: Any) -> Any:
            for x in inputs:
                if isinstance(x, torch.Tensor):
                    keep(x)
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
                return forward(*inputs)

        return run

    with tensors_without_memory, ExitStack() as stack:
        with torch.device(device):
            network = build_network(settings, channels, text_width, 0)
            other = build_network(settings, channels, text_width, 0)
        target = other.encoder if isinstance(other, DJEPA) else None
        if float(training["jepa_weight"]) == 0:
            target = None
        tokens = torch.randn(images, side[0] * side[1], channels)
        draw = draw_for(tokens, training, torch.Generator())
        on_device = {
            name: getattr(draw, name).to(device) for name in ("order", "drop", "t", "noise")
        }
        draw = replace(draw, **on_device)
        states = torch.randn(images, text, text_width, device=device)
        mask = torch.ones(images, text, dtype=torch.bool, device=device)
        own.update(p.untyped_storage()._cdata for n in (network, other) for p in n.parameters())
        if training["checkpointing"] == "blocks":
            for block in network.modules():
                if isinstance(block, TwoStreamBlock):
                    block.forward = keeping_inputs(block, block.forward)  # type: ignore[method-assign]
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x))
        if half:
            stack.enter_context(_Efficient())
            # torch.autocast itself refuses a GPU that is not there.
            stack.callback(torch.set_autocast_enabled, device, torch.is_autocast_enabled(device))
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, torch.bfloat16)
            stack.callback(torch.clear_autocast_cache)
        batch = grouped(network, tokens.to(device), states, mask, side, draw)
        losses(network, target, batch, float(training["jepa_beta"]))
        return sum(storage.nbytes() for storage in kept.values())
