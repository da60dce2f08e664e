"""The stage encode: curated shards to latents a rung and text states, or to what makes them."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from components.errors import UserError
from components.files import atomic_folder, write_json
from components.progress import Progress
from components.starter.begin import packed, tokenizer_of
from components.tokens.attributes import write_attributes
from components.tokens.encoded import ATTRIBUTES, ROWS, SAMPLES, SOURCE, EncodedSet
from components.tokens.online import PLACES
from components.tokens.pictures import CuratedPictures, keys_hash, locate, read_manifest
from components.tokens.rungs import as_tensor, fitted, phase_rungs, reaching
from components.tokens.stream import TensorStream
from components.tokens.text import TextEncoder
from components.tokens.tokenizer import ImageTokenizer, PatchTokenizer
from components.tracking import Tracker

WINDOW = 32  # batches of captions held at a time


@dataclass
class Batch:
    """Pictures of one rung: their place among the rung's rows and their pixels (B, H, W, 3)."""

    rung: str
    places: np.ndarray
    pixels: np.ndarray


def encode(
    curated: Path, out: Path, metrics_out: Path, params: dict[str, Any], tracker: Tracker
) -> None:
    """Encode curated shards into `out` (see `EncodedSet`) and write figures to `metrics_out`.

    The rungs are those of both training phases; which pictures reach one, see `reaching`. With
    `data.encode: online` no picture and no caption is encoded. The tokeniser `patches` is fitted
    in either case, unless `params.init` names a model that has one. Beside the files being
    written, memory holds the manifest and one batch a rung, whatever the number of pictures.

    Raises UserError for an unreadable set, a manifest and shards that do not agree, rungs that do
    not fit the tokeniser, weights that are not here, or a packed model that does not fit.
    """
    curated, out, settings = Path(curated), Path(out), params["model"]["encode"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begun = packed(params)
    if begun is None:
        tokenizer = ImageTokenizer.from_config(params["model"]["tokenizer"]).to(device)
    else:
        tokenizer = tokenizer_of(begun).to(device)
    text = TextEncoder.from_config(dict(params["model"]["text"])).to(device)
    rungs = phase_rungs(params, tokenizer.patch)
    manifest = read_manifest(curated)
    places = locate(curated, manifest)
    pictures = CuratedPictures(curated, manifest, places)
    cropped = float(settings["most_cropped"])
    rows = {
        name: reaching(pictures.widths, pictures.heights, size, cropped)
        for name, size in rungs.items()
    }
    empty = [name for name in rungs if not len(rows[name])]
    if empty:
        raise UserError(
            f"No picture of {curated} reaches the rungs {', '.join(empty)}; take them out of "
            "params.training or curate larger pictures."
        )
    in_any = np.zeros(len(manifest), bool)
    for reached in rows.values():
        in_any[reached] = True
    summary: dict[str, Any] = {
        "pictures": len(manifest),
        "in_no_rung": int((~in_any).sum()),
        "rungs": {name: len(rows[name]) for name in rungs},
    }
    batch_pixels = int(settings["batch_pixels"])
    if isinstance(tokenizer, PatchTokenizer) and begun is None:
        first = {name: rungs[name] for name in params["training"]["phase1"]["rungs"]}
        batches = _batches("fit tokeniser", pictures, first, rows, batch_pixels)
        kept = tokenizer.fit(as_tensor(batch.pixels).to(device) for batch in batches)
        summary["variance_kept"] = kept
    with atomic_folder(out) as target:
        manifest.to_parquet(target / "index.parquet", index=False)
        shards = manifest["shard"].astype(str).value_counts(sort=False)
        keys = keys_hash(manifest["key"].astype(str))
        listed = {"samples": len(manifest), "keys": keys, "shards": shards.to_dict()}
        write_json(target / SAMPLES, listed)
        write_attributes(target / ATTRIBUTES, curated, manifest)
        (target / ROWS).mkdir()
        for name, reached in rows.items():
            np.save(target / ROWS / f"{name}.npy", reached)
        tokenizer.save_pretrained(target / "tokenizer")
        text.save_pretrained(target / "text_encoder")
        if params["data"]["encode"] == "online":
            places.to_parquet(target / PLACES, index=False)
            beside = os.path.relpath(curated.resolve(), out.resolve())
            source = {"curated": beside, "rungs": list(rungs)}
            write_json(target / SOURCE, source)
        else:
            batches = _batches("encode", pictures, rungs, rows, batch_pixels)
            decoded = int(settings["decoded"])
            summary["pixel_mse"] = _write_latents(
                target / "latents", tokenizer, rungs, rows, batches, decoded
            )
            captions = manifest["caption"].tolist()
            write_text(target / "text.safetensors", text, captions, int(settings["captions"]))
    pictures.close()
    EncodedSet.open(out)
    write_json(metrics_out, summary)
    figures = {k: v for k, v in summary.items() if not isinstance(v, dict)}
    tracker.log_metrics({f"encode/{name}": value for name, value in figures.items()})


def _batches(
    words: str,
    pictures: CuratedPictures,
    rungs: Mapping[str, tuple[int, int]],
    rows: Mapping[str, np.ndarray],
    batch_pixels: int,
) -> Iterator[Batch]:
    """Batches of at most `batch_pixels` pixels, each picture read once for all its rungs."""
    reached = np.unique(np.concatenate([rows[name] for name in rungs]))
    wanted = np.zeros(len(pictures.keys), bool)
    wanted[reached] = True
    held: dict[str, tuple[list[int], list[np.ndarray]]] = {name: ([], []) for name in rungs}
    progress = Progress(words, len(reached), "pictures")
    order = pictures.in_file_order()
    for number, row in enumerate(order[wanted[order]]):
        pixels = pictures.pixels(int(row))
        for name, size in rungs.items():
            place = int(np.searchsorted(rows[name], row))
            if place == len(rows[name]) or rows[name][place] != row:
                continue
            places, images = held[name]
            places.append(place)
            images.append(fitted(pixels, size))
            if len(places) >= max(1, batch_pixels // (size[0] * size[1])):
                yield Batch(name, np.array(places), np.stack(images))
                held[name] = ([], [])
        progress.at(number + 1)
    for name, (places, images) in held.items():
        if places:
            yield Batch(name, np.array(places), np.stack(images))


@torch.no_grad()
def _write_latents(
    folder: Path,
    tokenizer: ImageTokenizer,
    rungs: Mapping[str, tuple[int, int]],
    rows: Mapping[str, np.ndarray],
    batches: Iterable[Batch],
    decoded: int,
) -> dict[str, float]:
    """Write a file a rung; gives the mean square error of pixels in [−1, 1] by rung.

    The error is that of the rung's first `decoded` pictures, decoded again.
    """
    folder.mkdir()
    files = {}
    for name, (width, height) in rungs.items():
        shape = (tokenizer.channels, height // tokenizer.patch, width // tokenizer.patch)
        path = folder / f"{name}.safetensors"
        files[name] = TensorStream(path, "latents", shape, "rows", len(rows[name]))
    squares, counts = dict.fromkeys(rungs, 0.0), dict.fromkeys(rungs, 0)
    try:
        for batch in batches:
            images = as_tensor(batch.pixels).to(tokenizer.device)
            latents = tokenizer.encode(images)
            for place, each in zip(batch.places.tolist(), latents.cpu(), strict=True):
                files[batch.rung].write(place, each[None])
            some = min(len(images), decoded - counts[batch.rung])
            if some > 0:
                errors = (tokenizer.decode(latents[:some]) - images[:some]).square()
                squares[batch.rung] += float(errors.mean(dim=(1, 2, 3)).sum())
                counts[batch.rung] += some
        for name, file in files.items():
            file.finish(rows[name])
    finally:
        for file in files.values():
            file.close()
    return {name: squares[name] / max(counts[name], 1) for name in rungs}


def write_text(path: Path, encoder: TextEncoder, captions: list[str], batch: int) -> None:
    """Write the token states of all captions end to end (T, D), and offsets (n + 1,) into them.

    A window of captions at a time: its distinct ones are encoded once, in batches of like
    length.
    """
    offsets = np.zeros(len(captions) + 1, np.int64)
    progress = Progress("encode text", len(captions), "captions")
    with TensorStream(path, "states", (encoder.width,), "offsets", len(offsets)) as file:
        for start in range(0, len(captions), WINDOW * batch):
            window = captions[start : start + WINDOW * batch]
            distinct = sorted(set(window), key=len)
            states: dict[str, torch.Tensor] = {}
            for first in range(0, len(distinct), batch):
                some = distinct[first : first + batch]
                encoded, mask = encoder.encode(some)
                for caption, each, length in zip(some, encoded, mask.sum(1).tolist(), strict=True):
                    states[caption] = each[:length].bfloat16().cpu()
            for number, caption in enumerate(window, start):
                offsets[number + 1] = offsets[number] + len(states[caption])
            file.write(int(offsets[start]), torch.cat([states[caption] for caption in window]))
            progress.at(start + len(window))
        file.finish(offsets)
