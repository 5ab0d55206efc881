# SPDX-License-Identifier: MIT
"""A look at the web pages while they are written: served on loopback, rebuilt when a source changes.

Serves from memory what `web.build` makes, with nothing of nginx' but the mapping of names. An open
page reloads itself after a change; the script for that is added here, the site itself has none. An
error of a source is shown as a page, until it is mended.
"""

from __future__ import annotations

import html
import mimetypes
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from chatmaild.config import ConfigError, explicit_values, read_settings

from . import web
from .component import load_components
from .errors import RenderError
from .paths import Paths
from .render import context

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.3
CHANGED = "/.changed"
_RELOAD = (
    f'<script>new EventSource("{CHANGED}").onmessage = () => location.reload()</script>'.encode()
)


class Pages:
    """The sites of all components as they would be published now."""

    def __init__(self, paths: Paths, version: str) -> None:
        self.paths = paths
        self.version = version
        self.components = [item for item in load_components(paths.components) if item.site]

    def build(self) -> dict[str, bytes]:
        """All files by name; raises ConfigError or RenderError."""
        config, _warnings = read_settings(self.paths.ini)
        values = context(config, explicit_values(self.paths.ini), self.version)
        files: dict[str, bytes] = {}
        for component in self.components:
            files |= web.build(self.paths, component, values)
        return files

    def sources(self) -> dict[str, Path]:
        """Where each file comes from; files that others use are among them."""
        found: dict[str, web.Source] = {}
        for component in self.components:
            found |= web.site_sources(self.paths, component)
        return {name: source.path for name, source in found.items()}

    def snapshot(self) -> object:
        """Something that is different after any source, or a setting, has changed."""
        state = []
        try:
            for path in (self.paths.ini, *self.sources().values()):
                info = path.stat()
                state.append((path, info.st_mtime_ns, info.st_size))
        except (OSError, RenderError) as error:
            return str(error)
        return state


class Preview(ThreadingHTTPServer):
    """Serves *pages* on loopback; port 0 takes a free one."""

    daemon_threads = True

    def __init__(self, pages: Pages, port: int) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.pages = pages
        self._files: dict[str, bytes] = {}
        self._built_of: object = None

    @property
    def url(self) -> str:
        """Where to look."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    def files(self) -> Mapping[str, bytes]:
        """The site as of now."""
        now = self.pages.snapshot()
        if now != self._built_of:
            self._files = self.pages.build()
            self._built_of = now
        return self._files


class _Handler(BaseHTTPRequestHandler):
    server: Preview

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == CHANGED:
            self._wait_for_change()
            return
        try:
            files = self.server.files()
        except (ConfigError, RenderError, OSError) as error:
            page = f"<!DOCTYPE html><title>Error</title><pre>{html.escape(str(error))}</pre>"
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "error.html", page.encode())
            return
        name = path.strip("/")
        for candidate in (name, f"{name}.html", f"{name}/index.html".lstrip("/")):
            if candidate in files:
                self._answer(HTTPStatus.OK, candidate, files[candidate])
                return
        self._answer(HTTPStatus.NOT_FOUND, "404.html", files.get("404.html", b""))

    def _answer(self, status: HTTPStatus, name: str, content: bytes) -> None:
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        if kind == "text/html":
            content += _RELOAD
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if "text/" in kind else kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def _wait_for_change(self) -> None:
        """One server-sent event at the next change of the sources."""
        before = self.server.pages.snapshot()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            while self.server.pages.snapshot() == before:
                self.wfile.write(b":\n\n")  # fails when the page is gone
                time.sleep(POLL_SECONDS)
            self.wfile.write(b"data: changed\n\n")
        except OSError:
            pass

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing: what is wrong is shown on the page."""
