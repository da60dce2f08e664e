"""`djepa rate …`: thin calls, each importing what it needs when it is run."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

rate = typer.Typer(no_args_is_help=True)

StoreFile = Annotated[
    Path | None, typer.Option(help="Answers; by default ratings.sqlite beside the folder")
]
Ratings = Annotated[Path, typer.Argument(help="ratings.sqlite")]
Job = Annotated[str | None, typer.Option(help="Which job, if the file has several")]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for other machines too")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free")]
Token = Annotated[
    str | None,
    typer.Option(envvar="DJEPA_RATE_TOKEN", help="Only who sends it as ?token=… is answered"),
]


@rate.callback()
def ratings() -> None:
    """What people say of pictures: a page to say it on, and what they said."""


@rate.command("labels")
def rate_labels(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="For example references/r1")],
    store: StoreFile = None,
    host: Host = "127.0.0.1",
    port: Port = 8001,
    token: Token = None,
) -> None:
    """Open a page on which people label reference pictures, for a critic's human labels."""
    from components.rating.jobs import label_job

    _serve(label_job(folder), folder, store, host, port, token)


@rate.command("pairs")
def rate_pairs(
    a: Annotated[Path, typer.Argument(metavar="DIR_A", help="For example samples/phase1")],
    b: Annotated[Path, typer.Argument(metavar="DIR_B", help="For example samples/r1")],
    store: StoreFile = None,
    host: Host = "127.0.0.1",
    port: Port = 8001,
    token: Token = None,
) -> None:
    """Open a page on which people compare two models' pictures, not knowing which is whose."""
    from components.rating.jobs import pair_job

    _serve(pair_job(a, b), a, store, host, port, token)


def _serve(job: Any, beside: Path, store: Path | None, *address: Any) -> None:
    from components.rating.server import serve
    from components.rating.store import Store

    file = store or Path(os.path.abspath(beside)).parent / "ratings.sqlite"
    serve(job, Store(file, create=True), *address)


@rate.command("draw")
def rate_draw(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="For example models/r1")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="New, for example pairs/r1")],
) -> None:
    """Draw training prompts twice, into DIR/a and DIR/b, to compare for preference optimisation."""
    from components.compose import load
    from components.feedback.pairs import draw_to_rate
    from components.files import refuse_other

    refuse_other(out, ("a",))  # it is replaced whole
    print(draw_to_rate(model, Path("encoded"), out, load()))


@rate.command("export")
def rate_export(
    file: Ratings,
    out: Annotated[Path, typer.Option(help="X.jsonl or X.csv, e.g. labels/r1.jsonl")],
    job: Job = None,
    answers: Annotated[
        bool, typer.Option("--answers", help="Every answer, withdrawn ones too, to import again")
    ] = False,
) -> None:
    """Write a label a picture, or a winner a pair and rater."""
    from components.rating.exchange import export
    from components.rating.store import Store

    print(export(Store(file), out, job, answers))


@rate.command("import")
def rate_import(
    file: Ratings,
    answers: Annotated[Path, typer.Argument(help="What `export --answers` wrote")],
) -> None:
    """Add answers that were given elsewhere; what is in FILE already stays."""
    from components.rating.exchange import bring_in
    from components.rating.store import Store

    print(bring_in(Store(file, create=True), answers))


@rate.command("agreement")
def rate_agreement(
    file: Ratings,
    job: Job = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON")] = False,
) -> None:
    """Say how far raters agree beyond chance: Cohen's kappa of two, Fleiss' of more."""
    from components.rating.agreement import agreement, text
    from components.rating.exchange import choose_job
    from components.rating.store import Store

    store = Store(file)
    found = agreement(store, choose_job(store, job))
    print(json.dumps(found, indent=2, ensure_ascii=False) if as_json else text(found))
