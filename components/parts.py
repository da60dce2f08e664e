"""One part of a saved model: config.json and safetensors, in the layout of diffusers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from components.errors import UserError
from components.files import atomic_file, write_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
Part = TypeVar("Part", bound=nn.Module)


def save_part(folder: Path, module: nn.Module, config: dict[str, Any]) -> None:
    """Write `config` and the module's weights into `folder`."""
    folder = Path(folder)
    write_json(folder / "config.json", {"_class_name": type(module).__name__, **config})
    weights = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    with atomic_file(folder / WEIGHTS) as temporary:
        save_file(weights, temporary)


def load_part(folder: Path, build: Callable[[dict[str, Any]], Part]) -> Part:
    """Build a module from `folder`'s config and load its weights.

    Raises UserError when a file is missing or does not fit.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        module = build({key: value for key, value in config.items() if not key.startswith("_")})
        module.load_state_dict(load_file(folder / WEIGHTS))
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename or folder / WEIGHTS} is missing: {folder} is not a saved model part; "
            "train the model again or point to a complete folder."
        ) from error
    except (json.JSONDecodeError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder} cannot be loaded ({reason}): its config.json and weights do not fit each "
            "other; train the model again or point to a complete folder."
        ) from error
    return module
