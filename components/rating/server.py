"""The page that raters open: FastAPI, one small script, nothing fetched from elsewhere."""

import hashlib
import hmac
import io
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from jinja2 import Environment, FileSystemLoader
from pydantic import AfterValidator, BaseModel, Field

from components.errors import UserError
from components.evaluation.folder import Sample
from components.files import hash_of
from components.rating.jobs import KINDS, NAME_LENGTH, Item, Job, clean_name, order, pending, shown
from components.rating.store import Store

PAGE = Path(__file__).with_name("page")
LONGEST_BODY = 4096  # bytes of a request
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
# What another site's page cannot send without being allowed to, which it never is.
OURS = ("x-requested-with", "djepa-rate")

# Longer than a name may be, as spaces at its ends do not count.
Rater = Annotated[str, Field(max_length=4 * NAME_LENGTH), AfterValidator(clean_name)]


class Who(BaseModel):
    """The body of an undo, and part of an answer's."""

    rater: Rater


class Given(Who):
    """The body of an answer; `value` is a choice of the job's kind."""

    item: str = Field(max_length=64)
    question: str = Field(max_length=64)
    value: str = Field(max_length=64)


def make_app(job: Job, store: Store, token: str | None = None, local: bool = True) -> FastAPI:
    """The application for one job, whose items are registered in the store.

    With a `token` only browsers that sent it once in the address are answered. `local`: the
    server is reached by this machine's own name only, so that a site that lets its name point
    here is refused.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    kind = KINDS[job.kind]
    items = {item.id: item for item in job.items}
    # Neither folder nor model can be told from a picture's name.
    names = {
        (x.id, side): hash_of([x.id, side]) for x in job.items for side in range(len(x.pictures))
    }
    pictures = {names[x.id, side]: p for x in job.items for side, p in enumerate(x.pictures)}
    page = Environment(loader=FileSystemLoader(PAGE), autoescape=True).get_template("index.html")
    own_order = lru_cache(maxsize=32)(lambda rater: order(job, rater))
    # A cookie is sent to every port of a host: other jobs have other cookies.
    cookie = f"djepa-rate-{hash_of(job.name)[:8]}"
    secret = _digest(token) if token else None

    def on_page(item: Item, rater: str) -> list[str]:
        return [names[item.id, side] for side in shown(item, rater)]

    def state(rater: str) -> dict[str, Any]:
        given = store.given(job.name, rater)
        todo = [x for x in own_order(rater) if pending(job.kind, given.get(x.id, {}))]
        found: dict[str, Any] = {
            "rater": rater,
            "done": len(items) - len(todo),
            "total": len(items),
            "item": None,
            "next": on_page(todo[1], rater) if len(todo) > 1 else [],
        }
        if todo:
            item = todo[0]
            answers = given.get(item.id, {})
            found |= {
                "item": item.id,
                "prompt": item.facts["prompt"],
                "pictures": on_page(item, rater),
                "question": pending(job.kind, answers),
                "given": answers,  # of a pair never more than "same", which names no side
            }
        return found

    def refusal(request: Request) -> Response | None:
        """Why a request is not answered, None if it is."""
        host = request.headers.get("host", "")
        if local and not secret and urlsplit(f"//{host}").hostname not in LOOPBACK:
            return PlainTextResponse("Open this page as http://127.0.0.1.", 403)
        if secret:
            sent = request.cookies.get(cookie, "")
            if request.url.path == "/" and "token" in request.query_params:
                sent = _digest(request.query_params["token"])
            if not hmac.compare_digest(sent.encode(), secret.encode()):
                return PlainTextResponse("Open this page with ?token= and the token you got.", 401)
        if request.method == "POST":
            origin = request.headers.get("origin")
            if request.headers.get(OURS[0]) != OURS[1] or (
                origin is not None and urlsplit(origin).netloc != host
            ):
                return PlainTextResponse("Only this page may answer.", 403)
            length = request.headers.get("content-length", "")
            if not length.isdecimal() or int(length) > LONGEST_BODY:
                return PlainTextResponse("No answer is that long.", 413)
        return None

    @app.middleware("http")
    async def guard(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = refusal(request) or await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @app.exception_handler(RequestValidationError)
    async def not_understood(request: Request, error: RequestValidationError) -> Response:
        # Says nothing back of what was sent, which may be no text that can be sent.
        return JSONResponse({"detail": f"A name has 1 to {NAME_LENGTH} characters."}, 422)

    @app.get("/")
    def index(request: Request) -> Response:
        response = HTMLResponse(page.render(kind=kind, name=job.kind, length=NAME_LENGTH))
        # The page itself, no redirect to it: after a link from another site the browser would
        # not send the cookie along. The script takes the token out of the address.
        if secret and "token" in request.query_params:
            response.set_cookie(
                cookie,
                secret,
                max_age=90 * 24 * 3600,
                httponly=True,
                samesite="strict",
                secure=request.url.scheme == "https",
            )
        return response

    @app.get("/rate.js")
    def script() -> Response:
        return FileResponse(PAGE / "rate.js", media_type="text/javascript")

    @app.get("/rate.css")
    def style() -> Response:
        return FileResponse(PAGE / "rate.css", media_type="text/css")

    @app.get("/picture/{name}")
    def picture(name: str) -> Response:
        if name not in pictures:
            raise HTTPException(404, "No such picture.")
        # Drawn anew: format, date and notes of a file could tell which model made it.
        buffer = io.BytesIO()
        try:
            Sample(name, {}, pictures[name]).open().save(buffer, "PNG", compress_level=1)
        except UserError:
            raise HTTPException(404, "This picture cannot be read.") from None
        headers = {"Cache-Control": "private, max-age=3600"}
        return Response(buffer.getvalue(), media_type="image/png", headers=headers)

    @app.post("/state")
    def current(body: Who) -> dict[str, Any]:
        return state(body.rater)

    @app.post("/answer")
    def answer(body: Given) -> dict[str, Any]:
        if body.item not in items or body.value not in {c.value for c in kind.choices}:
            raise HTTPException(404, "These pictures are rated no more: reload the page.")
        item, value = items[body.item], body.value
        if value in ("left", "right"):
            value = "AB"[shown(item, body.rater)[value == "right"]]
        # What is answered already stays as it is: the page shows what is next.
        store.answer(job, item, body.rater, body.question, value)
        return state(body.rater)

    @app.post("/undo")
    def undo(body: Who) -> dict[str, Any]:
        store.undo(job, body.rater)
        return state(body.rater)

    return app


def serve(job: Job, store: Store, host: str, port: int, token: str | None) -> None:
    """Serve the job's page until Ctrl-C. UserError if the address cannot be used."""
    import uvicorn

    store.register(job)
    local = host in LOOPBACK
    app = make_app(job, store, token, local)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"{host}, port {port}, cannot be used ({error.strerror}); give another --port, or 0 "
            "for any that is free."
        ) from None
    shown_host = f"[{host}]" if ":" in host else host
    print(f"{job.name}: {len(job.items)} to rate, answers in {store.path}", flush=True)
    print(
        f"http://{shown_host}:{listening.getsockname()[1]}/"
        + ("?token=… (with the token; needed once)" if token else "")
        + " (Ctrl-C stops it)",
        flush=True,
    )
    if not local and not token:
        print("Anybody who reaches this address can rate; --token keeps others out", flush=True)
    # No access log: the token stands in an address once.
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
