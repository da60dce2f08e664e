"""Networks by the names that params.model.network.kind and saved folders have for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from components.errors import UserError
from components.files import read_json
from components.model.dit import FlowDiT
from components.model.djepa import DJEPA
from components.model.network import Network

NETWORKS: dict[str, type[Network]] = {"djepa": DJEPA, "flow_dit": FlowDiT}


def build_network(
    settings: Mapping[str, Any], channels: int, text_width: int, seed: int
) -> Network:
    """A network with fresh weights from `params.model.network` and the widths of its tokens.

    Raises UserError for an unknown kind, or settings that do not fit it.
    """
    sizes = dict(settings)
    kind = sizes.pop("kind", None)
    if kind not in NETWORKS:
        raise UserError(
            f"model.network.kind is {kind!r}: set it to {' or '.join(NETWORKS)} in params/model."
        )
    network = NETWORKS[kind]
    wanted = set(network.Config.__dataclass_fields__) - {"channels", "text_width"}
    if wanted - set(sizes):
        raise UserError(
            f"model.network lacks {', '.join(sorted(wanted - set(sizes)))}, which {kind} needs; "
            "add it in params/model."
        )
    # Sizes of the other kind may stand beside: an ablation changes `kind` alone.
    config = network.Config(
        channels=channels, text_width=text_width, **{name: sizes[name] for name in wanted}
    )
    # The layers draw from torch's global generator: lend them a seeded one.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network(config)


def load_network(folder: Path) -> Network:
    """Read a saved network of either kind; UserError names what is missing or unfit."""
    folder = Path(folder)
    classes = {network.__name__: network for network in NETWORKS.values()}
    name = None
    if (folder / "config.json").is_file():
        try:
            name = read_json(folder / "config.json").get("_class_name")
        except ValueError:
            name = "an unreadable config.json"
    if name is None:
        return DJEPA.from_pretrained(folder)  # which says what is missing
    if name not in classes:
        raise UserError(
            f"{folder} holds {name}, not one of {', '.join(classes)}: it is another model's "
            "folder; name one that this project trained."
        )
    return classes[name].from_pretrained(folder)
