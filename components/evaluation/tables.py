"""Tables with published rows and ours under them, as Markdown, HTML and LaTeX."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.files import atomic_file, write_json

Rows = list[list[str]]


@dataclass(frozen=True)
class Section:
    """Rows of one origin. `ours`: set apart from what others published."""

    title: str
    rows: Rows
    ours: bool


@dataclass(frozen=True)
class Table:
    """A table as a paper prints it.

    number: the paper's. key: for an anchor, such as `table-2`. groups: what stands over columns,
    with the number of columns under it, "" for nothing; they add up to all columns. notes:
    footnotes.
    """

    number: int
    key: str
    title: str
    groups: Sequence[tuple[str, int]]
    columns: Sequence[str]
    sections: Sequence[Section]
    notes: Sequence[str]

    @property
    def heading(self) -> str:
        """`Table 2: what it is`."""
        return f"Table {self.number}: {self.title}"


def markdown(rows: Rows) -> str:
    """Head and rows as a Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def html_table(rows: Rows) -> str:
    """Head and rows as an HTML table."""
    body = "".join(_html_row(row, "td") for row in rows[1:])
    return f"<table>{_html_row(rows[0], 'th')}{body}</table>"


def _html_row(row: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"


def markdown_page(tables: Sequence[Table]) -> str:
    """The tables under each other; our rows are in italics under a heading of their own."""
    parts = []
    for table in tables:
        # Markdown has no head of two lines: a group's name goes before its first column.
        head = list(table.columns)
        at = 0
        for label, width in table.groups:
            if label:
                head[at] = f"{label}: {head[at]}"
            at += width
        rows = [head]
        for section in table.sections:
            rows.append([f"**{section.title}**", *[""] * (len(head) - 1)])
            rows += [[f"*{c}*" if c else "" for c in r] if section.ours else r
                     for r in section.rows]  # fmt: skip
        parts += [f"## {table.heading}", markdown(rows), *table.notes]
    return "\n\n".join(parts) + "\n"


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1280px;
margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
th,td{padding:3px 9px;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}img{max-width:100%}
.paper thead th{border-bottom:1px solid #888;text-align:center}
.paper tbody{border-top:2px solid #888}.paper .title td{text-align:left;font-weight:600}
.paper tbody.ours{background:#eef4fb}.note{font-size:13px;color:#444;margin:.4em 0}"""


def html_tables(tables: Sequence[Table]) -> str:
    """The tables as a part of a page; our rows have a ground of their own. Style: STYLE."""
    parts = []
    for table in tables:
        groups = "".join(
            f'<th colspan="{width}">{html.escape(label)}</th>' for label, width in table.groups
        )
        body = ""
        for section in table.sections:
            title = f'<tr class="title"><td colspan="{len(table.columns)}">'
            title += f"{html.escape(section.title)}</td></tr>"
            rows = "".join(_html_row(row, "td") for row in section.rows)
            kind = ' class="ours"' if section.ours else ""
            body += f"<tbody{kind}>{title}{rows}</tbody>"
        head = f"<thead><tr>{groups}</tr>{_html_row(table.columns, 'th')}</thead>"
        parts.append(f'<h2 id="{table.key}">{html.escape(table.heading)}</h2>')
        parts.append(f'<table class="paper">{head}{body}</table>')
        parts += [f'<p class="note">{html.escape(note)}</p>' for note in table.notes]
    return "".join(parts)


def page(title: str, body: str) -> str:
    """An HTML page in the report's style; `body` is HTML, `title` is not."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{STYLE}</style><body>{body}</body></html>\n"
    )


def write_tables(tables: Sequence[Table], missing: Sequence[str], folder: Path) -> None:
    """Write tables.md, tables.html, tables.tex and tables.json into `folder`.

    missing: what would fill the tables that are not there, said under the others.
    """
    said = f"Not here, for want of a row of ours: {'; '.join(missing)}." if missing else ""
    body = html_tables(tables) + (f'<p class="note">{html.escape(said)}</p>' if said else "")
    title = "Tables"
    texts = {
        "tables.md": "\n\n".join([f"# {title}", markdown_page(tables).rstrip(), said]).rstrip()
        + "\n",
        "tables.html": page(title, f"<h1>{title}</h1>{body}"),
        "tables.tex": latex_page(tables),
    }
    for name, text in texts.items():
        with atomic_file(folder / name) as temporary:
            temporary.write_text(text)
    write_json(folder / "tables.json", [_plain(table) for table in tables])


def _plain(table: Table) -> dict[str, object]:
    rows = [
        {**dict(zip(table.columns, row, strict=True)), "origin": section.title}
        for section in table.sections
        for row in section.rows
    ]
    return {"key": table.key, "title": table.heading, "rows": rows, "notes": list(table.notes)}


LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "·": r"$\cdot$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "✓": r"\checkmark{}",
    "−": r"$-$",
    "–": "--",
    "†": r"\dag{}",
    "‡": r"\ddag{}",
}
PREAMBLE = r"""% Of a run's report. Complete: pdflatex tables.tex. To take one table over, copy its
% environment; it needs booktabs, amssymb (\checkmark) and graphicx (\resizebox).
\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage[margin=2cm,landscape]{geometry}
\usepackage{amssymb,booktabs,graphicx}
\begin{document}
"""


def latex(text: str) -> str:
    """`text` with LaTeX's own characters, and those that we use beyond ASCII, written as TeX."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def latex_page(tables: Sequence[Table]) -> str:
    """A whole document of the tables, by booktabs."""
    return PREAMBLE + "".join(_latex_table(table) for table in tables) + "\\end{document}\n"


def _latex_table(table: Table) -> str:
    width = len(table.columns)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\setcounter{{table}}{{{table.number - 1}}}",
        rf"\caption{{{latex(table.title)}}}",
        rf"\label{{tab:{table.key}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{l{'c' * (width - 1)}}}",
        r"\toprule",
    ]
    if any(label for label, _ in table.groups):
        cells, rules, at = [], [], 1
        for label, span in table.groups:
            cells.append(rf"\multicolumn{{{span}}}{{c}}{{{latex(label)}}}")
            if label:
                rules.append(rf"\cmidrule(lr){{{at}-{at + span - 1}}}")
            at += span
        lines += [_latex_row(cells), " ".join(rules)]
    lines.append(_latex_row([latex(column) for column in table.columns]))
    for section in table.sections:
        title = rf"\multicolumn{{{width}}}{{l}}{{\textbf{{{latex(section.title)}}}}}"
        lines += [r"\midrule", _latex_row([title])]
        for row in section.rows:
            cells = [latex(cell) for cell in row]
            if section.ours:
                cells = [rf"\textit{{{cell}}}" if cell else "" for cell in cells]
            lines.append(_latex_row(cells))
    lines += [r"\bottomrule", r"\end{tabular}}", r"\par\medskip"]
    notes = [latex(note) for note in table.notes]
    lines.append(r"\parbox{\linewidth}{\footnotesize " + r"\par ".join(notes) + "}")
    return "\n".join([*lines, r"\end{table}", "", ""])


def _latex_row(cells: Sequence[str]) -> str:
    # A row that begins with a bracket would be read as the argument of the \\ before it.
    return "{}" * cells[0].startswith("[") + " & ".join(cells) + r" \\"
