# SPDX-License-Identifier: MIT
"""The newest versions of clients, for METADATA /shared/vendor/deltachat/appversions.

Clients tell their users of an update by what their relay says. The relay itself knows of none: the
operator may say them in PATH, JSON, exactly these keys, and every id once in its list:

    {"clients": [{"clientId": "...",
                  "sources": [{"sourceId": "...", "versionInteger": 1, "versionString": "...",
                               "downloadUrl": "https://download.delta.chat/..."}]}]}

A version is a number of 32 bits, a download comes from the makers of Delta Chat (URL_PREFIXES).
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

PATH = Path("/etc/chatmail/appversions.json")
MAX_BYTES = 16384  # also of the answer, which is one line of Dovecot's dict protocol
URL_PREFIXES = ("https://github.com/deltachat/", "https://download.delta.chat/")

_URL = re.compile(r"[!-~]+\Z")

log = logging.getLogger("metadata")


class Invalid(ValueError):
    """The file must not be told to clients; the text names file, place, and what is wrong."""


def read(path: Path = PATH) -> str | None:
    """The content as one line of JSON; None if there is no such file. Raises Invalid."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Invalid(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise Invalid(f"{path}: larger than {MAX_BYTES} bytes")
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_repetition)
        _check(data)
    except json.JSONDecodeError as error:
        raise Invalid(f"{path}:{error.lineno}: no JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{path}: {error}") from error
    line = json.dumps(data, separators=(",", ":"))
    if len(line) > MAX_BYTES:
        raise Invalid(f"{path}: larger than {MAX_BYTES} bytes in ASCII")
    return line


class AppVersions:
    """The file as it is now, read again when it was changed. A bad one is logged once."""

    def __init__(self, path: Path = PATH) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._value: str | None = None

    def value(self) -> str | None:
        """What to tell clients; None if there is no file, or no valid one."""
        try:
            status = os.stat(self._path)
            now: tuple[int, ...] = (status.st_mtime_ns, status.st_size, status.st_ino)
        except OSError:
            now = ()
        if now != self._seen:
            self._seen = now
            self._value = None
            try:
                self._value = read(self._path)
            except Invalid as error:
                log.warning("%s; clients are told no versions", error)
        return self._value


def _no_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"a key stands twice: {_first_repeated(keys)!r}")
    return dict(pairs)


def _check(data: Any) -> None:
    clients = _object(data, "the file", ("clients",))["clients"]
    names = []
    for number, client in enumerate(_list(clients, "clients")):
        place = f"clients[{number}]"
        _object(client, place, ("clientId", "sources"))
        names.append(_string(client["clientId"], f"{place}.clientId"))
        ids = []
        for index, source in enumerate(_list(client["sources"], f"{place}.sources")):
            where = f"{place}.sources[{index}]"
            ids.append(_source(source, where))
        _unique(ids, f"{place}.sources", "sourceId")
    _unique(names, "clients", "clientId")


def _source(source: Any, place: str) -> str:
    keys = ("sourceId", "versionInteger", "versionString", "downloadUrl")
    _object(source, place, keys)
    version = source["versionInteger"]
    if type(version) is not int or not 0 <= version < 1 << 32:
        raise ValueError(f"{place}.versionInteger is not a number from 0 to {(1 << 32) - 1}")
    _string(source["versionString"], f"{place}.versionString")
    url = _string(source["downloadUrl"], f"{place}.downloadUrl")
    if not url.startswith(URL_PREFIXES):
        raise ValueError(f"{place}.downloadUrl does not begin with {' or '.join(URL_PREFIXES)}")
    if not _URL.match(url) or ".." in re.split("[/\\\\]", url):  # which may lead elsewhere
        raise ValueError(f"{place}.downloadUrl is not a plain URL")
    return _string(source["sourceId"], f"{place}.sourceId")


def _object(value: Any, place: str, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(keys):
        raise ValueError(f"{place} is not an object with the keys {', '.join(keys)}")
    return value


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{place} is not a list")
    return value


def _string(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{place} is not a text")
    return value


def _unique(names: list[str], place: str, key: str) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"{place}: {key} {_first_repeated(names)!r} stands twice")


def _first_repeated(names: list[str]) -> str:
    return next(name for index, name in enumerate(names) if name in names[:index])
