"""Training that goes on from a packed model (`params.init`) instead of from fresh weights."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from components.errors import UserError
from components.files import read_json
from components.model.build import load_network
from components.model.network import Network
from components.parts import WEIGHTS
from components.starter import WORLD
from components.tokens.tokenizer import ImageTokenizer

NONE = "none"
# What decides which combinations exist and which are held out. How often each occurs may differ.
COMBINATIONS = ("source", "glyphs", "shapes", "colors", "counts", "relations", "held_out")
WAY = "or `djepa compose init=none` to begin with fresh weights"


def packed(params: Mapping[str, Any]) -> Path | None:
    """The folder that `params.init` names, found fit for these parameters; None for `none`.

    Raises:
        UserError: it is no packed model, has other weights than were recorded, or knows another
            world, tokeniser or text encoder.
    """
    init = params["init"]
    if init["model"] == NONE:
        return None
    folder = Path(init["model"])
    if not (folder / WORLD).is_file():
        raise UserError(
            f"init.model is {folder}, which has no {WORLD}: it is no packed model; compose "
            f"init=starter, {WAY}."
        )
    if weights_hash(folder) != str(init["weights"]):
        raise UserError(
            f"The weights in {folder} are not those that params.init names ({init['weights']}): "
            f"run `djepa compose`, or take both from one commit, {WAY}."
        )
    _refuse_another(folder, _compared(folder, params))
    return folder


def weights_hash(folder: Path) -> str:
    """Sixteen hex digits of SHA-256 over a model folder's network."""
    with (folder / "transformer" / WEIGHTS).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _compared(folder: Path, params: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, value here, value of the packed model) of what must be the same in both."""
    world, model = read_json(folder / WORLD)["data"], params["model"]
    for name in COMBINATIONS:
        yield f"data.{name}", params["data"].get(name), world.get(name)
    for part, group in (("tokenizer", "tokenizer"), ("text_encoder", "text")):
        saved = read_json(folder / part / "config.json")
        for name, value in model[group].items():
            yield f"model.{group}.{name}", value, saved.get(name)


def _refuse_another(folder: Path, compared: Iterable[tuple[str, Any, Any]]) -> None:
    """UserError for the first (name, value here, value there) that differ."""
    for name, here, there in compared:
        if here != there:
            scale = read_json(folder / WORLD)["scale"]
            raise UserError(
                f"init={folder.parent.name}: {name} is {here!r} here and {there!r} in {folder}, "
                f"so its weights mean nothing here: compose scale={scale}, {WAY}."
            )


def tokenizer_of(folder: Path) -> ImageTokenizer:
    """The packed model's image tokeniser: its network knows no other principal components."""
    return ImageTokenizer.from_pretrained(folder / "tokenizer")


def begin(folder: Path, tokenizer: ImageTokenizer, model: Network) -> None:
    """Copy the packed network into `model`; `tokenizer` is that of the encoded set.

    Raises:
        UserError: a network of other sizes, or latents of another tokeniser.
    """
    saved = load_network(folder / "transformer")
    here, there = asdict(model.config), asdict(saved.config)
    names = sorted(here.keys() | there.keys())
    _refuse_another(
        folder, ((f"model.network.{name}", here.get(name), there.get(name)) for name in names)
    )
    fitted, known = tokenizer.state_dict(), tokenizer_of(folder).state_dict()
    if any(not torch.equal(fitted[name].cpu(), known[name]) for name in known):
        raise UserError(
            f"init={folder.parent.name}: the set was encoded by another tokeniser than that of "
            f"{folder}: run `dvc repro encode`, {WAY}."
        )
    model.load_state_dict(saved.state_dict())
