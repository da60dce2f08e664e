"""What is done to the network from outside: spread over processes, precision, recomputation.

PyTorch's own engines do it, and the network's modules know nothing of them:
DistributedDataParallel where every process holds the whole model (training.sharding replicate),
FSDP2's fully_shard where each holds a share of every tensor (shard).
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    ActivationWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from components.model.blocks import TwoStreamBlock
from components.model.djepa import Encoder
from components.model.network import Network
from components.training.batch import Batch
from components.training.batches import Part
from components.training.distribution import Team
from components.training.losses import losses


class TrainStep(nn.Module):
    """Both losses of a part of a batch, one forward: what DDP and FSDP wrap."""

    def __init__(self, model: Network, target: Encoder | None, settings: dict[str, Any]) -> None:
        """`settings` is params.training."""
        super().__init__()
        self.model, self.target = model, target
        self.beta = float(settings["jepa_beta"])
        self.low = settings["precision"] == "bfloat16"

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(L_flow, L_pred), scalars; L_pred is 0 without a target encoder."""
        with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=self.low):
            return losses(self.model, self.target, batch, self.beta)


def spread(step: TrainStep, ema: Network, settings: dict[str, Any], place: Team) -> None:
    """Apply checkpointing, compilation and sharding of params.training to the modules in place.

    `ema` is sharded as the model is, so that averages are taken of each process's own share.
    """
    if settings["checkpointing"] == "blocks":
        _recompute(step.model)
    if settings["compile"]:
        if place.device == "cpu":
            if place.leads:
                print("training.compile is left out: on a CPU it costs minutes", flush=True)
        else:
            # Encoder, target encoder, predictor and its last block are compiled each, and anew for
            # no and for one visible token; beyond the limit, 8, blocks would run uncompiled.
            torch._dynamo.config.recompile_limit = 32
            for block in _blocks(step):
                # The number of visible tokens changes from step to step.
                block.compile(dynamic=True)
    if settings["sharding"] == "shard" and place.size > 1:
        _shard(step, ema, place)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks, each with what was wrapped around it."""
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
    kinds = (TwoStreamBlock, ActivationWrapper)
    return [block for blocks in lists for block in blocks if isinstance(block, kinds)]


def _recompute(model: Network) -> None:
    blocks = set(_blocks(model))
    apply_activation_checkpointing(
        model,
        # Nothing inside a block is random.
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, preserve_rng_state=False),
        check_fn=lambda module: module in blocks,
    )


def _shard(step: TrainStep, ema: Network, place: Team) -> None:
    mesh = init_device_mesh(torch.device(place.device).type, (place.size,))
    # Each block is gathered when it runs; all that lies between them is the root's.
    for module in [*_blocks(step), step, *_blocks(ema), ema]:
        fully_shard(module, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor; all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensors: dict[str, Tensor], place: Team) -> dict[str, Tensor]:
    """Gather sharded tensors one by one on rank 0's CPU; every process calls it.

    The other processes get an empty dictionary.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if place.leads:
            gathered[name] = full.detach().cpu().contiguous()
    return gathered


class Said:
    """What a step says of the whole batch, on its way from a GPU that may not have come to it."""

    def __init__(self, values: Tensor) -> None:
        self._there = torch.cuda.Event() if values.is_cuda else None
        self._values = values.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        if self._there is not None:
            self._there.record()

    def read(self) -> tuple[float, float, float, bool]:
        """L_flow, L_pred, the gradient's norm, and rank 0's `due`; waits until they are there.

        The same in every process of the team.
        """
        if self._there is not None:
            self._there.synchronize()
        flow, jepa, due, norm = self._values.tolist()
        return flow, jepa, norm, due > 0


class Engine:
    """Steps of the whole team, from parts of the batch in each process."""

    def __init__(
        self,
        step: TrainStep,
        optimizers: list[torch.optim.Optimizer],
        settings: dict[str, Any],
        place: Team,
    ) -> None:
        self.optimizers, self.settings, self.place = optimizers, settings, place
        self.parameters = [p for p in step.parameters() if p.requires_grad]
        self.run: nn.Module = step
        if place.size > 1 and settings["sharding"] == "replicate":
            self.run = DistributedDataParallel(step, gradient_as_bucket_view=True)

    def step(self, parts: Iterable[Part], due: bool) -> Said:
        """One step down the gradient of the whole batch's loss; `parts` are this process's.

        Waits for no GPU: the weights are changed before anyone has seen whether the loss is a
        number. `due`: rank 0's, for `Said.read` to give in every process.
        """
        self._forget()
        losses = torch.zeros(2, device=self.place.device)
        for part in parts:
            losses += self._backward(part)
        mine = losses.new_full((1,), float(due and self.place.leads))
        said = torch.cat([losses, mine])
        self.place.sum(said)
        norm = torch.nn.utils.get_total_norm(self._gradients())
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        # In double precision, as Python divides.
        factor = (float(self.settings["clip"]) / norm.double()).clamp(max=1).to(norm.dtype)
        torch._foreach_mul_([local(g) for g in self._gradients()], factor)
        for optimizer in self.optimizers:
            optimizer.step()
        return Said(torch.cat([said, norm[None]]))

    def _forget(self) -> None:
        """Drop the gradients of the step before.

        With several parts DDP's stay where they are, as zeros: in its buckets. Otherwise those of
        the first parts would lie beside the buckets.
        """
        replicated = isinstance(self.run, DistributedDataParallel)
        inside = replicated and int(self.settings["accumulate"]) > 1
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=not inside)

    def _backward(self, part: Part) -> Tensor:
        """Add a part's gradients; its share of (L_flow, L_pred), (2,)."""
        with self._alone(part):
            flow, jepa = self.run(part.batch)
            loss = flow + float(self.settings["jepa_weight"]) * jepa
            # DDP and FSDP take the mean over the processes; all parts' shares add up to one.
            (loss * (part.share * self.place.size)).backward()
        return torch.stack([flow.detach() * part.share, jepa.detach() * part.share])

    def _alone(self, part: Part) -> AbstractContextManager[None]:
        """Under DDP the processes add up their gradients in the last part only.

        Under FSDP in each: a process would hold whole gradients in between, and the shares are
        there because whole ones do not fit.
        """
        if isinstance(self.run, DistributedDataParallel) and not part.last:
            return self.run.no_sync()
        return nullcontext()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]
