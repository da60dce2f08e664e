"""How far raters agree beyond chance: Cohen's kappa for two, Fleiss' for more."""

from itertools import combinations
from typing import Any

import numpy as np

from components.rating.jobs import KINDS, verdict
from components.rating.store import Store


def cohen(a: list[str], b: list[str]) -> float | None:
    """Cohen's kappa of two raters' answers to the same items; None where it is not defined."""
    if len(set(a) | set(b)) < 2:
        return None  # no items, or all of one answer: chance alone explains everything
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(a, b))


def fleiss(counts: np.ndarray) -> float | None:
    """Fleiss' kappa of counts (items, categories): how many raters chose which.

    Items may have different numbers of raters, each two at least; with equal numbers this is
    Fleiss' formula (1971). None where it is not defined.
    """
    counts = np.asarray(counts, float)
    raters = counts.sum(axis=1)
    if not len(counts) or np.count_nonzero(counts.sum(axis=0)) < 2:
        return None
    agreeing = ((counts**2).sum(axis=1) - raters) / (raters * (raters - 1))
    chance = float(((counts.sum(axis=0) / counts.sum()) ** 2).sum())
    return (float(agreeing.mean()) - chance) / (1 - chance)


def agreement(store: Store, job: str) -> dict[str, Any]:
    """The agreement of a job's raters on its current items.

    Returns job, raters (name → items finished) and a row a question, and one for the verdict:
    items (that two raters at least have answered), same (the share of pairs of answers that are
    equal), method, kappa (None where it is not defined) and pairs (Cohen's for every two raters).
    """
    kind, found = store.jobs()[job], store.standing(job)
    finished: dict[str, int] = {}
    tables: dict[str, list[dict[str, str]]] = {name: [] for name in (*KINDS[kind].questions, "")}
    for _, _, raters in found:
        final = {r: v[0] for r, given in raters.items() if (v := verdict(kind, given))}
        for rater in final:
            finished[rater] = finished.get(rater, 0) + 1
        tables[""].append(final)
        for question in KINDS[kind].questions:
            tables[question].append({r: g[question] for r, g in raters.items() if question in g})
    rows = [
        {"question": question or "verdict", **_row(table, KINDS[kind].values)}
        for question, table in tables.items()
    ]
    return {"job": job, "kind": kind, "raters": finished, "questions": rows}


def _row(table: list[dict[str, str]], values: tuple[str, ...]) -> dict[str, Any]:
    """Agreement on one question: a dictionary rater → value an item."""
    shared = [given for given in table if len(given) > 1]
    raters = sorted({rater for given in shared for rater in given})
    pairs, equal = [], []
    for one, two in combinations(raters, 2):
        both = [(g[one], g[two]) for g in shared if one in g and two in g]
        kappa = cohen([x for x, _ in both], [y for _, y in both])
        pairs.append({"raters": [one, two], "items": len(both), "kappa": kappa})
        equal += [x == y for x, y in both]
    counts = np.array([[list(g.values()).count(v) for v in values] for g in shared])
    many = len(raters) > 2
    return {
        "items": len(shared),
        "same": float(np.mean(equal)) if equal else None,
        "method": "Fleiss" if many else "Cohen",
        "kappa": fleiss(counts) if many else (pairs[0]["kappa"] if pairs else None),
        "pairs": pairs,
    }


def text(found: dict[str, Any]) -> str:
    """An agreement as lines for a terminal."""
    raters = ", ".join(f"{name} {items}" for name, items in found["raters"].items())
    lines = [f"{found['job']}: items finished: {raters or 'none'}"]
    for row in found["questions"]:
        if not row["items"]:
            lines.append(f"  {row['question']:<10} no item that two raters have answered")
            continue
        kappa = "not defined (one answer only)" if row["kappa"] is None else f"{row['kappa']:.3f}"
        whose = "Fleiss'" if row["method"] == "Fleiss" else "Cohen's"
        lines.append(
            f"  {row['question']:<10} {whose} kappa {kappa}, {row['items']} items, "
            f"{100 * row['same']:.0f} % of answers equal"
        )
        if len(row["pairs"]) > 1:
            lines += [
                f"    {' and '.join(pair['raters'])}: "
                f"{'not defined' if pair['kappa'] is None else format(pair['kappa'], '.3f')} "
                f"on {pair['items']} items"
                for pair in row["pairs"]
            ]
    return "\n".join(lines)
