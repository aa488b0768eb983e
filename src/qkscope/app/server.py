"""`qkscope serve DIR`: the page of a run on a local server.

    /                      the page (static/)
    /data/…json            what the store reads of the artefact
    /api/prompt/…          live tracing, where the model is at hand (live.py)

What is notable:
- Only the package's own files and the artefact are served; an address names layers, features and heads by number and
  never a file.
- A web site elsewhere cannot read the page through a name that resolves to this machine (DNS rebinding): the Host
  header must be 127.0.0.1, localhost, [::1] or the host that was given, and a request with another Origin is refused.
- A strict content security policy: no script but the page's own files, nothing from elsewhere.
- Errors are JSON, {"error": words}, and never name a path of the machine; the terminal does.
"""

from __future__ import annotations

import importlib
import importlib.util
import ipaddress
import json
import mimetypes
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..decomposition import SIDES
from ..errors import UserError
from .queries import BadQuery, features_page, pairs_page
from .store import Run
from .tables import Missing

STATIC = Path(__file__).parent / "static"
HOST, PORT = "127.0.0.1", 8765
OWN_NAMES = ("127.0.0.1", "localhost", "::1")
WILDCARDS = ("0.0.0.0", "::")
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
DAMAGED = "A file of this run is missing or damaged; the terminal of qkscope serve says which."
Answer = Callable[[Request], Any]

mimetypes.add_type("text/javascript", ".js")  # some systems call it text/plain, and nosniff would then refuse it


def serve(folder: Path, host: str = HOST, port: int = PORT) -> None:
    """Serve a run's page until interrupted; `UserError` for what is no finished run and for an address in use."""
    app = make_app(folder, host)
    listener = listen(host, port)
    Thread(target=app.state.warm, daemon=True).start()
    name = f"[{host}]" if ":" in host else host
    print(f"qkscope: {folder} at http://{name}:{listener.getsockname()[1]}/ (Ctrl-C ends)", flush=True)
    uvicorn.Server(configured(app)).run(sockets=[listener])


def configured(app: Starlette) -> uvicorn.Config:
    return uvicorn.Config(app, log_level="warning", server_header=False)


def listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: name a port from 0 (any that is free) to 65535")
    try:
        kind, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(kind, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(place)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--host {host} --port {port}: {reason}; choose another --port or --host") from None
    return listener


def make_app(folder: Path, host: str = HOST) -> Starlette:
    """The page of a run as an application."""
    run = Run(folder)
    live = live_routes(folder)

    def whole(request: Request) -> Any:
        return {**run.summary(), "live": bool(live), "static": False}

    def layer(request: Request) -> Any:
        return run.layer(request.path_params["layer"])

    def side(request: Request) -> str:
        if (found := request.path_params["side"]) not in SIDES:
            raise Missing("There is no such page.")
        return found

    def number(request: Request, name: str) -> int:
        found = request.path_params[name]
        if not found.removeprefix("-").isdecimal() or len(found) > 9:
            raise Missing("There is no such page.")
        return int(found)

    numbers: dict[str, Answer] = {
        "run": whole,
        "{layer:int}/report": lambda r: layer(r).report(),
        "{layer:int}/features/{side}": lambda r: features_page(layer(r), side(r), r.query_params),
        "{layer:int}/feature/{side}/{feature}": lambda r: layer(r).features.record(side(r), number(r, "feature")),
        "{layer:int}/pairs": lambda r: pairs_page(layer(r), r.query_params),
        "{layer:int}/pair/{query}/{key}/{head}": lambda r: layer(r).pairs.record(
            *(number(r, name) for name in ("query", "key", "head"))
        ),
        "{layer:int}/head/{head}": lambda r: layer(r).of_heads.head(number(r, "head")),
        "{layer:int}/heads": lambda r: layer(r).of_heads.likeness(),
        "{layer:int}/pattern/{head}": lambda r: layer(r).pattern(number(r, "head")),
    }
    routes: list[BaseRoute] = [Route(f"/data/{path}.json", _endpoint(answer)) for path, answer in numbers.items()]
    page = StaticFiles(directory=STATIC, html=True)
    app = Starlette(
        routes=[*routes, *live, Mount("/", page)],
        middleware=[Middleware(Guard, names=_names(host), any_address=host in WILDCARDS)],
        exception_handlers={
            HTTPException: _refused,
            Missing: lambda request, error: _json({"error": str(error)}, 404),
            BadQuery: lambda request, error: _json({"error": str(error)}, 400),
            UserError: _damaged,
            Exception: lambda request, error: _json({"error": "Something went wrong; see the terminal."}, 500),
        },
    )
    app.state.warm = run.warm
    return app


def live_routes(folder: Path) -> Sequence[BaseRoute]:
    """Routes of live tracing, under /api/prompt/, where that part is there."""
    name = f"{__package__}.live"
    return importlib.import_module(name).routes(folder) if importlib.util.find_spec(name) else []


def _endpoint(answer: Answer) -> Callable[[Request], Response]:
    def endpoint(request: Request) -> Response:  # not async: Starlette calls it in a thread
        return _json(answer(request))

    return endpoint


def _json(value: Any, status: int = 200) -> Response:
    return Response(encoded(value), status, media_type="application/json")


def encoded(value: Any) -> bytes:
    """JSON in ASCII, so that any text is whole; NaN is a mistake of ours."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


async def _refused(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    words = {404: "There is no such page.", 405: "This address is only read."}
    return _json({"error": words.get(status, "This cannot be answered.")}, status)


async def _damaged(request: Request, error: Exception) -> Response:
    print(f"qkscope: {error}", file=sys.stderr)
    return _json({"error": DAMAGED}, 500)


# Who may ask


class Guard:
    """Refuses foreign Host and Origin headers, and adds the security headers to every answer."""

    def __init__(self, app: ASGIApp, names: Sequence[str], any_address: bool) -> None:
        self.app, self.names, self.any_address = app, names, any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await (self._refusal(Headers(scope=scope)) or self.app)(scope, receive, guarded)

    def _refusal(self, headers: Headers) -> Response | None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not self._own(hosts[0]):
            return _json({"error": "This page is served under another name."}, 421)
        if any(origin.partition("://")[2] != hosts[0] for origin in origins):
            return _json({"error": "This page answers only itself."}, 403)
        return None

    def _own(self, host: str) -> bool:
        name = hostname(host)
        return name in self.names or (self.any_address and _is_address(name))


def hostname(host: str) -> str:
    """The name in a Host header, in lower case, without port and brackets; empty where it is none."""
    name, colon, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
    if colon and not port.isdecimal():
        return ""
    name = (name if colon else host).lower()
    if name.startswith("[") and name.endswith("]"):
        return name[1:-1]
    return "" if ":" in name else name


def _names(host: str) -> tuple[str, ...]:
    return (*OWN_NAMES, host.lower(), *((socket.gethostname().lower(),) if host in WILDCARDS else ()))


def _is_address(name: str) -> bool:
    """An address in numbers, which no name that resolves elsewhere can stand for."""
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False
