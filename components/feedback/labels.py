"""Who says whether a reference picture is good: the benchmark's rule, people, or one simulated.

A round's `labels` (feedback.rounds): `auto`, `simulated`, or NAME for people's in
labels/NAME.jsonl, which is the export of the raters' page.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from components.errors import UserError
from components.rating.jobs import label_item

LINE = 10_000  # bytes of a line at most; one of the export has a hundred
SHOWN = 5  # bad lines that are named


@dataclass(frozen=True)
class Labelled:
    """The references that somebody labelled, and how to speak of it."""

    table: pd.DataFrame  # rows of references.parquet, `label` said by `by`
    by: str  # auto | simulated | human
    facts: dict[str, Any]  # for the critic's report

    @property
    def threshold(self) -> str:
        """Which of feedback.similarity holds: a simulated rater's count as people's."""
        return "auto" if self.by == "auto" else "human"


def label(
    references: Path, labels: str, file: Path, rater: Mapping[str, float], seed: int
) -> Labelled:
    """The reference set with the labels of a round whose line says `labels`.

    Args:
        references: what the stage references wrote.
        labels: auto, simulated or the name of people's labels.
        file: labels/NAME.jsonl, read for people's labels alone.
        rater: feedback.simulated_rater.
        seed: of the simulated rater's errors.

    Raises:
        UserError: as `read_labels`.
    """
    table = pd.read_parquet(references / "references.parquet")
    if labels == "auto":
        return Labelled(table, "auto", {})
    if labels == "simulated":
        said = simulated(table, float(rater["realism"]), float(rater["noise"]), seed)
        return Labelled(table.assign(label=said), "simulated", {"simulated_rater": dict(rater)})
    why = fallback(file)
    if why is not None:
        return Labelled(table, "auto", {"fallback": why})
    rated, disagree, tied = read_labels(file, table, references)
    facts = {"labels_disagree": disagree, "labels_tied": tied, "not_rated": len(table) - len(rated)}
    facts["not_rated"] -= tied
    return Labelled(rated, "human", facts)


def simulated(table: pd.DataFrame, realism: float, noise: float, seed: int) -> np.ndarray:
    """Labels (m,) bool of a rater that there is not, for the ablation of labels by people.

    Good where the automatic label is and the drawn things look at least `realism` like ideal
    ones; with probability `noise` the opposite, drawn for each picture by its seed.
    """
    good = table["label"].to_numpy(bool) & (table["realism"].to_numpy(float) >= realism)
    coins = [np.random.default_rng([seed, int(own)]).random() for own in table["seed"]]
    return good ^ (np.array(coins) < noise)


def commands(file: Path, references: Path | str) -> str:
    """The two commands that start the raters' page and write its labels to `file`."""
    folder = Path(references)
    return (
        f"`djepa rate labels {folder}` starts the page, `djepa rate export "
        f"{folder.parent}/ratings.sqlite --job labels/{folder.name} --out {file}` writes what "
        "people said"
    )


def fallback(file: Path) -> str | None:
    """Why people's labels were given up for automatic ones, where the file says so, else None."""
    if not file.is_file() or file.stat().st_size > LINE:
        return None
    try:
        entry = json.loads(file.read_bytes())
    except (ValueError, RecursionError):  # several lines of labels, or nothing that can be read
        return None
    if isinstance(entry, dict) and entry.get("fallback") == "auto":
        return str(entry.get("why", "no reason given"))
    return None


def read_labels(file: Path, table: pd.DataFrame, references: Path) -> tuple[pd.DataFrame, int, int]:
    """The rows of references.parquet that people labelled, with `label` replaced by theirs.

    `file` has JSON lines {"file", "label", "item"}: the file as in the table; label true or false;
    item, where it is there, the picture's hash by the raters' page, so that labels of another
    round's pictures are not taken for this one's. Of several lines on one picture the majority
    counts; a picture of a tie is left out.

    Returns:
        the rows, on how many pictures the lines disagree, how many are left out for a tie.

    Raises:
        UserError: the file is missing or empty; lines that are none, each named by its number;
            nothing but ties.
    """
    if not file.is_file():
        raise _none_yet(file, "is missing", references)
    known, bad = set(table["file"]), []
    votes: dict[str, list[bool]] = {}
    items: dict[str, str] = {}
    with file.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LINE + 1), b""), 1):
            if len(line) > LINE:
                bad.append(f"line {number}: longer than {LINE} bytes")
                break  # what follows is the rest of it
            if not line.strip():
                continue
            try:
                entry = json.loads(line.decode())
                name, said, item = entry["file"], entry["label"], entry.get("item")
            except UnicodeDecodeError:
                bad.append(f"line {number}: not UTF-8")
                continue
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                bad.append(f"line {number}: cut off, or no label")
                continue
            if not isinstance(name, str) or name not in known:
                bad.append(f"line {number}: no picture {str(name)[:80]!r}")
            elif not isinstance(said, bool):
                bad.append(f"line {number}: label {str(said)[:80]!r}")
            else:
                if name not in items and item is not None:
                    items[name] = label_item(name, references / name)
                if item is not None and item != items[name]:
                    bad.append(f"line {number}: another picture than {name} is now")
                votes.setdefault(name, []).append(said)
    if not bad and not votes:
        raise _none_yet(file, "has no label yet", references)
    if bad:
        more = ", …" if len(bad) > SHOWN else ""
        raise UserError(
            f"{file}: {len(bad)} lines are no label of a picture of {references} "
            f"({'; '.join(bad[:SHOWN])}{more}); each line must be "
            '{"file": a file of references.parquet, "label": true or false}. '
            f"Export them anew: {commands(file, references)}."
        )
    shares = {name: sum(said) / len(said) for name, said in votes.items()}
    decided = {name: share > 0.5 for name, share in shares.items() if share != 0.5}
    if not decided:
        raise UserError(
            f"{file}: no picture has a label that most raters gave, on {len(votes)} they tie; let "
            f"one more rate: {commands(file, references)}."
        )
    rated = table[table["file"].isin(decided)].copy()
    rated["label"] = [decided[name] for name in rated["file"]]
    disagree = sum(0 < share < 1 for share in shares.values())
    return rated, disagree, len(shares) - len(decided)


def _none_yet(file: Path, state: str, references: Path) -> UserError:
    return UserError(
        f"{file} {state}, and this round's labels are people's: {commands(file, references)}. "
        "Or set the round's labels to auto in params/feedback."
    )
