"""What is said of each sample: notions and style of its caption, and the source it came from.

These are the non-transformable attributes of statistical-analysis sampling (paper, section 3.1).
They lie on the disk as a sparse table (CSR): the ids of sample i's attributes are
`values[offsets[i]:offsets[i + 1]]`; ids count through the kinds in the order of KINDS.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from components.errors import UserError
from components.files import read_json, write_json

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("notion", "style", "source")
ROWS = 65_536  # samples gone through at a time
AGAIN = "run the stage curate again."


def write_attributes(folder: Path, curated: Path, manifest: "pd.DataFrame") -> None:
    """Write names.json, counts.npy, offsets.npy and values.npy to `folder`, which is made.

    manifest: n samples in the order of their ids, with `notion_words` and `source`. Notions are
    the words that curation kept (curated/notions.parquet); those of its kind `style` are styles.
    A sample may have none. UserError for a curated set without these tables.
    """
    names = _names(curated, manifest)
    id_of = {
        kind: dict(zip(words, range(start, start + len(words)), strict=True))
        for (kind, words), start in zip(names.items(), _starts(names), strict=True)
    }
    word_id, source_id = id_of["notion"] | id_of["style"], id_of["source"]
    total = sum(map(len, names.values()))
    folder.mkdir()
    offsets = np.lib.format.open_memmap(
        folder / "offsets.npy", "w+", dtype=np.int64, shape=(len(manifest) + 1,)
    )
    counts, parts = np.zeros(total, np.int64), []
    for start in range(0, len(manifest), ROWS):
        rows = manifest[["notion_words", "source"]].iloc[start : start + ROWS]
        found: list[int] = []
        lengths = []
        for words, source in rows.itertuples(index=False, name=None):
            # A notion counts once, however often the caption says it.
            mine = sorted({word_id[word] for word in words if word in word_id})
            if source in source_id:  # a sample may have no source
                mine.append(source_id[source])
            found += mine
            lengths.append(len(mine))
        values = np.array(found, np.uint16 if total <= 2**16 else np.int32)
        counts += np.bincount(values, minlength=total)
        parts.append(values)
        offsets[start + 1 : start + 1 + len(lengths)] = offsets[start] + np.cumsum(lengths)
    offsets.flush()
    np.save(folder / "values.npy", np.concatenate(parts))
    np.save(folder / "counts.npy", counts)
    write_json(folder / "names.json", names)


def _names(curated: Path, manifest: "pd.DataFrame") -> dict[str, list[str]]:
    import pandas as pd  # a second that reading KINDS need not cost

    try:
        table = pd.read_parquet(curated / "notions.parquet", columns=["notion", "kind"])
        sources = manifest["source"].dropna().astype(str)
        manifest["notion_words"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"The notions and sources of {curated} cannot be read ({error}); {AGAIN}"
        ) from error
    style = table["kind"] == "style"
    return {
        "notion": table["notion"][~style].tolist(),
        "style": table["notion"][style].tolist(),
        "source": sorted(sources.unique()),
    }


def _starts(names: Mapping[str, list[str]]) -> list[int]:
    """First attribute id of each kind."""
    return np.cumsum([0, *map(len, names.values())])[:-1].tolist()


class Attributes:
    """Reads what `write_attributes` wrote; memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.names: dict[str, list[str]] = read_json(folder / "names.json")
        if tuple(self.names) != KINDS:
            raise ValueError(f"names.json has not the kinds {', '.join(KINDS)}")
        self.counts: np.ndarray = np.load(folder / "counts.npy")
        self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self._values = np.load(folder / "values.npy", mmap_mode="r")

    def __call__(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Attribute ids of the samples `ids` (m,), end to end, and offsets (m + 1,) into them."""
        starts = self._offsets[ids]
        lengths = self._offsets[np.asarray(ids) + 1] - starts
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return self._values[places], offsets
