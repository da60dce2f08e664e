"""Win rates with bootstrap intervals, of a judge's verdicts or of raters' exported answers."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.errors import UserError
from components.evaluation.statistics import Spread, spreads

WORTH = {"B": 1, "same": 0, "A": -1}  # of a rater's answer, for model B
SHOWN = 5  # bad lines that are named


def win_rate(
    verdicts: Sequence[int],
    prompts: Sequence[str],
    tags: Sequence[str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """(better + 0.5 · same) / all, with its 95 % interval clustered by prompt, and by tag.

    Args:
        verdicts: 1 better, 0 the same, −1 worse, one a pair (or a pair and rater).
        prompts, tags: of each, in the same order; no tags where they are not known.
        settings: `params["evaluation"]`: `bootstrap` resamples and their `seed`.
    """
    points = [(v + 1) / 2 for v in verdicts]
    whole = _spread(points, prompts, settings)
    by_tag = {
        tag: [p for p, name in zip(points, tags, strict=True) if name == tag]
        for tag in dict.fromkeys(tags)
    }
    return {
        "win_rate": round(whole.mean, 4),
        "low": round(whole.low, 4),
        "high": round(whole.high, 4),
        "stderr": round(whole.stderr, 4),
        "better": verdicts.count(1),
        "same": verdicts.count(0),
        "worse": verdicts.count(-1),
        "n": len(verdicts),
        "tasks": {tag: round(sum(v) / len(v), 4) for tag, v in by_tag.items()},
    }


def sentence(outcome: Mapping[str, Any]) -> str:
    """A win rate for a terminal."""
    return (
        f"{outcome['model']} against {outcome['baseline']}: win rate {outcome['win_rate']:.3f} "
        f"[{outcome['low']:.3f}, {outcome['high']:.3f}], {outcome['better']} better, "
        f"{outcome['same']} same, {outcome['worse']} worse"
    )


def raters_win_rate(
    file: Path, settings: Mapping[str, Any], prompts: Path | None = None
) -> dict[str, Any]:
    """B's win rate against A from what `djepa rate export` wrote of pairs.

    Args:
        file: X.jsonl or X.csv; a line a pair and rater: prompt, a, b, rater, winner, ….
        settings: `params["evaluation"]`.
        prompts: JSON lines with `prompt` and `tag`; with it the win rate is also given by tag.

    Returns what `win_rate` does and judge, model, baseline, raters (answers of each), pairs, and
    `intervals`: low, high and n of each tag.

    Raises:
        UserError: the file cannot be read, a line is no verdict or stands twice, it holds several
            pairs of models, or a prompt has no tag.
    """
    rows = _rows(file)
    models = sorted({(row["a"], row["b"]) for row in rows})
    if len(models) > 1:
        named = "; ".join(f"{b} against {a}" for a, b in models)
        raise UserError(f"{file} holds several comparisons ({named}); export one job at a time.")
    verdicts = [WORTH[row["winner"]] for row in rows]
    asked = [row["prompt"] for row in rows]
    tags = _tags(prompts, asked) if prompts else []
    outcome = _by_tag(verdicts, asked, tags, settings)
    raters = sorted({row["rater"] for row in rows})
    return outcome | {
        "judge": f"{len(raters)} raters",
        "model": models[0][1],
        "baseline": models[0][0],
        "raters": {name: sum(row["rater"] == name for row in rows) for name in raters},
        "pairs": len({_item(row) for row in rows}),
    }


def _by_tag(
    verdicts: list[int], prompts: list[str], tags: list[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """As `win_rate`, with an interval of each tag."""
    intervals = {}
    for tag in dict.fromkeys(tags):
        rows = [i for i, name in enumerate(tags) if name == tag]
        points = [(verdicts[i] + 1) / 2 for i in rows]
        spread = _spread(points, [prompts[i] for i in rows], settings)
        intervals[tag] = spread.interval() | {"n": len(rows)}
    named = tags or ["all"] * len(verdicts)
    outcome = win_rate(verdicts, prompts, named, settings)
    return outcome | {"tasks": outcome["tasks"] if tags else {}, "intervals": intervals}


def _spread(points: Sequence[float], prompts: Sequence[str], settings: Mapping[str, Any]) -> Spread:
    # All pairs count alike, so to the bootstrap they are one task.
    (whole,) = spreads(
        [points],
        ["all"] * len(points),
        prompts,
        int(settings["bootstrap"]),
        int(settings["seed"]),
    )
    return whole


def _item(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(row["prompt_index"]), str(row["sample"]), row["prompt"]


def _rows(file: Path) -> list[dict[str, Any]]:
    """The lines of an export of pairs, checked."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); give an export of pairs.") from None
    numbered: list[tuple[int, Any]]
    if file.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        numbered = [(reader.line_num, row) for row in reader]
    elif file.suffix == ".jsonl":
        numbered = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        raise UserError(f"{file}: give an export whose name ends in .jsonl or .csv.")
    good, bad = [], []
    seen: dict[tuple[Any, ...], int] = {}
    for number, line in numbered:
        try:
            row = line if isinstance(line, dict) else json.loads(line)
            _check(row)
            key = (*_item(row), row["a"], row["b"], row["rater"])
            if key in seen:
                raise ValueError(f"{row['rater']} has judged this pair in line {seen[key]} too")
        except (ValueError, KeyError, TypeError) as error:
            bad.append(f"line {number}: {error!r}")
            continue
        seen[key] = number
        good.append(row)
    if bad:
        more = ", …" if len(bad) > SHOWN else ""
        raise UserError(
            f"{file}: {len(bad)} lines are no verdicts on pairs ({'; '.join(bad[:SHOWN])}{more}); "
            "write it with `djepa rate export` of a pairs job, without --answers."
        )
    if not good:
        raise UserError(f"{file} holds no verdict; rate some pairs and export them first.")
    return good


def _check(row: Any) -> None:
    """Raise KeyError, TypeError or ValueError where a row is no verdict on a pair."""
    for name in ("prompt_index", "sample", "prompt", "a", "b", "rater", "winner"):
        if not isinstance(row[name], (str, int) if name == "prompt_index" else str):
            raise TypeError(f"{name} is no text")
    if row["winner"] not in WORTH:
        raise ValueError(f"winner {row['winner']!r}; it is A, B or same")


def _tags(file: Path, prompts: Sequence[str]) -> list[str]:
    """The tag of each prompt, from JSON lines with `prompt` and `tag`."""
    known: dict[str, str] = {}
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.strip():
                metadata = json.loads(line)
                known[metadata["prompt"]] = str(metadata["tag"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} cannot be read as JSON lines with prompt and tag ({error!r}); "
            "`djepa prompts geneval` writes such a file."
        ) from None
    absent = sorted(set(prompts) - set(known))
    if absent:
        raise UserError(f"{file} has no line for {len(absent)} prompts (e.g. {absent[0]!r}).")
    return [known[prompt] for prompt in prompts]
