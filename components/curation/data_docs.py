"""Great Expectations' Data Docs as a folder that keeps its names and opens without a network."""

import html
import re
import shutil
from pathlib import Path
from urllib.parse import quote

from components.files import atomic_folder

# What a browser would fetch from elsewhere: style sheets, scripts, the logo; in styles, pictures.
REMOTE = re.compile(
    r"""<(?:link|img)\b[^>]*?\b(?:href|src)\s*=\s*["']?(?:https?:)?//[^>]*>""", re.IGNORECASE
)
REMOTE_URL = re.compile(r"""url\(\s*["']?(?:https?:)?//[^)]*\)""", re.IGNORECASE)
# All scripts: those in the page drive the remote ones, and fail without them.
SCRIPT = re.compile(r"<script\b.*?</script\s*>", re.IGNORECASE | re.DOTALL)
STYLE = """<style>
body { font: 15px/1.45 sans-serif; margin: 2em; color: #222; background: #fff; }
table { border-collapse: collapse; margin: .6em 0; }
th, td { border: 1px solid #ccc; padding: .3em .6em; text-align: left; vertical-align: top; }
.row { display: flex; gap: 2em; } .row > :last-child { flex: 1; }
nav ol, nav ul { list-style: none; padding: 0; }
/* The icons were a font from elsewhere; the buttons need the scripts. */
.fa-check-circle::before { content: "✓"; color: #080; }
.fa-times::before { content: "✗"; color: #b00; }
.fa-exclamation-triangle::before { content: "⚠"; color: #b00; }
.card:has(.btn-group-toggle) { display: none; }
</style>
"""


def copy_docs(site: Path, docs: Path) -> None:
    """Copy the site that Great Expectations made to the folder `docs`, which it replaces.

    Names do not change from run to run: the time becomes `latest`. The pages fetch nothing; the
    index links the others.
    """
    stamps = {p.name for p in site.rglob("*") if re.fullmatch(r"\d{8}T\d{6}\.\d+Z", p.name)}
    with atomic_folder(docs) as folder:
        for file in sorted(p for p in site.rglob("*") if p.is_file()):
            parts = ["latest" if p in stamps else p for p in file.relative_to(site).parts]
            target = folder.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".html":
                text = file.read_text()
                for stamp in stamps:
                    text = text.replace(stamp, "latest")
                target.write_text(_offline(text))
            else:
                shutil.copyfile(file, target)
        _link_pages(folder)


def _offline(page: str) -> str:
    """The page without anything fetched from elsewhere, with a style sheet of its own."""
    page = REMOTE_URL.sub("none", SCRIPT.sub("", REMOTE.sub("", page)))
    return page.replace("</head>", f"{STYLE}</head>", 1)


def _link_pages(site: Path) -> None:
    """Name the pages in the index, whose own table of them is made by a remote script."""
    index = site / "index.html"
    pages = sorted(p.relative_to(site) for p in site.rglob("*.html") if p != index)
    items = "".join(
        f'<li><a href="{quote(page.as_posix())}">{html.escape(": ".join(_title(page)))}</a></li>'
        for page in pages
    )
    text = index.read_text()
    index.write_text(re.sub(r"(<body\b[^>]*>)", rf"\1<ul>{items}</ul>", text, count=1))


def _title(page: Path) -> tuple[str, str]:
    """What kind of page, of which suite: expectations/SUITE.html, validations/SUITE/…/….html."""
    kind, suite = page.parts[:2]
    return kind, suite.removesuffix(".html")
