"""What training keeps: raw weights, their average, the target encoder, the optimisers' state.

Only safetensors, JSON and plain arrays are written and read; nothing is pickled. A state is a new
folder that takes its name when it is complete, so a kill at any moment leaves the one before it.
A part of a state (model, ema, target, optimizer) is one whole file PART.safetensors, or, in the
snapshots of sharded training, a folder PART/ of shards that the processes wrote side by side.
torch.distributed.checkpoint reads both, into any number of processes.
"""

import copy
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from components.errors import UserError
from components.feedback.ledger import Ledger
from components.files import atomic_folder, read_json, remove_folder, write_json
from components.model.build import build_network
from components.model.djepa import DJEPA, Encoder
from components.model.network import Network
from components.model.pipeline import DJEPAPipeline
from components.model.sampler import SamplerConfig
from components.starter.begin import begin
from components.tokens.encoded import EncodedSet
from components.training.distribution import Team
from components.training.engine import TrainStep, local, spread, whole
from components.training.optim import Muon, optimizers
from components.training.shards import (
    files_of,
    read_into,
    reader_of,
    write_shards,
    write_whole,
)


@dataclass
class Training:
    """A model in training."""

    model: Network
    ema: Network  # the running average of `model`, for drawing
    target: Encoder | None  # φ̄, the running average of the context encoder; None: no L_pred
    losses: TrainStep  # of model and target encoder
    optimizers: list[torch.optim.Optimizer]
    step: int = 0  # over all phases so far
    images: int = 0  # seen, over all phases so far
    ledger: Ledger | None = None  # how often each sample was trained on, over all phases
    scratch: Path | None = None  # where the ledger counts; see `Ledger`
    extra: dict[str, Any] = field(default_factory=dict)  # plain JSON values

    @classmethod
    def fresh(
        cls,
        params: dict[str, Any],
        encoded: EncodedSet,
        place: Team | None = None,
        init: Path | None = None,
    ) -> "Training":
        """A new model for an encoded set, from `params.seed`, `.model` and `.training`.

        init: a packed model whose weights it begins with. In a team every process calls it, and
        may hold a share of the tensors only.
        """
        settings, place = params["training"], place or Team()
        model = build_model(params, encoded)
        if init is not None:
            begin(init, encoded.tokenizer(), model)
        model = model.to(place.device)
        ema = copy.deepcopy(model).requires_grad_(False).eval()
        target = None
        if isinstance(model, DJEPA):
            if settings["jepa_weight"] > 0:
                target = copy.deepcopy(model.encoder).requires_grad_(False).eval()
            else:  # nothing compares z with anything
                model.projection.requires_grad_(False)
        losses = TrainStep(model, target, settings)
        spread(losses, ema, settings, place)
        chosen = optimizers(model, settings["optimizer"], place)
        return cls(model, ema, target, losses, chosen)

    def average(self, ema_decay: float, target_decay: float) -> None:
        """Move the averages towards the weights; quicker while there have been few steps.

        Each process moves its own share of the tensors.
        """
        ramp = (1 + self.step) / (10 + self.step)
        pairs: list[tuple[nn.Module, nn.Module, float]] = [(self.ema, self.model, ema_decay)]
        if self.target is not None:
            assert isinstance(self.model, DJEPA)
            pairs.append((self.target, self.model.encoder, target_decay))
        with torch.no_grad():
            for average, source, decay in pairs:
                torch._foreach_lerp_(
                    [local(p) for p in average.parameters()],
                    [local(p) for p in source.parameters()],
                    1 - min(decay, ramp),
                )

    def averaged(self, params: dict[str, Any], encoded: EncodedSet, place: Team) -> Network | None:
        """The averaged network in one piece, on rank 0; None elsewhere. Every process calls it."""
        if not _sharded(self):
            return self.ema if place.leads else None
        weights = whole(_tensors(self.ema), place)
        if not place.leads:
            return None
        model = build_model(params, encoded)
        model.load_state_dict(weights)
        return model.to(place.device).requires_grad_(False).eval()


def build_model(params: dict[str, Any], encoded: EncodedSet) -> Network:
    """A network with fresh weights that fits an encoded set's tokens and text states."""
    tokenizer, text = encoded.tokenizer(), encoded.text_encoder()
    return build_network(
        params["model"]["network"], tokenizer.channels, text.width, int(params["seed"])
    )


def save_state(
    folder: Path, training: Training, place: Team | None = None, shards: bool = False
) -> None:
    """Write model, ema, target, optimizer, ledger and state.json, all or nothing.

    In a team every process calls it; rank 0 writes the folder. `shards`: where training is
    sharded, each process writes its own share, beside the others, which is quicker; all of them
    must see the same disk. Raises UserError when the disk does not take them.
    """
    folder, place = Path(folder), place or Team()
    try:
        if shards and _sharded(training):
            with _common_folder(folder, place) as target:
                for part, tensors in _parts(training).items():
                    write_shards(target / part, tensors)
                if place.leads:
                    _save_beside(target, training)
            return
        parts = {part: whole(tensors, place) for part, tensors in _parts(training).items()}
        if not place.leads:
            return
        with atomic_folder(folder) as target:
            for part, tensors in parts.items():
                write_whole(target / f"{part}.safetensors", tensors)
            _save_beside(target, training)
    except (OSError, SafetensorError, CheckpointException) as error:
        raise UserError(
            f"The training state cannot be written to {folder} ({_reason(error)}); make room on "
            "the disk and start again: training goes on from its last snapshot."
        ) from error


def load_state(folder: Path, training: Training) -> None:
    """Fill `training` from what `save_state` wrote; UserError when it is missing or unfit.

    Each process of a team reads its own share, however many processes wrote it.
    """
    folder = Path(folder)
    try:
        _read(folder, "model", _tensors(training.model))
        _read(folder, "ema", _tensors(training.ema))
        if training.target is not None:
            if files_of(folder, "target"):
                _read(folder, "target", _tensors(training.target))
            else:  # trained without L_pred so far: the encoder's other average stands in
                assert isinstance(training.ema, DJEPA)
                _copy(training.ema.encoder, training.target)
        _read_optimizers(folder, training)
        state = read_json(folder / "state.json")
        training.step, training.images = state.pop("step"), state.pop("images")
        training.extra = state
        if (folder / "ledger").is_dir():
            training.ledger = Ledger.load(folder / "ledger", training.scratch)
    except (
        OSError,
        RuntimeError,
        KeyError,
        ValueError,
        SafetensorError,
        CheckpointException,
    ) as error:
        raise UserError(
            f"The training state in {folder} is missing, damaged or of another network "
            f"({_reason(error)}); run the stage that makes it again."
        ) from error


def pipeline(model: Network, encoded: EncodedSet, sampler: SamplerConfig) -> DJEPAPipeline:
    """A pipeline around a network in training."""
    return DJEPAPipeline(model, encoded.tokenizer(), encoded.text_encoder(), sampler)


class Snapshots:
    """Resume snapshots of one stage: folder/step-N, only the newest kept."""

    def __init__(self, folder: Path, place: Team | None = None) -> None:
        self.folder, self.place = Path(folder), place or Team()

    def newest(self) -> Path | None:
        """The newest complete snapshot, if any; the one that rank 0 sees."""
        found = [p.name for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
        steps = [int(name.partition("-")[2]) for name in found]
        step = self.place.agree(max(steps, default=-1))
        return None if step < 0 else self.folder / f"step-{step}"

    def save(self, training: Training) -> None:
        """Write a snapshot, then remove the older ones; every process of a team calls it."""
        path = self.folder / f"step-{training.step}"
        save_state(path, training, self.place, shards=True)
        if self.place.leads:
            for other in self.folder.glob("step-*"):
                if other != path:
                    remove_folder(other)

    def clear(self) -> None:
        """Remove them all: the stage has ended well."""
        remove_folder(self.folder)


def _sharded(training: Training) -> bool:
    return any(isinstance(p, DTensor) for p in training.model.parameters())


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own tensors by the names that it has without what was wrapped around blocks."""
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def _names(training: Training) -> dict[Tensor, str]:
    names = _tensors(training.model).keys()
    return dict(zip(training.model.parameters(), names, strict=True))


def _parts(training: Training) -> dict[str, dict[str, Tensor]]:
    names = _names(training)
    parts = {"model": _tensors(training.model), "ema": _tensors(training.ema)}
    if training.target is not None:
        parts["target"] = _tensors(training.target)
    parts["optimizer"] = {
        f"{names[parameter]}:{key}": value
        for optimizer in training.optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    return parts


@contextmanager
def _common_folder(folder: Path, place: Team) -> Iterator[Path]:
    """Rank 0's `atomic_folder`, for every process to write in."""
    if place.leads:
        with atomic_folder(folder) as temporary:
            place.agree(os.getpid())
            yield temporary
    else:
        yield folder.with_name(f"{folder.name}.tmp-{place.agree(0)}")


def _save_beside(folder: Path, training: Training) -> None:
    """What is no tensor of the network."""
    if training.ledger is not None:
        training.ledger.save(folder / "ledger")
    write_json(
        folder / "state.json",
        {"step": training.step, "images": training.images, **training.extra},
    )


def _read(folder: Path, part: str, tensors: dict[str, Tensor]) -> None:
    reader, sizes = reader_of(folder, part)
    for name in sorted(sizes.keys() | tensors.keys()):
        saved, wanted = (sizes.get(name), tensors[name].shape if name in tensors else None)
        if saved != wanted:
            shapes = ["absent" if size is None else str(list(size)) for size in (saved, wanted)]
            raise ValueError(f"{name} is {shapes[0]} there and {shapes[1]} in this network")
    read_into(reader, tensors)


def _copy(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for a, b in zip(source.parameters(), target.parameters(), strict=True):
            local(b).copy_(local(a))


# What each optimiser keeps for a parameter.
_KEPT = {Muon: {"momentum"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}


def _read_optimizers(folder: Path, training: Training) -> None:
    reader, sizes = reader_of(folder, "optimizer")
    parameters = {name: parameter for parameter, name in _names(training).items()}
    owner = {p: o for o in training.optimizers for group in o.param_groups for p in group["params"]}
    tensors, places = {}, {}
    for full, size in sizes.items():
        name, _, key = full.rpartition(":")
        parameter = parameters[name]
        if key not in _KEPT[type(owner[parameter])]:
            raise ValueError(f"its {full} is of another optimizer than training.optimizer.kind")
        if size == parameter.shape:
            tensors[full] = torch.zeros_like(parameter.detach())
        else:  # AdamW's count of steps
            tensors[full] = torch.zeros(size, device=local(parameter).device)
        places[full] = parameter, key
    read_into(reader, tensors)
    for optimizer in training.optimizers:
        optimizer.state.clear()
    for full, (parameter, key) in places.items():
        owner[parameter].state[parameter][key] = tensors[full]


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error) or type(error).__name__).splitlines()[0]
