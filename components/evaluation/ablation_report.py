"""The ablation's table and plot, as Markdown, PNG and JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend must be chosen first
from matplotlib.figure import Figure

from components.evaluation.ablation import COMPARED, GROUPS, LINES, Result, summary
from components.evaluation.paper_tables import ablation_table
from components.evaluation.tables import Rows, markdown, write_tables
from components.files import atomic_file, write_json

PLACES = ((-12, 6), (5, -11), (5, 6), (5, -11))  # points from a line's points to their letters


def write_ablation(results: Sequence[Result], folder: Path, about: Mapping[str, Any]) -> str:
    """Write ablation.md, ablation.png, ablation.json and tables.* into `folder`; returns the page.

    about: what was run (scale, seeds, overrides, …), kept in the JSON and said in the text.
    """
    found = summary(results)
    write_json(folder / "ablation.json", {"about": dict(about), **found})
    with atomic_file(folder / "ablation.png") as temporary:
        figure = plot(found)
        figure.savefig(temporary, dpi=110, format="png")
        plt.close(figure)
    text = page(found, about)
    with atomic_file(folder / "ablation.md") as temporary:
        temporary.write_text(text)
    write_tables(ablation_table(found), [], folder)
    return text


def page(found: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The tables with what they mean."""
    told = ", ".join(f"{name} {value}" for name, value in about.items() if value)
    parts = [
        f"# Ablation of the data feedback ({told})",
        "Scores are GenEval's overall, mean ± standard error over seeds where there are two or "
        "more. SAS: statistical-analysis sampling; CMS: critic-model sampling. 'held-out': prompts "
        "whose combinations are in nothing that trains; 'all': those and seen ones. Chance: the "
        "same pictures under other prompts of the task.",
        markdown(group_rows(found)),
        "*The paper's figures are its own: 2.6 B parameters, a billion pairs, 100,000 steps of "
        "2048 a phase, its GenEval prompts; for H and I its win rate against Midjourney v6, where "
        "ours is over G's model, on the same prompts, by the embedded detector; people labelled "
        "for its I. They are beside ours to compare directions, not sizes.*",
    ]
    if found["effects"]:
        parts += [
            "Paired differences at the same images seen: by seed, mean ± standard error [95 % t "
            "interval].",
            markdown(effect_rows(found)),
        ]
    parts += [text for text in (_sizes(found),) if text]
    return "\n\n".join(parts) + "\n"


def group_rows(found: Mapping[str, Any]) -> Rows:
    """Head and one row a group, laid out as the paper's Table 4."""
    rows = [
        ["", "images", "feedback", "seeds", "held-out", "chance", "all", "win", "*paper*"],
    ]
    for name, row in found["groups"].items():
        last = GROUPS[name].phases
        images = row["images"] / last
        span = f"{_thousands(images * (last - 1))}–{_thousands(images * last)}"
        paper = f"*{row['paper']:.1%} win*" if name in COMPARED else f"*{row['paper']:.2f}*"
        rows.append(
            [
                name,
                span,
                row["feedback"],
                str(len(row["seeds"])),
                _pm(row["score"]),
                f"{row['chance']:.3f}",
                _pm(row["all"]),
                _pm(row.get("win_rate")),
                paper,
            ]
        )
    return rows


def effect_rows(found: Mapping[str, Any]) -> Rows:
    """Head and one row a pair of groups."""
    rows = [["", "what differs", "seeds", "held-out", "all", "seeds for 0.05", "*paper*"]]
    for effect in found["effects"]:
        needed, on_all = (effect[kind].get("seeds_needed") or "–" for kind in ("score", "all"))
        rows.append(
            [
                effect["pair"],
                effect["what"],
                str(len(effect["seeds"])),
                _interval(effect["score"]),
                _interval(effect["all"]),
                f"{needed} (all: {on_all})",
                f"*{effect['paper']:+.2f}*" if "paper" in effect else "–",
            ]
        )
    return rows


def _sizes(found: Mapping[str, Any]) -> str:
    said = []
    for kind, words in (("score", "held-out"), ("all", "all prompts")):
        size = found["sample_size"][kind]
        if size is None:
            continue
        said.append(
            f"- {words}: paired differences deviate by {size['deviation']:.3f} from seed to seed "
            f"({size['degrees_of_freedom']} degrees of freedom, the pairs as if independent), so "
            f"{size['seeds']} seeds a group ({size['seeds_low']} to {size['seeds_high']} at the "
            f"80 % limits of that deviation), each scored on {size['pictures_drawn']} pictures; to "
            f"tell one pair of trained models apart, {size['pictures']} pictures of as many more "
            f"prompts each."
        )
    head = "An effect of 0.05 would be visible (two-sided 5 %, power 80 %) with:"
    return "\n".join([head, "", *said]) if said else ""


def plot(found: Mapping[str, Any]) -> Figure:
    """Score against images seen: a line a path, errors over seeds (else over prompts), chance."""
    groups = found["groups"]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axes, kind, words in zip(
        panels, ("score", "all"), ("held-out prompts", "all prompts"), strict=True
    ):
        drawn: set[str] = set()
        for number, line in enumerate(LINES):
            names = [name for name in line if name in groups]
            if drawn.issuperset(names):  # a path of which only what it shares was run
                continue
            shift = (number - 1) * 0.004 * max(g["images"] for g in groups.values())
            x = [groups[name]["images"] + shift for name in names]
            y = [groups[name][kind]["mean"] for name in names]
            error = [_error(groups[name], kind) for name in names]
            label = f"{'–'.join(names)}: {groups[names[-1]]['feedback']}"
            axes.errorbar(x, y, yerr=error, marker="o", capsize=3, label=label)
            for name, a, b in zip(names, x, y, strict=True):
                if name not in drawn:
                    place = PLACES[number]
                    axes.annotate(name, (a, b), place, textcoords="offset points", fontsize=9)
            drawn.update(names)
        key = "chance" if kind == "score" else "all_chance"
        floor: dict[float, list[float]] = {}
        for group in sorted(groups.values(), key=lambda g: g["images"]):
            floor.setdefault(group["images"], []).append(group[key])
        means = [sum(values) / len(values) for values in floor.values()]
        axes.plot(list(floor), means, "k:", label="chance")
        axes.set_title(words, fontsize=10)
        axes.set_xlabel("images seen")
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("GenEval overall")
    panels[0].set_ylim(bottom=0)  # of both; before the last line is drawn it would cut that off
    panels[0].legend(frameon=False, fontsize=8)
    seeds = max(len(g["seeds"]) for g in groups.values())
    over = f"{seeds} seeds" if seeds > 1 else "prompts, one seed"
    figure.suptitle(f"Mean ± 1 standard error over {over}", fontsize=10)
    return figure


def _error(group: Mapping[str, Any], kind: str) -> float:
    over_seeds = group[kind]["stderr"]
    if over_seeds is not None:
        return over_seeds
    return group["stderr_prompts" if kind == "score" else "all_stderr_prompts"]


def _thousands(images: float) -> str:
    return f"{images / 1000:.0f}k" if images >= 10_000 else f"{images:.0f}"


def _pm(value: Mapping[str, float | None] | None) -> str:
    if value is None:
        return "–"
    spread = "" if value["stderr"] is None else f" ± {value['stderr']:.3f}"
    return f"{value['mean']:.3f}{spread}"


def _interval(value: Mapping[str, float | None]) -> str:
    if value["stderr"] is None:
        return f"{value['mean']:+.3f}"
    return (
        f"{value['mean']:+.3f} ± {value['stderr']:.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"
    )
