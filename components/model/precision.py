"""Drawing in bfloat16: what autocast computes, with the weights cast once instead of each time.

Autocast keeps no copies of weights that have no gradient, so a network of 2.7 B parameters would
be cast anew for every step, and the flow head for every Euler step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def halved(network: Module) -> Module:
    """The weights of its linear layers in bfloat16, in place; for drawing, not for training.

    Norms, scales and learned tokens stay float32, as they do under autocast.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    return network


@contextmanager
def as_stored(network: nn.Module) -> Iterator[None]:
    """Inside, a `halved` network computes in bfloat16, any other as its weights are."""
    layer = next((m for m in network.modules() if isinstance(m, nn.Linear)), None)
    low = layer is not None and layer.weight.dtype == torch.bfloat16
    device = "cpu" if layer is None else layer.weight.device.type
    # Nothing is left to cast, so that there is nothing to keep; CUDA graphs allow no such copies.
    with torch.autocast(device, torch.bfloat16, enabled=low, cache_enabled=False):
        yield
