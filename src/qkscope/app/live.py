"""The live view's part of the server: traces, accounts and edits of a prompt, as JSON.

    GET  api/prompt/examples    layers, ready prompts, the most tokens a prompt may have
    POST api/prompt/trace       {prompt, layer, head}                                  (AskTrace in prompts.py)
    POST api/prompt/edge        {prompt, layer, head, query, key?, against?}           (AskEdge)
    POST api/prompt/edit        {prompt, layer, head, position, edits}                (AskEdit)

One worker thread does all the work, so one request at a time reaches the model and the event loop stays free. What a
person got wrong is {"error": one line} with status 400; what went wrong in here is logged, and said without details.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ..errors import UserError
from .prompts import Ask, AskEdge, AskEdit, AskTrace, Prompts

MOST_BYTES = 64 * 1024  # of a request's body
SECONDS = 60.0  # after which a request is given up, the opening of the model included

_log = logging.getLogger(__name__)
_FOLDERS = re.compile(r"(?<![\w.])~?/(?:[^\s/'\"]+/)*(?=[^\s/'\"]+)")


def routes(folder: Path) -> list[Route]:
    """Routes for a finished run (or a layer of one); nothing is opened before the first request."""
    prompts = Prompts(folder)
    worker = ThreadPoolExecutor(1, thread_name_prefix="qkscope-live")

    async def answer(work: Callable[[], dict[str, Any]]) -> Response:
        try:
            # A request that has waited too long and has not begun leaves the queue; one that has begun ends unheard.
            return _json(await asyncio.wait_for(asyncio.wrap_future(worker.submit(work)), SECONDS))
        except UserError as error:
            return _problem(400, str(error))
        except TimeoutError:
            return _problem(503, f"no answer after {SECONDS:.0f} s: the model is still loading or busy; try again")
        except Exception:
            _log.exception("a request of the live view failed")
            return _problem(500, "something went wrong here; the server's log has the details")

    def post(kind: type[Ask], work: Callable[[Any], dict[str, Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            # A form of another site can't send this type without asking first.
            if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return _problem(415, "send application/json")
            body = await _body(request)
            if body is None:
                return _problem(413, f"the request is larger than {MOST_BYTES // 1024} KiB; shorten the prompt")
            try:
                asked = kind.model_validate(json.loads(body))
            except ValidationError as error:
                return _problem(400, _complaint(error))
            except (ValueError, RecursionError):
                return _problem(400, "the request is not JSON")
            return await answer(lambda: _opened(prompts) and work(asked))

        return endpoint

    async def examples(request: Request) -> Response:
        return await answer(lambda: _opened(prompts) and prompts.examples())

    return [
        Route("/api/prompt/examples", examples, methods=["GET"]),
        Route("/api/prompt/trace", post(AskTrace, prompts.trace), methods=["POST"]),
        Route("/api/prompt/edge", post(AskEdge, prompts.edge), methods=["POST"]),
        Route("/api/prompt/edit", post(AskEdit, prompts.edit), methods=["POST"]),
    ]


def _opened(prompts: Prompts) -> Any:
    """The run's layers; what hinders their opening is said without the folders of this machine."""
    try:
        return prompts.layers
    except UserError as error:
        raise UserError(_FOLDERS.sub("", str(error))) from None


async def _body(request: Request) -> bytes | None:
    """The request's body; None where it is too large, of which no more than that is read."""
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                return None
    except ClientDisconnect:
        return b""
    return body


def _complaint(error: ValidationError) -> str:
    """The first complaint: the field, what is wrong with it, and the value."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    value = "" if first["type"] in ("missing", "extra_forbidden") else f" (it is {first['input']!r:.60})"
    return f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}{value}" if name else "send an object"


def _problem(status: int, words: str) -> Response:
    return _json({"error": words}, status)


def _json(value: Any, status: int = 200) -> Response:
    """In ASCII, so that any text is whole."""
    return Response(json.dumps(value, allow_nan=False), status, media_type="application/json")
