# SPDX-License-Identifier: MIT
"""A relay that was installed without systemd, in an image, and boots later: what it is told from outside.

An image has everything rendered and no key: each machine that boots from it makes its own. Settings come
from environment variables of the container (CHATMAIL_MAIL_DOMAIN, ...) or from systemd credentials
(chatmail.mail_domain, ...; systemd.exec(5)); a credential wins over a variable, both over the file, into
which they are written. docs/container.md tells administrators of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from chatmaild.config import FIELDS, ConfigError, Problem

from .apply import NotConfigured, Plan, apply, image_mark, is_configured
from .paths import Paths
from .settings import change_settings
from .store import adopt

VARIABLE = "CHATMAIL_"
CREDENTIAL = "chatmail."
MAX_SIZE = 65536  # bytes of one credential; a setting is a line or two


@dataclass(frozen=True)
class Given:
    """One setting from outside; *source* is the variable or the credential, for messages."""

    value: str
    source: str


def given(environ: Mapping[str, str]) -> dict[str, Given]:
    """All settings that come from outside, by key. Raises ConfigError if one is none."""
    found = {}
    for key in FIELDS:
        name = f"{VARIABLE}{key.upper()}"
        if name in environ:
            found[key] = Given(environ[name].strip(), name)
    problems = []
    for path in _credentials(environ):
        key, source = path.name.removeprefix(CREDENTIAL), f"credential {path.name}"
        with path.open("rb") as file:
            data = file.read(MAX_SIZE + 1)
        if key not in FIELDS:
            problems.append(_problem(source, "", "unknown setting", "See chatmail.ini(5)"))
        elif len(data) > MAX_SIZE:
            remedy = f"Write at most {MAX_SIZE} bytes"
            problems.append(_problem(source, "", "too long for a setting", remedy))
        else:
            try:
                found[key] = Given(data.decode().strip(), source)
            except UnicodeDecodeError:
                problems.append(_problem(source, "", "not UTF-8", "Write plain text"))
    if problems:
        raise ConfigError(problems)
    return found


def _credentials(environ: Mapping[str, str]) -> list[Path]:
    """The files of our credentials: systemd puts them where the variable says."""
    folder = environ.get("CREDENTIALS_DIRECTORY")
    return sorted(Path(folder).glob(f"{CREDENTIAL}*")) if folder else []


def _problem(source: str, value: str, message: str, remedy: str) -> Problem:
    return Problem(source, None, "", value, message, remedy)


def configure(paths: Paths, version: str, environ: Mapping[str, str]) -> tuple[list[str], Plan]:
    """At boot, before anything of the relay starts: settings from outside, keys, rendering.

    Returns the settings that were changed, and what was done. Without settings from outside only a fresh
    image is looked at: elsewhere the configuration in force stays. Raises NotConfigured, ConfigError
    that names the variable or the credential, and what apply raises; the file is then as before.
    """
    outside = given(environ)
    try:
        changed, _warnings = (
            change_settings(paths, {key: item.value for key, item in outside.items()})
            if outside
            else ({}, [])
        )
    except ConfigError as error:
        raise ConfigError([_named(problem, outside) for problem in error.problems]) from None
    if not is_configured(paths):
        raise NotConfigured
    adopt(paths)
    if not outside and not os.path.exists(image_mark(paths)):
        return [], Plan.nothing()
    plan = apply(paths, version, boot=True)
    image_mark(paths).unlink(missing_ok=True)
    return sorted(changed), plan


def _named(problem: Problem, outside: dict[str, Given]) -> Problem:
    """*problem* with the place from which the value came."""
    if problem.key not in outside:
        return problem
    return problem._replace(path=outside[problem.key].source, line=None)
