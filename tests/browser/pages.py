"""Servers of this process for a browser to open, and the moment a view is there."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from qkscope.app.server import configured, listen, make_app


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The run's page on a server of this process; its address."""
    listener = listen("127.0.0.1", 0)
    running = uvicorn.Server(configured(make_app(folder)))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        running.should_exit = True
        thread.join()
        listener.close()


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: Any) -> None:
        pass


@contextlib.contextmanager
def hosting(folder: Path) -> Iterator[str]:
    """Files of a folder on a plain web host; its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(folder))) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_address[1]}/"
        finally:
            running.shutdown()
            thread.join()


def shown(tab: Any, hash_: str | None = None) -> None:
    """Wait until the view of the page's address (or of this one) is drawn."""
    tab.wait_for_function("hash => document.body.dataset.shown === (hash ?? location.hash)", arg=hash_)
