"""What only all shards together can tell: repeated pictures, and the share of synthetic ones."""

from collections.abc import Iterable, Iterator, Mapping
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from components.curation.detectors import uniform
from components.curation.duplicates import HASH_BYTES, THUMB_BYTES, near_duplicates
from components.curation.passes import DAMAGED, Job, verdict

Place = tuple[str, str]  # shard stem, key
Verdicts = dict[Place, dict[str, Any]]


def rows_in(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table that no filter has rejected."""
    names = [*dict.fromkeys([*columns, "filter"])]
    for row in pq.read_table(path, columns=names).to_pylist():
        if row["filter"] is None:
            yield row


def find_duplicates(shards: Iterable[Path], job: Job) -> tuple[Verdicts, dict[str, list[str]]]:
    """Compare all pictures that passed the scan; the first in shard order is the one that stays.

    Returns the verdicts on the others and, a shard, the keys still in. Memory: 32 bytes of
    hash and 192 of thumbnail a picture.
    """
    rules = job.curation["duplicates"]
    verdicts: Verdicts = {}
    places: list[Place] = []
    keys: set[str] = set()
    shas: dict[bytes, int] = {}
    hashes, thumbs = bytearray(), bytearray()
    stems = []
    for shard in shards:
        stems.append(shard.stem)
        columns = ["key", "sha256", "phash", "thumb"]
        for row in rows_in(job.path(shard, "scan.parquet"), columns):
            place, sha = (shard.stem, row["key"]), bytes.fromhex(row["sha256"])
            if row["key"] in keys:
                why = f"key {row['key']} is in an earlier shard"
                verdicts[place] = verdict(DAMAGED, None, None, why)
            elif sha in shas:
                verdicts[place] = verdict(
                    "exact_duplicate", 0.0, 0.0, f"same bytes as {places[shas[sha]][1]}"
                )
            else:
                shas[sha] = len(places)
                places.append(place)
                hashes += row["phash"]
                thumbs += row["thumb"]
            keys.add(row["key"])
    near = near_duplicates(
        np.frombuffer(bytes(hashes), np.uint8).reshape(-1, HASH_BYTES),
        np.frombuffer(bytes(thumbs), np.uint8).reshape(-1, THUMB_BYTES),
        rules["distance"],
        rules["colour"],
    )
    for index, (first, bits) in near.items():
        why = f"{bits} bits of 256 from {places[first][1]}"
        verdicts[places[index]] = verdict(
            "near_duplicate", float(bits), float(rules["distance"]), why
        )
    kept: dict[str, list[str]] = {stem: [] for stem in stems}
    for stem, key in places:
        if (stem, key) not in verdicts:
            kept[stem].append(key)
    return verdicts, kept


def cap_synthetic(real: int, synthetic: Mapping[Place, float], share: float) -> set[Place]:
    """Return the synthetic pictures to drop so that at most `share` of what stays is synthetic.

    real: number of pictures that are not synthetic; synthetic: {place: random number}, the
    lowest numbers stay. As many stay as the share allows.
    """
    if share >= 1:
        return set()
    room = floor(share * real / (1 - share) + 1e-9)
    order = sorted(synthetic, key=lambda place: (synthetic[place], place))
    return set(order[room:])


def drop_synthetic(shards: Iterable[Path], job: Job, kept: Mapping[str, list[str]]) -> Verdicts:
    """Apply the cap on synthetic pictures to the keys still in."""
    share, seed = job.curation["synthetic"]["share"], int(job.curation["seed"])
    real, synthetic = 0, {}
    for shard in shards:
        inside = set(kept[shard.stem])
        for row in rows_in(job.path(shard, "scan.parquet"), ["key", "synthetic"]):
            if row["key"] not in inside:
                continue
            if row["synthetic"]:
                synthetic[shard.stem, row["key"]] = uniform(seed, "synthetic", row["key"])
            else:
                real += 1
    found = len(synthetic) / max(real + len(synthetic), 1)
    why = f"synthetic, of which {found:.3f} came and {share:g} may stay"
    return {
        place: verdict("synthetic", found, float(share), why)
        for place in cap_synthetic(real, synthetic, share)
    }
