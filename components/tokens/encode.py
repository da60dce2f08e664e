"""The stage encode: curated shards to latents a rung and text states."""

import io
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from components.errors import UserError
from components.files import atomic_folder, write_json
from components.progress import Progress
from components.tokens.encoded import EncodedSet, rung_size
from components.tokens.text import TextEncoder
from components.tokens.tokenizer import PatchTokenizer
from components.tracking import Tracker

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def encode(
    curated: Path, out: Path, metrics_out: Path, params: dict[str, Any], tracker: Tracker
) -> None:
    """Encode curated shards into `out` (see `EncodedSet`) and write figures to `metrics_out`.

    The rungs are those of both training phases. A picture reaches a rung if it is at least as
    large and a centre crop to the rung's aspect takes away at most `model.encode.most_cropped` of
    it; then it is cropped and reduced, never enlarged. Raises UserError for an unreadable set,
    a manifest and shards that do not agree, or rungs that do not fit the tokeniser's patch.
    """
    model = params["model"]
    patch = int(model["tokenizer"]["patch"])
    phases = (params["training"]["phase1"], params["training"]["phase2"])
    rungs = {name: rung_size(name) for phase in phases for name in phase["rungs"]}
    for name, (width, height) in rungs.items():
        if width % patch or height % patch:
            raise UserError(
                f"The rung {name} in params.training is not a multiple of the tokeniser's patch "
                f"of {patch} pixels (model.tokenizer.patch)."
            )
    manifest = read_manifest(Path(curated))
    pixels: dict[str, list[np.ndarray]] = defaultdict(list)
    rows: dict[str, list[int]] = defaultdict(list)
    progress = Progress("encode", len(manifest), "pictures")
    identity = {key: row for row, key in enumerate(manifest["key"])}
    seen = np.zeros(len(manifest), bool)
    for key, data in read_pictures(Path(curated), manifest):
        row = identity[key]
        for name, picture in to_rungs(data, key, rungs, float(model["encode"]["most_cropped"])):
            pixels[name].append(picture)
            rows[name].append(row)
        seen[row] = True
        progress.at(int(seen.sum()))
    if not seen.all():
        missing = manifest["key"][~seen].tolist()
        raise UserError(
            f"{len(missing)} pictures of {curated}/manifest.parquet are in no shard, "
            f"{missing[0]} the first; run the stage curate again."
        )
    empty = [name for name in rungs if not rows[name]]
    if empty:
        raise UserError(
            f"No picture of {curated} reaches the rungs {', '.join(empty)}; take them out of "
            "params.training or curate larger pictures."
        )
    tokenizer = PatchTokenizer(patch, int(model["tokenizer"]["channels"]))
    images = {name: as_tensor(np.stack(pixels.pop(name))) for name in rungs}
    kept = tokenizer.fit([images[name] for name in phases[0]["rungs"]])
    text = TextEncoder.from_config(dict(model["text"]))
    with atomic_folder(Path(out)) as target:
        (target / "latents").mkdir()
        error = {}
        for name in rungs:
            latents, squares = [], 0.0
            for chunk in images[name].split(512):
                latents.append(tokenizer.encode(chunk))
                squares += float(
                    (tokenizer.decode(latents[-1]) - chunk).square().mean(dim=(1, 2, 3)).sum()
                )
            error[name] = squares / len(images[name])
            # Rows in ascending order, whatever the shards' order was.
            order = torch.tensor(rows[name]).argsort()
            save_file(
                {
                    "latents": torch.cat(latents)[order].bfloat16().contiguous(),
                    "rows": torch.tensor(rows[name])[order].contiguous(),
                },
                target / "latents" / f"{name}.safetensors",
            )
        save_file(encode_text(text, manifest["caption"].tolist()), target / "text.safetensors")
        manifest.to_parquet(target / "index.parquet", index=False)
        tokenizer.save_pretrained(target / "tokenizer")
        text.save_pretrained(target / "text_encoder")
        reached = np.zeros(len(manifest), bool)
        for name in rungs:
            reached[rows[name]] = True
        summary: dict[str, Any] = {
            "pictures": len(manifest),
            "in_no_rung": int((~reached).sum()),
            "rungs": {name: len(rows[name]) for name in rungs},
            "variance_kept": kept,
            "pixel_mse": error,  # of pixels in [−1, 1]
        }
    EncodedSet.open(Path(out))
    write_json(metrics_out, summary)
    tracker.log_metrics(
        {
            "encode/pictures": len(manifest),
            "encode/in_no_rung": int((~reached).sum()),
            "encode/variance_kept": kept,
        }
    )


def read_manifest(curated: Path) -> pd.DataFrame:
    """The curated set's manifest, sorted by key. UserError when missing, empty or damaged."""
    path = curated / "manifest.parquet"
    try:
        manifest = pd.read_parquet(path)
        manifest = manifest.sort_values("key", kind="stable").reset_index(drop=True)
        manifest[["shard", "caption"]]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); run the stage curate again.") from error
    if manifest.empty or manifest["key"].duplicated().any():
        raise UserError(f"{path} is empty or names a key twice; run the stage curate again.")
    return manifest


def read_pictures(curated: Path, manifest: pd.DataFrame) -> Iterator[tuple[str, bytes]]:
    """Key and bytes of each picture of the manifest, read shard by shard, nothing unpacked."""
    wanted = set(manifest["key"])
    for path in sorted(curated.glob("*.tar")):
        try:
            with tarfile.open(path) as shard:
                for member in shard:
                    key, dot, extension = Path(member.name).name.partition(".")
                    if not member.isfile() or key not in wanted or dot + extension not in PICTURES:
                        continue
                    file = shard.extractfile(member)
                    assert file is not None
                    yield key, file.read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(
                f"The shard {path} is damaged ({error}); run the stage curate again."
            ) from error


def to_rungs(
    data: bytes, key: str, rungs: dict[str, tuple[int, int]], most_cropped: float
) -> Iterator[tuple[str, np.ndarray]]:
    """The rungs that a picture reaches, each with its pixels (H, W, 3) uint8."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"The picture {key} cannot be read ({error}); run the stage curate again."
        ) from error
    width, height = picture.size
    for name, (w, h) in rungs.items():
        scale = min(width / w, height / h)
        crop_w, crop_h = w * scale, h * scale
        if scale < 1 or 1 - crop_w * crop_h / (width * height) > most_cropped:
            continue
        left, top = (width - crop_w) / 2, (height - crop_h) / 2
        box = (left, top, left + crop_w, top + crop_h)
        yield name, np.asarray(picture.resize((w, h), Image.Resampling.BOX, box=box))


def as_tensor(pixels: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) in [−1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def encode_text(encoder: TextEncoder, captions: list[str]) -> dict[str, Tensor]:
    """Token states of all captions end to end, bfloat16 (T, D), and offsets (n + 1,) into them."""
    distinct = sorted(set(captions), key=len)  # batches of like length
    states: dict[str, Tensor] = {}
    progress = Progress("encode text", len(distinct), "captions")
    for start in range(0, len(distinct), 128):
        batch = distinct[start : start + 128]
        encoded, mask = encoder.encode(batch)
        for caption, each, length in zip(batch, encoded, mask.sum(1).tolist(), strict=True):
            states[caption] = each[:length].bfloat16()
        progress.at(start + len(batch))
    lengths = torch.tensor([0] + [len(states[caption]) for caption in captions])
    return {
        "states": torch.cat([states[caption] for caption in captions]).contiguous(),
        "offsets": lengths.cumsum(0),
    }
