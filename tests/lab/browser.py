# SPDX-License-Identifier: MIT
"""Debian's Chromium at the lab's client, spoken to by the DevTools protocol over a pair of pipes.

It runs in a tree of its own (tools/chatmail_build/trees.py). Whatever name a page asks for, the lab's
name server is asked, and there is no way out: a request elsewhere fails, and is in `View.requests`.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import selectors
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatmail_build import sandbox, trees
from chatmail_build.paths import BUILD, CACHE

from .lab import Lab
from .shell import LabError

SECONDS = 60  # for one answer; the first takes a few
SCREENSHOTS = BUILD / "screenshots"

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    " --disable-background-networking --disable-component-update --hide-scrollbars"
    " --ignore-certificate-errors --remote-debugging-pipe --user-data-dir=/tmp/profile"
).split()


@dataclass(frozen=True)
class View:
    """A page as it was seen: lengths in CSS pixels, *errors* of console, loading and scripts."""

    picture: Path
    width: int
    title: str
    requests: list[str]
    errors: list[str]


class Browser:
    """A running Chromium; see `browser`."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes = reads, writes
        self._buffer = b""
        self._numbers = itertools.count(1)
        self._selector = selectors.DefaultSelector()
        self._selector.register(reads, selectors.EVENT_READ)

    def look(
        self, url: str, name: str, *, width: int, dark: bool = False, scripts: bool = True
    ) -> View:
        """Open *url* in a window of *width* and keep the picture as build/screenshots/*name*.png."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        events: list[dict[str, Any]] = []

        def call(method: str, **parameters: Any) -> dict[str, Any]:
            return self._call(method, session, events, **parameters)

        for domain in ("Page", "Network", "Log", "Runtime"):
            call(f"{domain}.enable")
        call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=2 if width < 600 else 1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        call("Emulation.setEmulatedMedia", features=[scheme])
        call("Emulation.setScriptExecutionDisabled", value=not scripts)
        problem = call("Page.navigate", url=url).get("errorText")
        if problem:
            raise LabError(f"{url}: {problem}")
        while not any(event["method"] == "Page.loadEventFired" for event in events):
            events.append(self._receive())
        size = call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}
        shot = call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        history = call("Page.getNavigationHistory")
        self._call("Target.closeTarget", targetId=target)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        picture = SCREENSHOTS / f"{name}.png"
        picture.write_bytes(base64.b64decode(shot["data"]))
        return View(
            picture,
            size["width"],
            history["entries"][history["currentIndex"]]["title"],
            [
                event["params"]["request"]["url"]
                for event in events
                if event["method"] == "Network.requestWillBeSent"
            ],
            [json.dumps(event["params"]) for event in events if _is_error(event)],
        )

    def _call(
        self,
        method: str,
        session: str | None = None,
        events: list[dict[str, Any]] | None = None,
        **parameters: Any,
    ) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                if "error" in answer:
                    raise LabError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            if events is not None and "method" in answer:
                events.append(answer)

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            if not self._selector.select(max(0, end - time.monotonic())):
                raise LabError(f"Chromium said nothing for {SECONDS} s")
            data = os.read(self._reads, 1 << 20)
            if not data:
                raise LabError("Chromium has ended")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


def _is_error(event: dict[str, Any]) -> bool:
    method, parameters = event["method"], event["params"]
    return (
        method in ("Runtime.exceptionThrown", "Network.loadingFailed")
        or (method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"))
        or (method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"))
    )


@contextlib.contextmanager
def browser(lab: Lab, folder: Path) -> Iterator[Browser]:
    """A Chromium at the lab's client; *folder* takes its log."""
    resolv_conf = folder / "resolv.conf"
    resolv_conf.write_text(f"nameserver {lab.dns.address}\n")
    with contextlib.ExitStack() as stack, trees.tree("browser") as tree:
        to_read, to_write = os.pipe()
        from_read, from_write = os.pipe()
        for end in (to_read, to_write, from_read, from_write):
            stack.callback(os.close, end)
        # not 3 and 4, which they become inside
        command_in, command_out = (
            fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read, from_write)
        )
        script = f'exec "$@" 3<&{command_in} 4>&{command_out}'
        spec = sandbox.Spec(
            str(tree),
            ["bash", "-c", script, "bash", "/usr/bin/chromium", *_FLAGS],
            [sandbox.Bind(str(resolv_conf), "/etc/resolv.conf")],
            scratch=str(CACHE / "mnt"),
        )
        with (folder / "chromium.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    "nsenter",
                    f"--net={lab.client.path}",
                    *sandbox.command(spec, network=True),
                ],
                pass_fds=(command_in, command_out),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        os.close(command_in)
        os.close(command_out)
        lab.state.record_process(process.pid)
        try:
            yield Browser(from_read, to_write)
        finally:
            process.kill()  # unshare; its child, process 1 of the namespace, dies with it
            process.wait()
