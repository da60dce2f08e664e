"""The data contract: what the curated set must hold, as Great Expectations suites.

The suites are code in an ephemeral context (a file context rewrites its ids on every run), so
that what is expected is read here and in params, and nowhere else. They are run on the tables of
contract_tables.py by SQL, of which a few rows come back, however many there are.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.curation import contract_tables as tables
from components.curation.chain import chain
from components.curation.data_docs import copy_docs
from components.curation.notions import column
from components.errors import UserError
from components.files import write_json
from components.tracking import Tracker

NAME = "contract"
KNOWN = ("key", "shard", "caption", "width", "height", "source", "synthetic", "sha256")
Suites = dict[str, tuple[str, list[Any]]]  # table -> the column that names a row, expectations


def check(
    curated: Path, metrics_out: Path, docs_out: Path, params: Mapping[str, Any], tracker: Tracker
) -> None:
    """Hold manifest and shards against the contract; write figures and Data Docs, pass or fail.

    curated: the folder that `curate` wrote. params: the composed parameters; `curation` is
    read. metrics_out: success, expectations, held, rows, failed (expectation, table, column,
    settings, count, of, observed, examples, error). docs_out: the Data Docs site, made to open
    without a network. Memory does not grow with the rows; a copy of the columns that are held
    against something, in a file beside `docs_out`, is removed at the end.
    Raises UserError naming the first failed expectation, the count and examples.
    """
    path, docs_out = Path(curated) / "manifest.parquet", Path(docs_out)
    curation = params["curation"]
    place = docs_out.with_name(f"{docs_out.name}.tmp-tables")
    shutil.rmtree(place, ignore_errors=True)  # of a killed run
    place.mkdir(parents=True)
    try:
        database = place / "curated.sqlite"
        try:
            rows, columns = tables.fill(database, curated, needed(curation), curation["limits"])
        except (OSError, ValueError) as problem:
            raise UserError(
                f"{path} cannot be read ({problem}): run the stage curate again."
            ) from None
        results = _validate(database, suites(columns, curation), curation, docs_out)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    failed = [f for f in map(_failure, results) if f is not None]
    # First what is not there at all: other failures may only follow from it.
    order = ["expect_table_row_count_to_be_between", "expect_column_to_exist"]
    failed.sort(key=lambda failure: failure["expectation"] not in order)
    figures: dict[str, Any] = {
        "success": not failed,
        "expectations": len(results),
        "held": len(results) - len(failed),
        "rows": rows,
        "failed": failed,
    }
    write_json(Path(metrics_out), figures)
    tracker.log_metrics(
        {f"contract/{name}": figures[name] for name in ("expectations", "held", "rows")}
    )
    tracker.log_artifact(docs_out, NAME)
    if failed:
        more = f" ({len(failed)} expectations failed)" if len(failed) > 1 else ""
        raise UserError(
            f"The contract on {path} is broken: {sentence(failed[0])}{more}; see "
            f"{docs_out / 'index.html'}, then mend the data or curation.* in params/."
        )
    print(f"contract: {len(results)} expectations hold on {rows} rows", flush=True)


def needed(curation: Mapping[str, Any]) -> list[str]:
    """The columns that the manifest must have."""
    names = [*KNOWN, *(f"score_{f.name}" for f in chain(curation).scored), tables.WORDS]
    return [*dict.fromkeys([*names, *(column(w) for w in curation["contract"]["required"])])]


def suites(columns: Sequence[str], curation: Mapping[str, Any]) -> Suites:
    """The expectations for a manifest with these columns, by table of contract_tables.py."""
    found: Suites = {"manifest": ("key", _manifest(curation))}
    if any(map(tables.is_notion, columns)):
        found["notions"] = ("notion", _notions(curation))
    if {"key", "shard", "sha256"} <= {*columns}:
        manifest, pictures = _agreement()
        found["manifest"][1].extend(manifest)
        found["pictures"] = ("key", pictures)
    return found


def _manifest(curation: Mapping[str, Any]) -> list[Any]:
    import great_expectations.expectations as gxe

    out: list[Any] = [gxe.ExpectColumnToExist(column=name) for name in needed(curation)]
    out.append(gxe.ExpectTableRowCountToBeBetween(min_value=curation["contract"]["rows"]))
    out += [gxe.ExpectColumnValuesToNotBeNull(column=name) for name in KNOWN]
    out += [gxe.ExpectColumnValuesToBeUnique(column=name) for name in ("key", "sha256")]
    for name, regex in (("key", r"^[A-Za-z0-9_.-]+$"), ("sha256", r"^[0-9a-f]{64}$")):
        out.append(gxe.ExpectColumnValuesToMatchRegex(column=name, regex=regex))
    for name, kind in (("width", "INTEGER"), ("height", "INTEGER"), ("synthetic", "BOOLEAN")):
        out.append(gxe.ExpectColumnValuesToBeOfType(column=name, type_=kind))
    between = gxe.ExpectColumnValuesToBeBetween
    # Worked out anew: the thresholds are to hold of the sizes, not only of a score column.
    anew = {"resolution": "shorter_side", "aspect": "aspect_ratio"}
    for stage in chain(curation).scored:
        if stage.threshold < float("inf"):
            side = "min_value" if stage.keep_high else "max_value"
            bound: dict[str, Any] = {side: stage.threshold}
            out.append(between(column=f"score_{stage.name}", **bound))
            if stage.name in anew:
                out.append(between(column=anew[stage.name], **bound))
    share = curation["synthetic"]["share"]
    out.append(gxe.ExpectColumnMeanToBeBetween(column="synthetic", max_value=share))
    return out


def _notions(curation: Mapping[str, Any]) -> list[Any]:
    """Every notion column tells yes or no, and is yes often enough."""
    import great_expectations.expectations as gxe

    tail = curation["contract"]["tail"]
    return [
        gxe.ExpectColumnValuesToBeInSet(column="type", value_set=["bool"]),
        gxe.ExpectColumnValuesToBeBetween(column="captions", min_value=tail),
    ]


def _agreement() -> tuple[list[Any], list[Any]]:
    """Every row has its picture in its shard, and the shards hold nothing else."""
    import great_expectations.expectations as gxe

    manifest = [
        gxe.ExpectColumnValuesToNotBeNull(column="shard_sha256"),
        gxe.ExpectColumnPairValuesToBeEqual(
            column_A="sha256", column_B="shard_sha256", ignore_row_if="either_value_is_missing"
        ),
    ]
    pictures = [
        gxe.ExpectColumnValuesToBeNull(column="error"),
        gxe.ExpectColumnValuesToNotBeNull(column="manifest_sha256"),
    ]
    return manifest, pictures


def _validate(
    database: Path, expected: Suites, curation: Mapping[str, Any], docs: Path
) -> list[dict[str, Any]]:
    """Run the suites, write the Data Docs to `docs`, return each expectation's result."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read when the package is imported
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    source = context.data_sources.add_sqlite("curated", connection_string=f"sqlite:///{database}")
    results: list[dict[str, Any]] = []
    for table, (index, expectations) in expected.items():
        asset = source.add_table_asset(table, table_name=table)
        suite = gx.ExpectationSuite(name=table, expectations=expectations)
        definition = gx.ValidationDefinition(
            name=table, data=asset.add_batch_definition_whole_table("all"), suite=suite
        )
        context.suites.add(suite)
        context.validation_definitions.add(definition)
        checkpoint = context.checkpoints.add(
            gx.Checkpoint(
                name=table,
                validation_definitions=[definition],
                actions=[gx.checkpoint.UpdateDataDocsAction(name="docs")],
                result_format={
                    "result_format": "SUMMARY",
                    "partial_unexpected_count": int(curation["contract"]["examples"]),
                    "unexpected_index_column_names": [index],
                },
            )
        )
        (result,) = checkpoint.run().run_results.values()
        results += [r.to_json_dict() | {"table": table, "index": index} for r in result.results]
    site = context.list_data_docs_sites()["local_site"]["store_backend"]["base_directory"]
    copy_docs(Path(site), docs)
    shutil.rmtree(site, ignore_errors=True)
    return results


def _failure(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """A failed result in short: what was held against which table, count, examples; else None."""
    if result["success"]:
        return None
    config, found = result["expectation_config"], result["result"]
    unsaid = ("batch_id", "column", "ignore_row_if")
    settings = {k: v for k, v in config["kwargs"].items() if k not in unsaid}
    pairs = zip(
        found.get("partial_unexpected_index_list") or [],
        found.get("partial_unexpected_list") or [],
        strict=False,
    )
    return {
        "expectation": config["type"],
        "table": result["table"],
        "column": config["kwargs"].get("column"),
        "settings": settings,
        "count": found.get("unexpected_count"),
        "of": found.get("element_count"),
        "observed": found.get("observed_value"),
        "examples": [f"{place.get(result['index'])}: {value}" for place, value in pairs],
        "error": _error(result.get("exception_info") or {}),
    }


def _error(info: Mapping[str, Any]) -> str | None:
    """The exception's message; it is nested under a metric's id when a metric raised it."""
    for part in [info, *(v for v in info.values() if isinstance(v, Mapping))]:
        if part.get("raised_exception"):
            return str(part.get("exception_message"))[:200]
    return None


def sentence(failure: Mapping[str, Any]) -> str:
    """In words: `expect_…(column, max_value=12) of manifest: 3 of 100 rows, as 000010002: 13.1`."""
    inside = [failure["column"]] if failure["column"] else []
    inside += [f"{k}={v}" for k, v in failure["settings"].items()]
    text = f"{failure['expectation']}({', '.join(map(str, inside))}) of {failure['table']}"
    if failure["error"]:
        return f"{text}: {failure['error']}"
    if failure["count"] is not None:
        examples = ", ".join(failure["examples"])
        return f"{text}: {failure['count']} of {failure['of']} rows, as {examples}"
    return f"{text}: found {failure['observed']}"
