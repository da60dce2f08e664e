"""The critic's training set: retrieved by text, labelled by image similarity (paper, 3.2, Fig. 5).

Plain numpy on vectors that others make: text vectors of prompts and
captions, image vectors of reference and training pictures.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from components.errors import UserError


def unit(vectors: ArrayLike, centre: np.ndarray | None = None) -> np.ndarray:
    """Vectors (m, d) less `centre` (d,), scaled to length 1; zero vectors stay zero."""
    x = np.asarray(vectors, np.float32)
    if centre is not None:
        x = x - centre
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def retrieve(prompts: np.ndarray, captions: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    """Indices and cosine similarities (P, count) of the captions nearest to each prompt.

    prompts (P, d) and captions (n, d) are text vectors; `count` is cut to n. Nearest first, of
    equals the earlier.
    """
    count, among = min(count, len(captions)), unit(captions)
    index = np.empty((len(prompts), count), np.int64)
    similarity = np.empty((len(prompts), count), np.float32)
    for row, prompt in enumerate(unit(prompts)):
        # To six digits: the same caption must tie with itself, whatever the order of summing.
        near = np.round(among @ prompt, 6)
        index[row] = np.argsort(-near, kind="stable")[:count]
        similarity[row] = near[index[row]]
    return index, similarity


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
    row a retrieved picture: similarity, label (bool), close (similarity >= threshold; the
    others are to be dropped).
    """
    similarity = features @ reference_features.T
    similarity = np.where(prompt[:, None] == reference_prompt[None, :], similarity, -np.inf)
    nearest = similarity.argmax(axis=1)
    best = similarity[np.arange(len(features)), nearest]
    return pd.DataFrame(
        {"similarity": best, "label": reference_label[nearest], "close": best >= threshold}
    )


def read_human_labels(path: Path, references: pd.DataFrame) -> pd.DataFrame:
    """The references that a person labelled, with `label` replaced by theirs.

    `path` has JSON lines {"file", "label"}, the file as in references.parquet, label true or
    false; a later line replaces an earlier one. UserError for a missing file, bad lines or
    files that are no reference pictures, each listed.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing, and this round's labels are human; rate the pictures with "
            "`djepa rate labels`, or set labels: auto for the round in params/feedback."
        )
    known, labels, bad = set(references["file"]), {}, []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            file, label = entry["file"], entry["label"]
        except (ValueError, KeyError, TypeError):
            bad.append(f"line {number}")
            continue
        if file not in known or label not in (True, False, 0, 1):
            bad.append(f"line {number} ({file!r}: {label!r})")
        else:
            labels[file] = bool(label)
    if bad or not labels:
        raise UserError(
            f"{path}: {len(bad)} lines are no label of a reference picture "
            f"({', '.join(bad[:5]) or 'the file is empty'}); each line must be "
            '{"file": a file of references.parquet, "label": true or false}.'
        )
    rated = references[references["file"].isin(labels)].copy()
    rated["label"] = [labels[file] for file in rated["file"]]
    return rated
