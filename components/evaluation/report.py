"""The run's report: scores, chance floors, win rates and what each stage did, offline.

Reads metrics/**.json; what is absent is left out.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.errors import UserError
from components.evaluation.paper_tables import left_out, paper_tables
from components.evaluation.plots import (
    attribute_plot,
    coverage_plot,
    curve_plot,
    score_plot,
    validation_plot,
)
from components.evaluation.series import headline, write_series
from components.evaluation.tables import (
    Rows,
    html_table,
    html_tables,
    markdown,
    page,
    write_tables,
)
from components.files import atomic_file, atomic_folder, read_json, write_json
from components.scenes.tasks import TASKS
from components.tracking import Tracker

SEEN = (
    "Green frame: right, red: wrong. Magenta boxes count by GenEval's rules, grey ones are too "
    "unsure for its thresholds. Under each picture its prompt, the verdict, and by number what "
    "each box was taken for, with its score."
)


def read_metrics(metrics: Path) -> dict[str, Any]:
    """Every metrics file by its path without `.json`, such as `evaluate/phase1`.

    Raises:
        UserError: a damaged file.
    """
    found = {}
    for file in sorted(metrics.rglob("*.json")):
        try:
            found[file.relative_to(metrics).with_suffix("").as_posix()] = read_json(file)
        except ValueError as error:
            raise UserError(
                f"{file} is no JSON ({error}); run the stage that makes it again."
            ) from None
    return found


def models(found: Mapping[str, Any]) -> list[str]:
    """The evaluated models: phase 1, the rounds, DPO, then those that were not trained here."""
    names = [name.split("/", 1)[1] for name in found if name.startswith("evaluate/")]

    def place(name: str) -> tuple[bool, int, str]:
        return f"train/{name}" not in found, {"phase1": 0, "dpo": 2}.get(name, 1), name

    return sorted(names, key=place)


def score_rows(found: Mapping[str, Any]) -> Rows:
    """Head and one row a model: six tasks, overall held-out and seen, chance, win rate."""
    rows = [["model", *TASKS, "held-out", "±", "seen", "chance", "win"]]
    for name in models(found):
        scores = found[f"evaluate/{name}"]["geneval"]
        row = [name]
        row += [_figure(scores["tasks"].get(task)) for task in TASKS]
        row += [_figure(scores["overall"]), _figure(scores["stderr"])]
        row += [_figure(scores.get("seen", {}).get("overall")), _figure(scores["chance"])]
        row.append(_figure(found.get(f"compare/{name}", {}).get("win_rate")))
        rows.append(row)
    return rows


def interval_rows(found: Mapping[str, Any]) -> Rows:
    """Head and one row a model: pictures, gain over chance and win rate with their intervals."""
    rows = [["model", "pictures", "held-out gain [95 %]", "all", "all gain [95 %]", "win [95 %]"]]
    for name in models(found):
        scores = found[f"evaluate/{name}"]["geneval"]
        whole = scores.get("all", scores)
        win = found.get(f"compare/{name}")
        rows.append(
            [
                name,
                f"{scores['n']} of {whole['n']}",
                _interval(scores["difference"]),
                _figure(whole["overall"]),
                _interval(whole["difference"]),
                f"{_interval({'mean': win['win_rate'], **win})} over {win['baseline']}"
                if win
                else "–",
            ]
        )
    return rows


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def notes(found: Mapping[str, Any]) -> list[str]:
    """What the score table means, in sentences."""
    said = []
    for name in models(found)[-1:]:
        scores = found[f"evaluate/{name}"]["geneval"]
        if "held_out" in scores:
            said.append(
                "The tasks and 'held-out' are on held-out combinations, which occur in no training "
                f"picture; 'seen' and 'all' are beside them ({scores['all']['n']} pictures of "
                f"{scores['all']['prompts']} prompts a model)."
            )
        for task in scores.get("shared", []):
            said.append(
                f"{task} has no combination that could be held out: its prompts stand in both. "
                f"Without it {name} scores {scores['held_out']['combinations']:.3f} held-out and "
                f"{scores['seen']['combinations']:.3f} seen."
            )
    said.append(
        "'held-out', 'seen' and 'all' are unweighted means of the tasks, ± the standard error of "
        "the first. Chance: the same pictures under other "
        "prompts of the same task. Gain: score minus chance, picture by picture. Errors and "
        "intervals: bootstrap clustered by prompt."
    )
    win = next((v for k, v in found.items() if k.startswith("compare/")), None)
    if win:
        said.append(
            "Win rate: over the model that stands behind it, on the same prompts, by "
            f"{win['judge']}."
        )
    return said


def text_table(rows: Rows) -> str:
    """Columns lined up, for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(" | ".join(cells).rstrip())
    return "\n".join(lines)


def table(metrics: Path) -> str:
    """The score table for a terminal, with what it means."""
    found = read_metrics(metrics)
    if not models(found):
        return f"No model is evaluated in {metrics} yet."
    tables = [text_table(score_rows(found)), "", text_table(interval_rows(found)), ""]
    return "\n".join([*tables, *notes(found)])


def facts(found: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """Titled tables of what the other stages measured: single figures, by name."""
    tables: list[tuple[str, Rows]] = []
    for name, values in found.items():
        if name.startswith(("evaluate/", "compare/")) or not isinstance(values, Mapping):
            continue
        rows = [[key, value] for key, value in _leaves(values)]
        if rows:
            tables.append((name, [["figure", "value"], *rows]))
    return tables


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    leaves: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            leaves += _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            leaves.append((f"{prefix}{key}", f"{value:.4g}"))
        elif isinstance(value, str | int) or value is None:
            leaves.append((f"{prefix}{key}", "–" if value is None else str(value)))
    return leaves


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures a comparison of runs needs: scores and win rate of each model."""
    result: dict[str, Any] = {"models": {}}
    for name in models(found):
        scores = found[f"evaluate/{name}"]["geneval"]
        entry = {key: scores[key] for key in ("overall", "stderr", "chance", "difference", "n")}
        entry["tasks"] = scores["tasks"]
        for split in ("seen", "held_out", "all"):
            if split in scores:
                entry[split] = scores[split]["overall"]
        win = found.get(f"compare/{name}")
        if win:
            entry["win_rate"] = {key: win[key] for key in ("win_rate", "low", "high", "baseline")}
        result["models"][name] = entry
    return result


def report(
    metrics: Path,
    reports_out: Path,
    plots_out: Path,
    params: Mapping[str, Any],
    tracker: Tracker,
) -> dict[str, Any]:
    """Write the report, its tables and its series to `reports_out`, pictures to `plots_out`.

    reports_out: report.md, report.html, samples.html (what the detector saw, by task), tables.md,
    .html, .tex and .json (the paper's Tables 1, 2 and 4 with our rows), summary.json, figures/
    (DVC's metrics), training.json, preference.json and scores.json (DVC's plots).

    Args:
        metrics: the folder of all stages' figures; `samples` beside it has the pictures.
        reports_out, plots_out: replaced. An ablation's figures are read from `ablation` beside
            `reports_out` if they are there.
        params: all parameters; scale and seed are named in the report.
        tracker: gets the report and the plots.

    Raises:
        UserError: a damaged metrics file.
    """
    found = read_metrics(metrics)
    title = f"Report: scale {params['scale']}, seed {params['seed']}"
    rows, intervals = score_rows(found), interval_rows(found)
    samples = metrics.parent / "samples"
    with atomic_folder(plots_out) as folder:
        drawn = _plots(found, folder)
    pictures = [(name, plots_out / png) for name, png in drawn]
    pictures += [(f"Pictures, {name}", samples / name / "grid.png") for name in models(found)]
    # A history without known curves has no plot, and the grids may be elsewhere.
    pictures = [(name, path) for name, path in pictures if path.is_file()]
    tables = paper_tables(found, models(found), params, _ablation(reports_out.parent))
    missing = left_out(tables)
    with atomic_folder(reports_out) as folder:
        write_json(folder / "summary.json", summary(found))
        write_series(found, models(found), folder)
        for name, figures in headline(found).items():
            write_json(folder / "figures" / f"{name}.json", figures)
        write_tables(tables, missing, folder)
        links = ["tables.html", "tables.md", "tables.tex"]
        seen = _seen_page(samples, models(found))
        if seen:
            links.insert(0, "samples.html")
            (folder / "samples.html").write_text(page("What the detector saw", seen))
        with atomic_file(folder / "report.md") as file:
            parts = [f"# {title}", markdown(rows), markdown(intervals), *notes(found)]
            parts.append("Beside this: " + ", ".join(f"[{name}]({name})" for name in links) + ".")
            for name, fact in facts(found):
                parts += [f"## {name}", markdown(fact)]
            file.write_text("\n\n".join(parts) + "\n")
        with atomic_file(folder / "report.html") as file:
            body = [f"<h1>{html.escape(title)}</h1>", html_table(rows), html_table(intervals)]
            body += [f"<p>{html.escape(note)}</p>" for note in notes(found)]
            shown = ", ".join(f'<a href="{name}">{name}</a>' for name in links)
            body.append(f"<p>Beside this page: {shown}.</p>")
            body.append(html_tables(tables))
            for name, path in pictures:
                body.append(f"<h2>{html.escape(name)}</h2>{_image(name, path)}")
            for name, fact in facts(found):
                body.append(f"<details><summary>{html.escape(name)}</summary>")
                body.append(f"{html_table(fact)}</details>")
            file.write_text(page(title, "".join(body)))
    for folder in (reports_out, plots_out):
        tracker.log_artifact(folder)
    print(table(metrics), flush=True)
    return summary(found)


def _plots(found: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Draw what there is to be drawn; returns titles and file names."""
    drawn: list[tuple[str, str]] = []
    if models(found):
        score_plot({n: found[f"evaluate/{n}"]["geneval"] for n in models(found)}, folder)
        drawn.append(("Scores by task", "scores.png"))
    for name, values in found.items():
        if not name.startswith("train/"):
            continue
        model = name.removeprefix("train/")
        if values.get("history"):
            curve_plot(values["history"], model, folder / f"curves-{model}.png")
            drawn.append((f"Training, {model}", f"curves-{model}.png"))
        if values.get("validation", {}).get("history"):
            validation_plot(values["validation"], model, folder / f"validation-{model}.png")
            drawn.append((f"Validation, {model}", f"validation-{model}.png"))
        for kind, figures in values.get("sampling", {}).get("kinds", {}).items():
            if len(figures["values"]) > 1:
                png = f"{kind}s-{model}.png"
                attribute_plot(figures["values"], f"{kind}s, {model}", folder / png)
                drawn.append((f"{kind.title()}s, {model}", png))
        if values.get("coverage"):
            coverage_plot(values["coverage"], model, folder / f"coverage-{model}.png")
            drawn.append((f"Coverage, {model}", f"coverage-{model}.png"))
    return drawn


def _ablation(reports: Path) -> Any:
    file = reports / "ablation" / "ablation.json"
    try:
        return read_json(file) if file.is_file() else None
    except ValueError as error:
        raise UserError(
            f"{file} is no JSON ({error}); remove it, or run `python -m flows.ablation` again."
        ) from None


def _seen_page(samples: Path, names: Sequence[str]) -> str:
    """The sheets of all models, task by task, as HTML; "" without any."""
    found = [(name, file) for name in names for file in (samples / name / "seen").glob("*.png")]
    known = {file.stem for _, file in found}
    parts = []
    for task in [t for t in TASKS if t in known] + sorted(known - set(TASKS)):
        parts.append(f'<h2 id="{html.escape(task)}">{html.escape(task)}</h2>')
        for name, file in found:
            if file.stem == task:
                parts.append(f"<h3>{html.escape(name)}</h3>{_image(f'{task}, {name}', file)}")
    if not parts:
        return ""
    return "".join([f"<h1>What the detector saw</h1><p>{SEEN}</p>", *parts])


def _image(name: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
