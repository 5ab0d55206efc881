# SPDX-License-Identifier: MIT
"""Changes of the settings file: in place, comments kept, and only if the result is valid."""

import os

from chatmaild.config import (
    FIELDS,
    ConfigError,
    Problem,
    default_ini,
    edit_ini,
    explicit_values,
    read_settings,
)

from .paths import Paths
from .transaction import Change, write_file


def change_settings(paths: Paths, wanted: dict[str, str]) -> tuple[dict[str, str], list[Problem]]:
    """Write *wanted* into the file; what was changed, and warnings. Raises ConfigError.

    A missing mail domain alone is no problem but the unconfigured state.
    """
    exists = paths.ini.exists()
    old = paths.ini.read_text(encoding="utf-8") if exists else default_ini()
    explicit = explicit_values(paths.ini, old)
    changes = {
        key: value
        for key, value in wanted.items()
        if explicit.get(key) != value and not _is_default(key, value, explicit)
    }
    new = edit_ini(old, changes)
    warnings = _validate(paths, new)
    if new != old or not exists:
        os.makedirs(paths.ini.parent, 0o755, exist_ok=True)
        write_file(Change(paths.ini, new.encode(), 0o644))
    return changes, warnings


def _is_default(key: str, value: str, explicit: dict[str, str]) -> bool:
    """Whether setting *key* to *value* would only spell out its default."""
    return (
        key in FIELDS and key not in explicit and (FIELDS[key].metadata["default"] or "") == value
    )


def _validate(paths: Paths, text: str) -> list[Problem]:
    try:
        return read_settings(paths.ini, text)[1]
    except ConfigError as error:
        problems = [p for p in error.problems if not (p.key == "mail_domain" and not p.value)]
        if problems:
            raise ConfigError(problems) from None
        return []
