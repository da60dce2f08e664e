"""What training keeps: raw weights, their average, the target encoder, the optimisers' state.

Only safetensors and JSON are written and read. A snapshot is a new folder that takes its name
when it is complete, so a kill at any moment leaves the one before it.
"""

import copy
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.errors import UserError
from components.files import atomic_folder, read_json, write_json
from components.model.build import build_network
from components.model.djepa import DJEPA, Encoder
from components.model.network import Network
from components.model.pipeline import DJEPAPipeline
from components.model.sampler import SamplerConfig
from components.tokens.encoded import EncodedSet
from components.training.optim import optimizers


@dataclass
class Training:
    """A model in training."""

    model: Network
    ema: Network  # the running average of `model`, for drawing
    target: Encoder | None  # φ̄, the running average of the context encoder; None: no L_pred
    optimizers: list[torch.optim.Optimizer]
    step: int = 0  # over all phases so far
    images: int = 0  # seen, over all phases so far
    extra: dict[str, Any] = field(default_factory=dict)  # plain JSON values

    @classmethod
    def fresh(cls, params: dict[str, Any], encoded: EncodedSet, device: str = "cpu") -> "Training":
        """A new model for an encoded set, from `params.seed`, `.model` and `.training`."""
        model = build_model(params, encoded).to(device)
        ema = copy.deepcopy(model).requires_grad_(False).eval()
        target = None
        if isinstance(model, DJEPA) and params["training"]["jepa_weight"] > 0:
            target = copy.deepcopy(model.encoder).requires_grad_(False).eval()
        return cls(model, ema, target, optimizers(model, params["training"]["optimizer"]))

    def average(self, ema_decay: float, target_decay: float) -> None:
        """Move the averages towards the weights; quicker while there have been few steps."""
        ramp = (1 + self.step) / (10 + self.step)
        pairs: list[tuple[nn.Module, nn.Module, float]] = [(self.ema, self.model, ema_decay)]
        if self.target is not None:
            assert isinstance(self.model, DJEPA)
            pairs.append((self.target, self.model.encoder, target_decay))
        with torch.no_grad():
            for average, source, decay in pairs:
                torch._foreach_lerp_(
                    list(average.parameters()), list(source.parameters()), 1 - min(decay, ramp)
                )


def build_model(params: dict[str, Any], encoded: EncodedSet) -> Network:
    """A network with fresh weights that fits an encoded set's tokens and text states."""
    tokenizer, text = encoded.tokenizer(), encoded.text_encoder()
    return build_network(
        params["model"]["network"], tokenizer.channels, text.width, int(params["seed"])
    )


def save_state(folder: Path, training: Training) -> None:
    """Write model, ema, target and optimizer as safetensors and state.json, all or nothing.

    Raises UserError when the disk does not take them.
    """
    try:
        with atomic_folder(Path(folder)) as target:
            _save(target / "model.safetensors", training.model.state_dict())
            _save(target / "ema.safetensors", training.ema.state_dict())
            if training.target is not None:
                _save(target / "target.safetensors", training.target.state_dict())
            _save(target / "optimizer.safetensors", _optimizer_tensors(training))
            write_json(
                target / "state.json",
                {"step": training.step, "images": training.images, **training.extra},
            )
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The training state cannot be written to {folder} ({error}); make room on the disk "
            "and start again: training goes on from its last snapshot."
        ) from error


def load_state(folder: Path, training: Training) -> None:
    """Fill `training` from what `save_state` wrote; UserError when it is missing or unfit."""
    folder = Path(folder)
    try:
        training.model.load_state_dict(load_file(folder / "model.safetensors"))
        training.ema.load_state_dict(load_file(folder / "ema.safetensors"))
        if training.target is not None:
            training.target.load_state_dict(load_file(folder / "target.safetensors"))
        _load_optimizers(training, load_file(folder / "optimizer.safetensors"))
        state = read_json(folder / "state.json")
        training.step, training.images = state.pop("step"), state.pop("images")
        training.extra = state
    except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"The training state in {folder} is missing, damaged or of another network ({reason}); "
            "run the stage that makes it again."
        ) from error


def save_model_folder(
    folder: Path, model: Network, encoded: EncodedSet, params: dict[str, Any]
) -> None:
    """Write a pipeline folder: this network, the encoded set's tokeniser and text encoder."""
    sampler = SamplerConfig.from_params(params)
    facts = {"scale": params["scale"]} if "scale" in params else None
    pipeline(model, encoded, sampler).save_pretrained(folder, facts)


def pipeline(model: Network, encoded: EncodedSet, sampler: SamplerConfig) -> DJEPAPipeline:
    """A pipeline around a network in training."""
    return DJEPAPipeline(model, encoded.tokenizer(), encoded.text_encoder(), sampler)


class Snapshots:
    """Resume snapshots of one stage: folder/step-N, only the newest kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def newest(self) -> Path | None:
        """The newest complete snapshot, if any."""
        found = [p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
        return max(found, key=lambda p: int(p.name.partition("-")[2]), default=None)

    def save(self, training: Training) -> None:
        """Write a snapshot, then remove the older ones."""
        path = self.folder / f"step-{training.step}"
        save_state(path, training)
        for other in self.folder.glob("step-*"):
            if other != path:
                shutil.rmtree(other, ignore_errors=True)

    def clear(self) -> None:
        """Remove them all: the stage has ended well."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _names(training: Training) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in training.model.named_parameters()}


def _optimizer_tensors(training: Training) -> dict[str, Tensor]:
    names = _names(training)
    return {
        f"{names[parameter]}:{key}": value
        for optimizer in training.optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _load_optimizers(training: Training, tensors: dict[str, Tensor]) -> None:
    for optimizer in training.optimizers:
        optimizer.state.clear()
    owner = {p: o for o in training.optimizers for group in o.param_groups for p in group["params"]}
    parameters = {name: parameter for parameter, name in _names(training).items()}
    for full, value in tensors.items():
        name, _, key = full.rpartition(":")
        parameter = parameters[name]
        # AdamW's step counter stays on the CPU; the rest lies beside its parameter.
        place = value if key == "step" else value.to(parameter.device)
        owner[parameter].state[parameter][key] = place
