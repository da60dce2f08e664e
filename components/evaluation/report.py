"""The run's report: scores, chance floors, win rates and what each stage did, offline.

Reads metrics/**.json; what is absent is left out.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.errors import UserError
from components.evaluation.plots import (
    attribute_plot,
    coverage_plot,
    curve_plot,
    score_plot,
    validation_plot,
)
from components.files import atomic_file, atomic_folder, read_json, write_json
from components.scenes.tasks import TASKS
from components.tracking import Tracker

Rows = list[list[str]]


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
    """The evaluated models: phase 1, the rounds, then DPO."""
    names = [name.split("/", 1)[1] for name in found if name.startswith("evaluate/")]
    return sorted(names, key=lambda name: ({"phase1": 0, "dpo": 2}.get(name, 1), name))


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


def _markdown(rows: Rows) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def _html_table(rows: Rows) -> str:
    def line(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"

    return f"<table>{line(rows[0], 'th')}{''.join(line(row, 'td') for row in rows[1:])}</table>"


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;
margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
th,td{padding:3px 9px;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}img{max-width:100%}"""


def report(
    metrics: Path,
    reports_out: Path,
    plots_out: Path,
    params: Mapping[str, Any],
    tracker: Tracker,
) -> dict[str, Any]:
    """Write report.md, report.html and summary.json to `reports_out`, pictures to `plots_out`.

    Args:
        metrics: the folder of all stages' figures; `samples` beside it has the picture grids.
        reports_out, plots_out: replaced.
        params: all parameters; scale and seed are named in the report.
        tracker: gets the report and the plots.

    Raises:
        UserError: a damaged metrics file.
    """
    found = read_metrics(metrics)
    title = f"Report: scale {params['scale']}, seed {params['seed']}"
    rows, intervals = score_rows(found), interval_rows(found)
    pictures: list[tuple[str, Path]] = []
    with atomic_folder(plots_out) as folder:
        if models(found):
            score_plot({n: found[f"evaluate/{n}"]["geneval"] for n in models(found)}, folder)
            pictures.append(("Scores by task", plots_out / "scores.png"))
        for name, values in found.items():
            if not name.startswith("train/"):
                continue
            model = name.removeprefix("train/")
            if values.get("history"):
                curve_plot(values["history"], model, folder / f"curves-{model}.png")
                pictures.append((f"Training, {model}", plots_out / f"curves-{model}.png"))
            if values.get("validation", {}).get("history"):
                png = f"validation-{model}.png"
                validation_plot(values["validation"], model, folder / png)
                pictures.append((f"Validation, {model}", plots_out / png))
            for kind, figures in values.get("sampling", {}).get("kinds", {}).items():
                if len(figures["values"]) > 1:
                    png = f"{kind}s-{model}.png"
                    attribute_plot(figures["values"], f"{kind}s, {model}", folder / png)
                    pictures.append((f"{kind.title()}s, {model}", plots_out / png))
            if values.get("coverage"):
                coverage_plot(values["coverage"], model, folder / f"coverage-{model}.png")
                pictures.append((f"Coverage, {model}", plots_out / f"coverage-{model}.png"))
    for name in models(found):
        pictures.append((f"Pictures, {name}", metrics.parent / "samples" / name / "grid.png"))
    # A history without known curves has no plot, and the grids may be elsewhere.
    pictures = [(name, path) for name, path in pictures if path.is_file()]
    with atomic_folder(reports_out) as folder:
        write_json(folder / "summary.json", summary(found))
        with atomic_file(folder / "report.md") as file:
            parts = [f"# {title}", _markdown(rows), _markdown(intervals), *notes(found)]
            for name, fact in facts(found):
                parts += [f"## {name}", _markdown(fact)]
            file.write_text("\n\n".join(parts) + "\n")
        with atomic_file(folder / "report.html") as file:
            body = [f"<h1>{html.escape(title)}</h1>", _html_table(rows), _html_table(intervals)]
            body += [f"<p>{html.escape(note)}</p>" for note in notes(found)]
            for name, path in pictures:
                data = base64.b64encode(path.read_bytes()).decode()
                body.append(f"<h2>{html.escape(name)}</h2>")
                body.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
            for name, fact in facts(found):
                body.append(f"<details><summary>{html.escape(name)}</summary>")
                body.append(f"{_html_table(fact)}</details>")
            file.write_text(
                f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}'
                f"</title><style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
            )
    for folder in (reports_out, plots_out):
        tracker.log_artifact(folder)
    print(table(metrics), flush=True)
    return summary(found)
