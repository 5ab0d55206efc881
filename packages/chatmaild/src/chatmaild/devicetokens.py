# SPDX-License-Identifier: MIT
"""The device tokens of all users: what the notification server needs to wake a device.

Every device of a user has a token and sets it again and again; a token is forgotten when it was not
set for TOKEN_DAYS, or when the notification server says that it is gone. They are kept in the
mailbox, `metadata.json`: {"devicetoken": {token: unix time}}; the list of tokens that old relays wrote
is read as well. Who reads the tokens of a user takes expired ones out of the file.

Every method blocks for the disk and may be called by any thread. Changes of one user's file are made
one after another, and each is on disk when the call returns.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatmaild.users import MailStore

TOKEN_DAYS = 90
MAX_TOKENS = 32  # of one user; the ones set longest ago give way
MAX_FILE = 1 << 20  # bytes of a metadata.json we are ready to read

_FUTURE = 60  # seconds a clock may have been wrong
_LOCKS = 64
_TOKEN = re.compile(r"[!-~]{1,4096}\Z")

log = logging.getLogger("metadata")


def is_token(text: str) -> bool:
    """Whether *text* can be a device token: 1 to 4096 printable ASCII characters, no spaces."""
    return _TOKEN.match(text) is not None


class InvalidToken(ValueError):
    """A token that cannot be one, or of nobody; the text is fit for the log."""


class DeviceTokens:
    """The tokens of the accounts in *store*."""

    def __init__(self, store: MailStore, now: Callable[[], float] = time.time) -> None:
        self.store = store
        self.now = now
        self._locks = [threading.Lock() for _ in range(_LOCKS)]

    def get(self, user: str) -> list[str]:
        """The valid tokens of *user* in the order they were first set; [] for an unknown user."""
        try:
            path = self._path(user)
        except ValueError:
            return []
        data = _read(path)
        if self._tidy(data) != data:
            with self._lock(user):
                data = _read(path)
                tidy = self._tidy(data)
                if tidy != data:
                    _write(path, tidy)
        return list(self._valid(data))

    def add(self, user: str, token: str) -> None:
        """Note that a device of *user* has *token* now; raises InvalidToken and OSError."""
        if not is_token(token):
            raise InvalidToken("device token is not 1 to 4096 printable characters")
        try:
            known = self.store.exists(user)
            path = self._path(user)
        except ValueError:
            known = False
        if not known:
            raise InvalidToken("device token of an unknown user")
        with self._lock(user):
            data = _read(path)
            tokens = self._valid(data)
            tokens[token] = int(self.now())
            while len(tokens) > MAX_TOKENS:
                del tokens[min(tokens, key=lambda item: tokens[item])]
            _write(path, {**data, "devicetoken": tokens})

    def remove(self, user: str, token: str) -> None:
        """Forget a token; one that is not there, or of an account that vanished, is no error."""
        try:
            path = self._path(user)
        except ValueError:
            return
        with self._lock(user):
            data = _read(path)
            if token in _times(data, 0):
                _write(path, _without(data, {token}))

    def _path(self, user: str) -> Path:
        return self.store.mailbox_path(user) / "metadata.json"

    def _lock(self, user: str) -> threading.Lock:
        return self._locks[hash(user) % _LOCKS]

    def _valid(self, data: dict[str, Any]) -> dict[str, int]:
        now = int(self.now())
        return {
            token: int(when)
            for token, when in _times(data, now).items()
            if now - TOKEN_DAYS * 86400 <= when <= now + _FUTURE
        }

    def _tidy(self, data: dict[str, Any]) -> dict[str, Any]:
        """*data* without expired tokens; those of an old relay's list are 90 days old in 90 days."""
        if isinstance(data.get("devicetoken"), list):
            return {**data, "devicetoken": self._valid(data)}
        expired = self._expired(data)
        return _without(data, expired) if expired else data

    def _expired(self, data: dict[str, Any]) -> set[str]:
        """Tokens not set for long. Those of the future stay: this clock may be the wrong one."""
        now = int(self.now())
        return {
            token for token, when in _times(data, now).items() if when < now - TOKEN_DAYS * 86400
        }


def _times(data: dict[str, Any], now: int) -> dict[str, float]:
    """All that looks like a token, and when it was set."""
    tokens = data.get("devicetoken", {})
    if isinstance(tokens, list):  # relays before 2025 wrote no times
        tokens = {token: now for token in tokens if isinstance(token, str)}
    if not isinstance(tokens, dict):
        return {}
    return {
        token: when
        for token, when in tokens.items()
        if isinstance(when, (int, float)) and is_token(token)
    }


def _without(data: dict[str, Any], removed: set[str]) -> dict[str, Any]:
    tokens = data["devicetoken"]
    if isinstance(tokens, list):
        left: Any = [token for token in tokens if token not in removed]
    else:
        left = {token: when for token, when in tokens.items() if token not in removed}
    return {**data, "devicetoken": left}


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = json.loads(file.read(MAX_FILE))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError):
        log.warning("a damaged metadata.json starts anew")
        return {}
    return data if isinstance(data, dict) else {}


def _write(path: Path, data: dict[str, Any]) -> None:
    temporary = path.with_name("metadata.json.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(data, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
