"""The data contract: what the curated manifest must hold, as a Great Expectations suite.

The suite is code in an ephemeral context (a file context rewrites its ids on every run), so
that what is expected is read here and in params, and nowhere else.
"""

import html
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from components.curation.detectors import model_filters
from components.curation.filters import Filter, cheap_filters
from components.curation.notions import column
from components.errors import UserError
from components.files import atomic_folder, write_json
from components.tracking import Tracker

NAME = "contract"
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


def check(
    curated: Path, metrics_out: Path, docs_out: Path, params: Mapping[str, Any], tracker: Tracker
) -> None:
    """Hold manifest.parquet against the contract; write figures and Data Docs, pass or fail.

    curated: the folder that `curate` wrote. params: the composed parameters; `curation` is
    read. metrics_out: success, expectations, failed (name, column, count, examples).
    docs_out: the Data Docs site, made to open without a network.
    Raises UserError naming the first failed expectation, the count and examples.
    """
    path = Path(curated) / "manifest.parquet"
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as problem:
        raise UserError(f"{path} cannot be read ({problem}): run the stage curate again.") from None
    curation = params["curation"]
    sides = frame[["width", "height"]] if {"width", "height"} <= set(frame) else None
    if sides is not None:
        # Worked out anew: the thresholds are to hold of the sizes, not of a score column.
        frame["shorter_side"] = sides.min(axis=1)
        frame["aspect_ratio"] = sides.max(axis=1) / sides.min(axis=1)
    results = _validate(frame, curation, Path(docs_out))
    failed = [f for f in map(_failure, results) if f is not None]
    # First what is not there at all: other failures may only follow from it.
    failed.sort(key=lambda failure: failure["expectation"] != "expect_column_to_exist")
    figures: dict[str, Any] = {
        "success": not failed,
        "expectations": len(results),
        "held": len(results) - len(failed),
        "rows": len(frame),
        "failed": failed,
    }
    write_json(Path(metrics_out), figures)
    tracker.log_metrics(
        {f"contract/{name}": figures[name] for name in ("expectations", "held", "rows")}
    )
    if failed:
        more = f" ({len(failed)} expectations failed)" if len(failed) > 1 else ""
        raise UserError(
            f"The contract on {path} is broken: {sentence(failed[0])}{more}; see "
            f"{Path(docs_out) / 'index.html'}, then mend the data or curation.* in params/."
        )
    print(f"contract: {len(results)} expectations hold on {len(frame)} rows", flush=True)


def expectations(frame: pd.DataFrame, curation: Mapping[str, Any]) -> list[Any]:
    """The suite's expectations for a manifest with these columns."""
    import great_expectations.expectations as gxe

    rules, columns = curation["contract"], list(frame.columns)
    filters = [*cheap_filters(curation), *model_filters(curation)]
    needed = ["key", "shard", "caption", "width", "height", "source", "synthetic", "sha256"]
    needed += [f"score_{f.name}" for f in filters] + ["notion_words"]
    needed += [column(word) for word in rules["required"]]
    out: list[Any] = [gxe.ExpectColumnToExist(column=name) for name in needed]
    out.append(gxe.ExpectTableRowCountToBeBetween(min_value=rules["rows"]))
    for name in ("key", "shard", "caption", "width", "height", "source", "synthetic", "sha256"):
        out.append(gxe.ExpectColumnValuesToNotBeNull(column=name))
    for name in ("key", "sha256"):
        out.append(gxe.ExpectColumnValuesToBeUnique(column=name))
    out.append(gxe.ExpectColumnValuesToMatchRegex(column="key", regex=r"^[A-Za-z0-9_.-]+$"))
    out.append(gxe.ExpectColumnValuesToMatchRegex(column="sha256", regex=r"^[0-9a-f]{64}$"))
    for name, kind in (("width", "int32"), ("height", "int32"), ("synthetic", "bool")):
        out.append(gxe.ExpectColumnValuesToBeOfType(column=name, type_=kind))
    out.append(
        gxe.ExpectColumnValuesToBeBetween(
            column="shorter_side", min_value=curation["resolution"]["shorter_side"]
        )
    )
    out.append(
        gxe.ExpectColumnValuesToBeBetween(
            column="aspect_ratio", min_value=1, max_value=curation["aspect"]["ratio"]
        )
    )
    out += [_within(stage) for stage in filters if stage.threshold < float("inf")]
    out.append(
        gxe.ExpectColumnMeanToBeBetween(
            column="synthetic", max_value=curation["synthetic"]["share"]
        )
    )
    for name in columns:
        if name.startswith("notion_") and name != "notion_words":
            out.append(gxe.ExpectColumnValuesToBeOfType(column=name, type_="bool"))
            out.append(gxe.ExpectColumnSumToBeBetween(column=name, min_value=rules["tail"]))
    return out


def _within(stage: Filter) -> Any:
    import great_expectations.expectations as gxe

    name = f"score_{stage.name}"
    if stage.keep_high:
        return gxe.ExpectColumnValuesToBeBetween(column=name, min_value=stage.threshold)
    return gxe.ExpectColumnValuesToBeBetween(column=name, max_value=stage.threshold)


def _validate(frame: pd.DataFrame, curation: Mapping[str, Any], docs: Path) -> list[dict[str, Any]]:
    """Run the suite, copy the Data Docs to `docs`, return each expectation's result."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read when the package is imported
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("curated").add_dataframe_asset("manifest")
    suite = gx.ExpectationSuite(name=NAME, expectations=expectations(frame, curation))
    definition = gx.ValidationDefinition(
        name=NAME, data=asset.add_batch_definition_whole_dataframe("all"), suite=suite
    )
    context.suites.add(suite)
    context.validation_definitions.add(definition)
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name=NAME,
            validation_definitions=[definition],
            actions=[gx.checkpoint.UpdateDataDocsAction(name="docs")],
            result_format={
                "result_format": "SUMMARY",
                "partial_unexpected_count": int(curation["contract"]["examples"]),
                "unexpected_index_column_names": ["key"] if "key" in frame else [],
            },
        )
    )
    outcome = checkpoint.run(batch_parameters={"dataframe": frame})
    site = context.list_data_docs_sites()["local_site"]["store_backend"]["base_directory"]
    _copy_docs(Path(site), docs)
    shutil.rmtree(site, ignore_errors=True)
    (result,) = outcome.run_results.values()
    return [r.to_json_dict() for r in result.results]


def _copy_docs(site: Path, docs: Path) -> None:
    """Copy the site under names that do not change from run to run: the time becomes `latest`."""
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
        f'<li><a href="{quote(page.as_posix())}">{html.escape(page.parts[0])}: {NAME}</a></li>'
        for page in pages
    )
    text = index.read_text()
    index.write_text(re.sub(r"(<body\b[^>]*>)", rf"\1<ul>{items}</ul>", text, count=1))


def _failure(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """A failed result in short: name, column, bound, count, of, observed, examples; else None."""
    if result["success"]:
        return None
    config, found = result["expectation_config"], result["result"]
    settings = {k: v for k, v in config["kwargs"].items() if k not in ("batch_id", "column")}
    pairs = zip(
        found.get("partial_unexpected_index_list") or [],
        found.get("partial_unexpected_list") or [],
        strict=False,
    )
    return {
        "expectation": config["type"],
        "column": config["kwargs"].get("column"),
        "settings": settings,
        "count": found.get("unexpected_count"),
        "of": found.get("element_count"),
        "observed": found.get("observed_value"),
        "examples": [f"{place.get('key')}: {value}" for place, value in pairs],
        "error": _error(result.get("exception_info") or {}),
    }


def _error(info: Mapping[str, Any]) -> str | None:
    """The exception's message; it is nested under a metric's id when a metric raised it."""
    for part in [info, *(v for v in info.values() if isinstance(v, Mapping))]:
        if part.get("raised_exception"):
            return str(part.get("exception_message"))[:200]
    return None


def sentence(failure: Mapping[str, Any]) -> str:
    """A failure in words: `expect_…(column, max_value=12): 3 of 100 rows, as 000010002: 13.1`."""
    inside = [failure["column"]] if failure["column"] else []
    inside += [f"{k}={v}" for k, v in failure["settings"].items()]
    text = f"{failure['expectation']}({', '.join(map(str, inside))})"
    if failure["error"]:
        return f"{text}: {failure['error']}"
    if failure["count"] is not None:
        examples = ", ".join(failure["examples"])
        return f"{text}: {failure['count']} of {failure['of']} rows, as {examples}"
    return f"{text}: found {failure['observed']}"
