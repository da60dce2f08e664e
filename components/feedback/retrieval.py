"""The critic's training set: retrieved by text, labelled by image similarity (paper, 3.2, Fig. 5).

Retrieval is faiss's; the rest is numpy on vectors that others make: text vectors of prompts and
captions, image vectors of reference and training pictures.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from components.errors import UserError
from components.progress import Progress

BATCH = 1024  # captions whose vectors are made at once
TRAINED_ON = 65536  # captions that a compressed index learns its cells from, at most

Vectors = Callable[[np.ndarray], np.ndarray]  # places (m,) → vectors (m, d)


def unit(vectors: ArrayLike, centre: np.ndarray | None = None) -> np.ndarray:
    """Vectors (m, d) less `centre` (d,), scaled to length 1; zero vectors stay zero."""
    x = np.asarray(vectors, np.float32)
    if centre is not None:
        x = x - centre
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def retrieve(
    prompts: np.ndarray,
    captions: Sequence[str],
    vectors: Vectors,
    count: int,
    factory: str = "Flat",
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `count` samples whose captions are nearest to each prompt, by the cosine.

    Args:
        prompts: text vectors (P, d).
        captions: of the n samples that are searched; each distinct one is indexed once and
            stands for all that have it.
        vectors: text vectors of samples by their places in `captions`, asked for in batches.
        count: samples a prompt; cut to n.
        factory: faiss's name of the index (feedback.references.index).
        seed: which captions a compressed index learns its cells from.

    Returns:
        prompt, sample and cosine, each (m,), prompt by prompt and nearest first; of equals the
        earlier sample. An index in cells may find fewer than `count`.

    Raises:
        UserError: faiss knows no such index, or has too few captions for it.
    """
    codes, _ = pd.factorize(np.asarray(captions, object))
    order = np.argsort(codes, kind="stable")  # the samples, caption by caption
    starts = np.searchsorted(codes[order], np.arange(codes.max(initial=-1) + 2))
    first = order[starts[:-1]]  # the earliest sample of each caption
    index = _index(first, vectors, factory, seed)
    # A few more than can be needed, so that of equal captions the earlier come first.
    found, places = index.search(unit(prompts), min(2 * count, len(first)))
    rows: list[np.ndarray] = []
    near: list[np.ndarray] = []
    for cosines, nearest in zip(found, places, strict=True):
        there = nearest >= 0
        # To six digits: captions of the same words must tie, whatever the order of summing.
        cosines, nearest = np.round(cosines[there], 6), nearest[there]
        ranked = np.lexsort((first[nearest], -cosines))
        samples = [order[starts[c] : starts[c + 1]][:count] for c in nearest[ranked]]
        row = np.concatenate([*samples, np.zeros(0, np.int64)])[:count]
        rows.append(row)
        near.append(np.repeat(cosines[ranked], [len(s) for s in samples])[:count])
    prompt = np.repeat(np.arange(len(prompts)), [len(row) for row in rows])
    return prompt, np.concatenate(rows), np.concatenate(near).astype(np.float32)


def _index(first: np.ndarray, vectors: Vectors, factory: str, seed: int) -> Any:
    """A faiss index of the vectors of the samples `first`, filled batch by batch."""
    import faiss  # only the references stage pays for it

    # Beside other work its threads wait for one another as torch's do; the sums stay the same.
    faiss.omp_set_num_threads(1)
    width = vectors(first[:1]).shape[1]
    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            some = np.random.default_rng(seed).permutation(len(first))[:TRAINED_ON]
            index.train(_in_batches(first[np.sort(some)], vectors))
    except RuntimeError as problem:
        reason = str(problem).rpartition(": ")[2].strip()
        raise UserError(
            f"feedback.references.index is {factory!r}, of which faiss makes no index of "
            f"{len(first)} captions ({reason}); set it to Flat, or for large sets to one with "
            "fewer cells than captions such as IVF1024,PQ32, in params/feedback."
        ) from problem
    cells = faiss.try_extract_index_ivf(index)
    if cells is not None:
        cells.nprobe = -(-cells.nlist // 16)  # faiss's own default is one cell
    progress = Progress("index captions", len(first), "captions")
    for start in range(0, len(first), BATCH):
        index.add(unit(vectors(first[start : start + BATCH])))
        progress.at(min(start + BATCH, len(first)))
    return index


def _in_batches(places: np.ndarray, vectors: Vectors) -> np.ndarray:
    parts = [unit(vectors(places[i : i + BATCH])) for i in range(0, len(places), BATCH)]
    return np.concatenate(parts)


def searched(rows: Sequence[np.ndarray], samples: int, most: int, seed: int) -> np.ndarray:
    """Ids (m,) ascending of the samples whose captions are searched, `most` of them at most.

    `rows` are the ids (ascending) that reach each rung: only those are ever trained on. Of a set
    of more than `most` samples a random choice; nothing of the set's size is made for it.
    """
    if samples <= most:
        return np.unique(np.concatenate(list(rows)))
    rng = np.random.default_rng(seed)
    chosen = np.zeros(0, np.int64)
    # Drawn again while some reach no rung or were there; 16 times is plenty unless few reach one.
    for _ in range(16):
        drawn = np.unique(rng.integers(samples, size=2 * most))
        chosen = np.union1d(chosen, np.concatenate([_members(of, drawn) for of in rows]))
        if len(chosen) >= most:
            return np.sort(rng.permutation(chosen)[:most])
    return chosen


def _members(among: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Those of `ids` that are in `among` (ascending, may be memory-mapped)."""
    if not len(among):
        return ids[:0]
    place = np.searchsorted(among, ids).clip(max=len(among) - 1)
    return ids[among[place] == ids]


def inherit(
    features: np.ndarray,
    prompt: np.ndarray,
    reference_features: np.ndarray,
    reference_prompt: np.ndarray,
    reference_label: np.ndarray,
    threshold: float,
) -> pd.DataFrame:
    """Label each retrieved picture like the nearest reference picture of its prompt.

    features (m, d) and prompt (m,) of the retrieved pictures, reference_features (r, d),
    reference_prompt (r,), reference_label (r,) bool; features have length 1. Returns one
    row a retrieved picture: similarity, reference (its row), label (bool), close (similarity >=
    threshold; the others are to be dropped).
    """
    similarity = features @ reference_features.T
    similarity = np.where(prompt[:, None] == reference_prompt[None, :], similarity, -np.inf)
    nearest = similarity.argmax(axis=1)
    best = similarity[np.arange(len(features)), nearest]
    return pd.DataFrame(
        {
            "similarity": best,
            "reference": nearest,
            "label": reference_label[nearest],
            "close": best >= threshold,
        }
    )


def labelled_pictures(
    references: Path, table: pd.DataFrame, threshold: float
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Training pictures with inherited labels: key, label, similarity, reference; and counts.

    `table` has the rows of references.parquet that are labelled. A picture that several prompts
    retrieved takes the label it is most similar to; those less similar than `threshold` are
    dropped.
    """
    from safetensors.numpy import load_file

    retrieved = pd.read_parquet(references / "retrieved.parquet")
    vectors = load_file(references / "features.safetensors")
    retrieved = retrieved[retrieved["prompt_index"].isin(set(table["prompt_index"]))]
    # Pooled features share most of their length: centred, cosines tell pictures apart.
    centre = vectors["retrieved"].astype(np.float32).mean(axis=0)
    found = inherit(
        unit(vectors["retrieved"], centre)[retrieved["row"].to_numpy(int)],
        retrieved["prompt_index"].to_numpy(int),
        unit(vectors["references"], centre)[table["row"].to_numpy(int)],
        table["prompt_index"].to_numpy(int),
        table["label"].to_numpy(bool),
        threshold,
    )
    found["key"] = retrieved["key"].to_numpy(str)
    close = found[found["close"]].sort_values("similarity", ascending=False, kind="stable")
    kept = close.drop_duplicates("key").sort_values("key", ignore_index=True)
    counts = {
        "references": len(table),
        "references_positive": int(table["label"].sum()),
        "retrieved": int(found["key"].nunique()),
        "not_close": int(found["key"].nunique() - len(kept)),
    }
    return kept[["key", "label", "similarity", "reference"]], counts


def folds(
    labels: np.ndarray, reference: np.ndarray, count: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The labelled pictures (m,) in `count` parts, each as (places to learn from, places held out).

    `reference` (m,) is whose label a picture has. All with one reference's label are in one part:
    else a critic that learns what a reference looks like would seem to know a label that is
    nothing but chance. The classes are spread evenly.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # a second that few stages need

    parts = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    return list(parts.split(labels, labels, reference))
