"""The raw pictures of the embedded world, as webdataset shards in img2dataset's layout.

Each picture depends on (data.seed, its index) alone, so any number of processes writes the
same bytes. Tables and archives carry no time and no owner.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from components.curation.shards import write_shard
from components.errors import UserError
from components.files import atomic_folder, write_json
from components.processes import spread
from components.progress import Progress
from components.scenes.defects import KINDS, PIXELS, nearly
from components.scenes.world import World
from components.tracking import Tracker

MOST_IN_SHARD, MOST_SHARDS = 10_000, 100_000  # four and five digits of a key
COLUMNS = [
    ("url", pa.string()),
    ("caption", pa.string()),
    ("key", pa.string()),
    ("status", pa.string()),
    ("error_message", pa.string()),
    ("width", pa.int64()),
    ("height", pa.int64()),
    ("original_width", pa.int64()),
    ("original_height", pa.int64()),
    ("exif", pa.string()),
    ("sha256", pa.string()),
    ("source", pa.string()),
    ("synthetic", pa.bool_()),
]


@dataclass(frozen=True)
class RawPicture:
    """One raw sample: JPEG bytes, sides in pixels, caption, origin and ground truth."""

    data: bytes
    width: int
    height: int
    caption: str
    source: str
    synthetic: bool
    truth: dict[str, Any]


class RawPictures:
    """Draws the raw picture of any index."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        check_settings(data)
        self.world = World.from_params(data)
        self.data, self.raw, self.defects = data, data["raw"], data["defects"]
        self.sizes = [parse_size(name) for name in self.raw["sizes"]]
        self.weights = np.cumsum([float(v) for v in self.raw["sizes"].values()])
        self.shares = np.cumsum([float(self.defects[kind]["share"]) for kind in KINDS])

    def key(self, index: int) -> str:
        """img2dataset's key: five digits of the shard and four of the place in it."""
        shard, place = divmod(index, int(self.raw["shard"]))
        return f"{shard:05d}{place:04d}"

    def _rng(self, index: int, part: int) -> np.random.Generator:
        return np.random.default_rng([int(self.data["seed"]), index, part])

    def _drawn_kind(self, index: int) -> str | None:
        at = int(np.searchsorted(self.shares, self._rng(index, 0).random(), side="right"))
        return KINDS[at] if at < len(KINDS) else None

    def _original(self, index: int) -> int | None:
        """An earlier sound picture; none before the first."""
        order = self._rng(index, 1).permutation(index)
        return next((int(j) for j in order if self._drawn_kind(int(j)) is None), None)

    def picture(self, index: int) -> RawPicture:
        """Draw the picture of this index: sound, or with the defect that fell to it."""
        kind = self._drawn_kind(index)
        if kind == "repeated":
            original = self._original(index)
            if original is not None:
                return self._repeated(index, original)
            kind = None
        rng = self._rng(index, 2)
        at = int(np.searchsorted(self.weights, rng.random() * self.weights[-1], side="right"))
        width, height = self.sizes[at]
        if kind == "too_small":
            low, high = self.defects[kind]["shorter_side"]
            scale = int(rng.integers(low, high + 1)) / min(width, height)
            width, height = round(width * scale), round(height * scale)
        scene = self.world.sample_scene(rng, width / height)
        pixels = self.world.draw(scene, width, height, rng)
        truth = scene.truth(width, height)
        if kind in PIXELS:
            pixels = PIXELS[kind](pixels, rng, self.defects[kind])
        if kind == "blank":
            truth["objects"] = []
        return RawPicture(
            encode_jpeg(pixels, int(self.raw["jpeg_quality"])),
            width,
            height,
            scene.caption,
            scene.source,
            bool(rng.random() < float(self.data["synthetic"])),
            {**truth, "defect": kind, "of": None},
        )

    def _repeated(self, index: int, original: int) -> RawPicture:
        rng, settings = self._rng(index, 2), self.defects["repeated"]
        first = self.picture(original)
        data, dx, dy = first.data, 0, 0
        if rng.random() >= float(settings["exact"]):
            pixels = np.asarray(Image.open(io.BytesIO(data)))
            pixels, quality, (dx, dy) = nearly(pixels, rng, settings)
            data = encode_jpeg(pixels, quality or int(self.raw["jpeg_quality"]))
        objects = [
            {**thing, "box": _moved(thing["box"], dx, dy, first.width, first.height)}
            for thing in first.truth["objects"]
        ]
        return RawPicture(
            data,
            first.width,
            first.height,
            first.caption,
            first.source,
            first.synthetic,
            {**first.truth, "objects": objects, "defect": "repeated", "of": self.key(original)},
        )


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """JPEG with full colour resolution; uint8 (H, W, 3) in.

    libjpeg-turbo's integer transform gives the same bytes on every processor, which PNG's
    zlib variants do not.
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def parse_size(name: str) -> tuple[int, int]:
    """`192x144` as (192, 144) pixels, width first.

    Raises:
        UserError: it has another form.
    """
    width, by, height = str(name).partition("x")
    if not (by and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UserError(f"data.raw.sizes has {name!r}: write WIDTHxHEIGHT, for example 192x144.")
    return int(width), int(height)


def check_settings(data: Mapping[str, Any]) -> None:
    """Raise UserError for a setting of the raw pictures that cannot be meant, naming it."""
    raw, defects = data["raw"], data["defects"]
    if unknown := sorted(set(defects) - set(KINDS)) + sorted(set(KINDS) - set(defects)):
        raise UserError(f"data.defects must have exactly {', '.join(KINDS)}; see {unknown}.")
    if not raw["sizes"]:
        raise UserError("data.raw.sizes is empty: give at least one WIDTHxHEIGHT: weight.")
    shares = {kind: float(defects[kind]["share"]) for kind in KINDS}
    shorter = min(min(parse_size(name)) for name in raw["sizes"])
    shards = -(-int(raw["pictures"]) // max(int(raw["shard"]), 1))
    small = defects["too_small"]["shorter_side"]
    ranges = [
        ("lettering.height", defects["lettering"]["height"], 1),
        ("too_small.shorter_side", small, 16),
        ("blurred.sigma", defects["blurred"]["sigma"], 0),
        ("noisy.sigma", defects["noisy"]["sigma"], 0),
    ]
    checks = [
        ("raw.pictures", raw["pictures"], int(raw["pictures"]) >= 1, "at least 1"),
        ("raw.shard", raw["shard"], 1 <= int(raw["shard"]) <= MOST_IN_SHARD,
         f"1 to {MOST_IN_SHARD} pictures"),
        ("raw.pictures", raw["pictures"], shards <= MOST_SHARDS, f"at most {MOST_SHARDS} shards"),
        ("raw.jpeg_quality", raw["jpeg_quality"], 1 <= int(raw["jpeg_quality"]) <= 100, "1 to 100"),
        ("raw.sizes", raw["sizes"],
         all(float(v) >= 0 for v in raw["sizes"].values()) and sum(raw["sizes"].values()) > 0,
         "weights of at least 0, one above"),
        ("synthetic", data["synthetic"], 0 <= float(data["synthetic"]) <= 1, "a share, 0 to 1"),
        *((f"defects.{kind}.share", share, 0 <= share <= 1, "a share, 0 to 1")
          for kind, share in shares.items()),
        ("defects: the sum of all shares", round(sum(shares.values()), 6),
         sum(shares.values()) <= 1 + 1e-9, "at most 1"),
        ("defects.too_small.shorter_side", small, small[1] < shorter,
         f"less than the {shorter} px of the smallest of data.raw.sizes"),
        *((f"defects.{name}", list(pair), least <= pair[0] <= pair[1],
           f"[least, most], from {least} on") for name, pair, least in ranges),
    ]  # fmt: skip
    for name, value, fits, wanted in checks:
        if not fits:
            raise UserError(f"data.{name} is {value!r}: set it to {wanted} in params/.")


def _moved(box: list[float], dx: int, dy: int, width: int, height: int) -> list[float]:
    x1, y1, x2, y2 = box
    moved = (min(x1 + dx, width), min(y1 + dy, height), min(x2 + dx, width), min(y2 + dy, height))
    return [round(float(v), 2) for v in moved]


def write_raw_shard(folder: Path, shard: int, data: Mapping[str, Any]) -> dict[str, int]:
    """Write one shard: NAME.tar, NAME.parquet, NAME_stats.json; return the number by defect."""
    pictures = RawPictures(data)
    size = int(data["raw"]["shard"])
    counts = dict.fromkeys(("sound", *KINDS), 0)
    samples: list[tuple[str, dict[str, bytes]]] = []
    rows: list[dict[str, Any]] = []
    for index in range(shard * size, min((shard + 1) * size, int(data["raw"]["pictures"]))):
        picture, key = pictures.picture(index), pictures.key(index)
        row = {
            "url": f"{data['source']}:{data['seed']}/{index}",
            "caption": picture.caption,
            "key": key,
            "status": "success",
            "error_message": None,
            "width": picture.width,
            "height": picture.height,
            "original_width": picture.width,
            "original_height": picture.height,
            "exif": "{}",
            "sha256": hashlib.sha256(picture.data).hexdigest(),
            "source": picture.source,
            "synthetic": picture.synthetic,
        }
        rows.append(row)
        members = {
            "jpg": picture.data,
            "txt": picture.caption.encode(),
            "json": json.dumps({**row, "scene": picture.truth}, indent=4).encode(),
        }
        samples.append((key, members))
        counts[picture.truth["defect"] or "sound"] += 1
    write_shard(folder / f"{shard:05d}.tar", samples)
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(COLUMNS)), folder / f"{shard:05d}.parquet")
    stats = {
        "count": len(rows),
        "successes": len(rows),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        # Times would make every drawing differ.
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": len(rows)},
    }
    write_json(folder / f"{shard:05d}_stats.json", stats)
    return counts


def write_raw(
    out: Path, params: Mapping[str, Any], tracker: Tracker, workers: int | None = None
) -> None:
    """Draw the world's raw pictures into the folder `out`, replacing what is there.

    Args:
        out: gets {00000}.tar, {00000}.parquet and {00000}_stats.json as img2dataset writes them,
            and in each member's JSON also `source`, `synthetic` and the ground truth `scene`:
            task, objects (class, color, box x1 y1 x2 y2 in pixels), defect (a kind or null) and
            `of`, the key that a repeated picture repeats. `objects` is what is drawn; a blank
            picture has none, whatever its caption says.
        params: the composed parameters, of which `data` is read.
        tracker: told the number of pictures by defect.
        workers: processes; by default one for each usable core. The bytes do not depend on it.

    Raises:
        UserError: settings that cannot be met, or a process that dies.
    """
    data = params["data"]
    RawPictures(data)  # refuses impossible settings before any process starts
    shards = -(-int(data["raw"]["pictures"]) // int(data["raw"]["shard"]))
    workers = workers or len(os.sched_getaffinity(0))
    progress = Progress("raw pictures", shards, "shards")
    totals = dict.fromkeys(("sound", *KINDS), 0)
    died = "A process drawing the raw pictures died (out of memory?): run `djepa data` again."
    with atomic_folder(Path(out)) as folder:
        written = spread(partial(_writer, folder, data), range(shards), workers, died)
        for done, counts in enumerate(written, 1):
            totals = {kind: n + counts[kind] for kind, n in totals.items()}
            progress.at(done, f"{sum(totals.values())} pictures")
    tracker.log_metrics({f"raw/{kind}": float(n) for kind, n in totals.items()})


def _writer(folder: Path, data: Mapping[str, Any]) -> Callable[[int], dict[str, int]]:
    return lambda shard: write_raw_shard(folder, shard, data)
