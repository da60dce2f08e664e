"""Tables, plots and page of a comparison."""

import html
from collections.abc import Sequence
from pathlib import Path

from components.comparison.parents import Parent
from components.comparison.plots import write_plots
from components.comparison.rows import Mean, Row, differing, rows_of
from components.errors import UserError
from components.evaluation.tables import (
    Section,
    Table,
    html_tables,
    latex_page,
    markdown_page,
    page,
)
from components.files import atomic_file, write_json
from components.scenes.tasks import TASKS

MOST = 6  # parameters that are columns of the first table; more are a table of their own
TITLE = "Comparison of runs"


def write_comparison(parents: Sequence[Parent], folder: Path) -> str:
    """Write compare.md, .html, .tex and .json and the plots into `folder`; returns the Markdown.

    Raises:
        UserError: not one of the parents has figures.
    """
    rows, left = rows_of(parents)
    if not rows:
        raise UserError(
            f"There is nothing to compare: {' '.join(left) or 'no run was found.'} "
            "A run has its figures when its last stage has ended: `dvc repro` goes on with one."
        )
    tables = tables_of(rows, left)
    folder.mkdir(parents=True, exist_ok=True)
    plots = write_plots(rows, folder)
    text = f"# {TITLE}\n\n{markdown_page(tables)}"
    shown = "".join(f"\n![{words}]({name})\n" for name, words in plots.items())
    pictures = "".join(
        f'<h2>{html.escape(words)}</h2><img src="{name}" alt="{html.escape(words)}">'
        for name, words in plots.items()
    )
    texts = {
        "compare.md": text + shown,
        "compare.html": page(TITLE, f"<h1>{TITLE}</h1>{html_tables(tables)}{pictures}"),
        "compare.tex": latex_page(tables),
    }
    for name, content in texts.items():
        with atomic_file(folder / name) as temporary:
            temporary.write_text(content)
    found = {"rows": [row.plain() for row in rows], "differ": differing(rows), "left_out": left}
    write_json(folder / "compare.json", found)
    return text


def tables_of(rows: Sequence[Row], left: Sequence[str]) -> list[Table]:
    """One table of all, and one of the parameters that differ where they are many."""
    params = differing(rows)
    wide = dict(params) if len(params) <= MOST else {}
    about = ("scale", "git.commit", "data.hash")
    columns = ["Run", "seeds", "scale", "commit", "data", *wide]
    columns += ["held-out", "chance", "all", *TASKS, "win rate", "images", "training"]
    cells = []
    for number, row in enumerate(rows):
        cells.append(
            [
                row.name,
                str(len(row.parents)),
                *[row.tag(name)[:7] if "." in name else row.tag(name) for name in about],
                *[values[number] for values in wide.values()],
                _score(row, "geneval.overall", "geneval.stderr"),
                _mean(row.figure("geneval.chance")),
                _score(row, "geneval.all.overall", "geneval.all.stderr"),
                *[_spread(row.figure(f"geneval.tasks.{task}")) for task in TASKS],
                _win(row),
                _images(row.figure("images")),
                _time(row.seconds()),
            ]
        )
    notes = [
        "held-out, all, tasks: share of pictures right by GenEval's rules (tasks: held-out). Of "
        "several seeds mean ± standard error over seeds; of one, held-out and all ± the standard "
        "error over prompts, the win rate with its 95 % interval. chance: held-out pictures under "
        "other prompts of their task. On an embedded world this is not GenEval of real pictures. "
        "win rate: over the run's own baseline. training: of all stages that trained the model, "
        "also those that an earlier run had done.",
    ]
    if left:
        notes.append(f"Not compared: {' '.join(left)}")
    titles = [("", 5), ("parameters", len(wide)), ("GenEval", 3), ("tasks", len(TASKS)), ("", 3)]
    groups = [each for each in titles if each[1]]
    tables = [Table(1, "runs", TITLE, groups, columns, [Section("Runs", cells, ours=False)], notes)]
    if params and not wide:
        body = [[name, *values] for name, values in params.items()]
        names = ["Parameter", *[row.name for row in rows]]
        section = Section("Parameters", body, ours=False)
        title = "Parameters that differ"
        tables.append(Table(2, "parameters", title, [("", len(names))], names, [section], []))
    return tables


def _mean(value: Mean | None) -> str:
    return "–" if value is None else f"{value['mean']:.3f}"


def _spread(value: Mean | None) -> str:
    """Mean ± standard error over seeds; of one seed the value alone."""
    if value is None or value["stderr"] is None:
        return _mean(value)
    return f"{_mean(value)} ± {value['stderr']:.3f}"


def _score(row: Row, name: str, error: str) -> str:
    """Mean ± standard error over seeds; of one seed ± that over prompts."""
    value, prompts = row.figure(name), row.figure(error)
    if value is None or len(row.parents) > 1 or prompts is None:
        return _spread(value)
    return f"{_mean(value)} ± {prompts['mean']:.3f}"


def _win(row: Row) -> str:
    value, low, high = (row.figure(name) for name in ("win_rate", "low", "high"))
    if value is None or len(row.parents) > 1 or low is None or high is None:
        return _spread(value)
    return f"{_mean(value)} [{_mean(low)}, {_mean(high)}]"


def _images(value: Mean | None) -> str:
    return "–" if value is None else f"{value['mean']:,.0f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
