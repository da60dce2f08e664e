"""The paper's Tables 1, 2 and 4 with a run's own rows under the published ones.

Published rows: published.yaml. A score on an embedded world is no official one: such rows stand in
a section of their own, are marked † and have a footnote that says so.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from components.evaluation.ablation import GROUPS
from components.evaluation.tables import Rows, Section, Table
from components.scenes.tasks import TASKS

PROMPTS = 553  # of the official GenEval
SKILLS = {
    "basic": (
        *(("attribute", "Attribute"), ("scene", "Scene"), ("spatial relation", "Spatial")),
        *(("action relation", "Action"), ("part relation", "Part"), ("basic", "Avg")),
    ),
    "advanced": (
        *(("counting", "Count"), ("differentiation", "Differ"), ("comparison", "Compare")),
        *(("negation", "Negate"), ("universal", "Universal"), ("advanced", "Avg")),
    ),
}
CATEGORIES = ("color", "shape", "texture")
TASK_COLUMNS = ("Single Obj.", "Two Obj.", "Counting", "Colors", "Position", "Color Attr.")
NONE = "–"
MARK = {True: "✓", False: "×", None: NONE}
# What is to be run where a table has no row of ours.
WAYS = {
    "table-1": "Table 1 (GenAI-Bench): `djepa score genai`",
    "table-2": "Table 2 (GenEval, T2I-CompBench++): `djepa stage evaluate@NAME`",
    "table-4": "Table 4 (data feedback): `python -m flows.ablation`",
}


@cache
def published() -> dict[str, Any]:
    """What papers give, with their sources."""
    loaded: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
    return loaded


def paper_tables(
    found: Mapping[str, Any],
    names: Sequence[str],
    params: Mapping[str, Any],
    ablation: Mapping[str, Any] | None,
) -> list[Table]:
    """The tables that have a row of ours; one without would only repeat the paper.

    Args:
        found: metrics by path (see report.read_metrics): evaluate/NAME, compbench/NAME,
            genai/NAME.
        names: the models in the report's order; others that were scored follow.
        params: `seed` is read.
        ablation: reports/ablation/ablation.json, or None.
    """
    scored = [key.partition("/") for key in found]
    extra = sorted({name for kind, _, name in scored if kind in ("compbench", "genai")})
    order = [*names, *[name for name in extra if name not in names]]
    tables = genai_tables(found, order)
    tables += geneval_table(found, order, params)
    return tables + (ablation_table(ablation) if ablation and ablation["groups"] else [])


def left_out(tables: Sequence[Table]) -> list[str]:
    """What would fill the tables that are not there."""
    there = {table.key.removesuffix("-advanced") for table in tables}
    return [way for key, way in WAYS.items() if key not in there]


def genai_tables(found: Mapping[str, Any], names: Sequence[str]) -> list[Table]:
    """Table 1, in its two halves; empty without scores of ours."""
    ours = {name: found[f"genai/{name}"] for name in names if f"genai/{name}" in found}
    tables = []
    for half, skills in SKILLS.items():
        rows = [
            [name, *[_spread(values["skills"].get(skill)) for skill, _ in skills],
             _count(values["skills"].get(half)), "1"]
            for name, values in ours.items()
        ]  # fmt: skip
        if not rows:
            continue
        by = sorted({f"{name}: {values['scored_by']}" for name, values in ours.items()})
        given = published()["genai"][half].items()
        theirs = [[name, *[_figure(v) for v in row], "", ""] for name, row in given]
        tables.append(
            Table(
                1,
                "table-1" if half == "basic" else "table-1-advanced",
                f"VQAScores on '{half}' prompts of GenAI-Bench",
                [("", 1), (half, len(skills)), ("", 2)],
                ["Method", *[head for _, head in skills], "n", "seeds"],
                [_theirs("genai", theirs), Section("This run", rows, ours=True)],
                [
                    "Ours: mean ± standard error over prompts; n: pictures of the half. Avg is the "
                    f"official tag '{half}', not the mean of the columns. Chance floor: none is "
                    f"defined for VQAScore. Scored by {'; '.join(by)}."
                ],
            )
        )
    return tables


def geneval_table(
    found: Mapping[str, Any], names: Sequence[str], params: Mapping[str, Any]
) -> list[Table]:
    """Table 2; empty without scores of ours."""
    official: Rows = []
    world: Rows = []
    notes = []
    for name in names:
        evaluated = found.get(f"evaluate/{name}", {})
        size, geneval = _parameters(evaluated), evaluated.get("geneval")
        categories = found.get(f"compbench/{name}", {}).get("categories", {})
        compbench = [_spread(categories.get(c), 4) for c in CATEGORIES]
        if geneval and is_official(geneval):
            official.append(
                [name, "✓", size, *_scores(geneval), *compbench, str(geneval["n"]), "1"]
            )
            official.append(_chance(name, geneval))
            notes.append(f"{name}: GenEval's prompts, scored by {_scorer(geneval)}.")
        elif categories:
            blank = [NONE] * (1 + len(TASKS))
            official.append([name, "✓", size, *blank, *compbench, "", "1"])
        if categories:
            sizes = [f"{c} {categories[c]['n']} pictures" for c in CATEGORIES if c in categories]
            by = sorted({str(categories[c].get("scored_by")) for c in categories})
            notes.append(f"{name}, T2I-CompBench++: {', '.join(sizes)}; by {', '.join(by)}.")
        if geneval and not is_official(geneval):
            splits = [(s.replace("_", "-"), geneval[s]) for s in ("held_out", "seen")
                      if s in geneval] or [("all", geneval)]  # fmt: skip
            for split, part in splits:
                row = [f"{name} †, {split}", "✓", size, *_scores(part), *[NONE] * 3]
                world.append([*row, str(part["n"]), "1"])
            world.append(_chance(f"{name} †", geneval))
    if not official and not world:
        return []
    sections = [_theirs("geneval", _published_geneval())]
    if official:
        sections.append(Section("This run, on the benchmarks' own prompts", official, ours=True))
    if world:
        title = "† This run on the embedded world: NOT GenEval, not to be compared with the above"
        sections.append(Section(title, world, ours=True))
        notes.insert(
            0,
            "† Simple shapes on the prompts of this run's own embedded world, found by its own "
            "detector: GenEval's templates and rules, not its 553 prompts, objects or detector. "
            "The scale is another; these rows compare with one another only. held-out: "
            "combinations that are in nothing that trains.",
        )
    return [
        Table(
            2,
            "table-2",
            "GenEval and T2I-CompBench++",
            [("", 3), ("GenEval", 1 + len(TASKS)), ("T2I-CompBench++", 3), ("", 2)],
            ["Model", "NTP", "#Params", "Overall", *TASK_COLUMNS, "Color", "Shape", "Texture",
             "n", "seeds"],
            sections,
            [
                "NTP: next-token prediction. Ours: overall (mean of the tasks) and T2I-CompBench++ "
                "± standard error over prompts; n: GenEval's pictures; seeds: of training "
                f"(here seed {params['seed']}); chance: the same pictures under other prompts of "
                "their task; #Params: of the network that draws.",
                *notes,
            ],
        )
    ]  # fmt: skip


def is_official(geneval: Mapping[str, Any]) -> bool:
    """Whether a GenEval result is on the 553 official prompts, as far as it tells."""
    world = "seen" in geneval or "held_out" in geneval
    embedded = geneval.get("scored_by", {}).get("detector") == "embedded"
    return not world and not embedded and geneval.get("prompts") == PROMPTS


def ablation_table(ablation: Mapping[str, Any]) -> list[Table]:
    """Table 4, from what flows/ablation.py found."""
    rows = []
    for name, group in ablation["groups"].items():
        runs = [run for run in ablation["results"] if run["group"] == name]
        feedback = group["feedback"]
        phases = GROUPS[name].phases
        last = group["images"] / 1000
        rows.append(
            [
                f"{name} †",
                f"{last * (phases - 1) / phases:.0f}–{last:.0f}k images",
                *[
                    "w/" if part in feedback else "w/o"
                    for part in ("SAS", "CMS (auto)", "CMS (simulated rater)")
                ],
                _mean(group["score"]),
                _mean(group.get("win_rate"), 100),
                f"{group['chance']:.3f}",
                str(sum(run["pictures"] for run in runs)),
                str(len(group["seeds"])),
            ]
        )
        rows[-1][4] += " ‡" * (rows[-1][4] == "w/")
    theirs = [
        [name, steps, *["w/" if each else "w/o" for each in used], _figure(score), _figure(win, 1),
         "", "", ""]
        for name, steps, *used, score, win in published()["ablation"]["rows"]
    ]  # fmt: skip
    title = "† This project's groups on the embedded world: NOT GenEval; compare directions only"
    notes = [
        "† Ours: held-out prompts of the embedded world, mean ± standard error over seeds; a win "
        "rate is over our G's model by the embedded detector, not over Midjourney v6. n: pictures, "
        "of all seeds together; chance: the same pictures under other prompts of their task."
    ]
    if "I" in ablation["groups"]:
        notes.append("‡ A simulated rater in people's stead.")
    return [
        Table(
            4,
            "table-4",
            "ablation of the data feedback",
            [("", 10)],
            ["Group", "Steps (k)", "SAS", "CMS (Auto)", "CMS (Human)", "GenEval Overall",
             "Win Rate (%)", "chance", "n", "seeds"],
            [_theirs("ablation", theirs), Section(title, rows, ours=True)],
            ["SAS: statistical-analysis sampling; CMS: critic-model sampling.", *notes],
        )
    ]  # fmt: skip


def _theirs(name: str, rows: Rows) -> Section:
    source = f"Published ({published()['paper']}, {published()[name]['source']})"
    return Section(source, rows, ours=False)


def _published_geneval() -> Rows:
    return [
        [name, MARK[ntp], size or NONE, *[_figure(v) for v in scores[:7]],
         *[_figure(v, 4) for v in scores[7:]], "", ""]
        for name, ntp, size, *scores in published()["geneval"]["rows"]
    ]  # fmt: skip


def _scores(part: Mapping[str, Any]) -> list[str]:
    tasks = [_figure(part["tasks"].get(task), 3) for task in TASKS]
    return [f"{part['overall']:.3f} ± {part['stderr']:.3f}", *tasks]


def _chance(name: str, geneval: Mapping[str, Any]) -> list[str]:
    tasks = [_figure(geneval["chance_tasks"].get(task), 3) for task in TASKS]
    return [f"{name}, chance", "", "", f"{geneval['chance']:.3f}", *tasks, *[""] * 5]


def _scorer(geneval: Mapping[str, Any]) -> str:
    by = geneval.get("scored_by", {})
    return str(by.get("detector") or f"boxes of {by.get('detections', 'an unnamed source')}")


def _parameters(evaluated: Mapping[str, Any]) -> str:
    known = evaluated.get("parameters")
    if known is None:
        return NONE
    return f"{known / 1e9:.1f}B" if known >= 1e9 else f"{known / 1e6:.1f}M"


def _figure(value: float | None, places: int = 2) -> str:
    return NONE if value is None else f"{value:.{places}f}"


def _spread(value: Mapping[str, Any] | None, places: int = 2) -> str:
    if value is None:
        return NONE
    error = value.get("stderr")
    return _figure(value["score"], places) + ("" if error is None else f" ± {error:.{places}f}")


def _count(value: Mapping[str, Any] | None) -> str:
    return NONE if value is None else str(value["n"])


def _mean(value: Mapping[str, Any] | None, times: float = 1) -> str:
    if value is None:
        return NONE
    places = 1 if times > 1 else 3
    error = value["stderr"]
    spread = "" if error is None else f" ± {error * times:.{places}f}"
    return f"{value['mean'] * times:.{places}f}{spread}"
