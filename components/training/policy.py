"""What preference optimisation trains, and the reference it is measured against.

All weights: the reference is a second copy of the network. LoRA: the reference is the very same
network with its adapter switched off, so there is no second copy, and gradients and AdamW's two
moments are the adapter's only. With P weights of 4 bytes and A in the adapter that is
4·(P + 4A) bytes instead of 4·5P, activations aside.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from components.model.lora import LoraMixin
from components.model.network import Network

Weights = dict[str, Tensor]


class Policy(ABC):
    """The network that is trained, and its reference."""

    network: Network
    parameters: list[nn.Parameter]  # those that are trained

    @abstractmethod
    @contextmanager
    def reference(self) -> Iterator[Network]:
        """The network as it was before training, while the block lasts."""

    @abstractmethod
    def weights(self) -> Weights:
        """Copies, on the CPU, of the weights that training changes."""

    @abstractmethod
    def load(self, weights: Weights) -> None:
        """Take over what `weights` gave. RuntimeError or KeyError where they do not fit."""

    @abstractmethod
    def finish(self, kept: Weights, adapter_out: Path) -> None:
        """Put the kept weights into the pipeline; an adapter is saved in `adapter_out` first."""


class WholeModel(Policy):
    """All weights of a copy are trained; the pipeline's own network is the reference."""

    def __init__(self, pipe: LoraMixin) -> None:
        self._frozen = pipe.transformer.eval().requires_grad_(False)
        self.network = copy.deepcopy(self._frozen).train().requires_grad_(True)
        self.parameters = list(self.network.parameters())

    @contextmanager
    def reference(self) -> Iterator[Network]:
        """The pipeline's own network."""
        yield self._frozen

    def weights(self) -> Weights:
        """The whole state dictionary."""
        return {k: _copy(v) for k, v in self.network.state_dict().items()}

    def load(self, weights: Weights) -> None:
        """See `Policy.load`."""
        self.network.load_state_dict(weights)

    def finish(self, kept: Weights, adapter_out: Path) -> None:
        """The pipeline's own network takes the kept weights."""
        self._frozen.load_state_dict(kept)


class Adapter(Policy):
    """A LoRA adapter in the pipeline's network is trained, and nothing else of it."""

    def __init__(self, pipe: LoraMixin, rank: int, alpha: float, seed: int) -> None:
        self._pipe = pipe
        pipe.add_lora(rank, alpha)
        self.network = pipe.transformer.train()
        named = self.network.named_parameters()
        self._trained = {name: p for name, p in named if p.requires_grad}
        self.parameters = list(self._trained.values())
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self._trained.items():
            if ".lora_A." in name:  # drawn as peft draws it, but for the generator; B is zero
                drawn = nn.init.kaiming_uniform_(
                    torch.empty(parameter.shape), a=5**0.5, generator=generator
                )
                parameter.data.copy_(drawn)

    @contextmanager
    def reference(self) -> Iterator[Network]:
        """The same network, the adapter switched off."""
        self._pipe.disable_lora()
        try:
            yield self.network
        finally:
            self._pipe.enable_lora()

    def weights(self) -> Weights:
        """The adapter's matrices."""
        return {k: _copy(v) for k, v in self._trained.items()}

    @torch.no_grad()
    def load(self, weights: Weights) -> None:
        """See `Policy.load`."""
        if weights.keys() != self._trained.keys():
            raise KeyError("the adapter has other layers")
        for name, parameter in self._trained.items():
            parameter.copy_(weights[name])

    def finish(self, kept: Weights, adapter_out: Path) -> None:
        """The adapter is saved as peft's files, then merged into the network's weights."""
        self.load(kept)
        self._pipe.save_lora_weights(adapter_out)
        (adapter_out / "README.md").unlink(missing_ok=True)  # peft's form, with nothing filled in
        self._pipe.fuse_lora()
        self._pipe.transformer.eval()


def _copy(value: Tensor) -> Tensor:
    return value.detach().cpu().clone().contiguous()
