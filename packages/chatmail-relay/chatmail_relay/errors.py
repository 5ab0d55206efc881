# SPDX-License-Identifier: MIT
"""Errors that several modules raise; those of templates with their place."""

import contextlib
from collections.abc import Iterator

import jinja2


class CertificateError(Exception):
    """A certificate and key that cannot be served: says which file, and why."""


class RenderError(Exception):
    """A template, ours or the operator's override, does not render."""


class StateError(Exception):
    """What is kept is not for this version: says why, and what to do."""


@contextlib.contextmanager
def naming_the_place(fallback: str) -> Iterator[None]:
    """Turns what goes wrong in a template into a RenderError with file and line, or *fallback*."""
    try:
        yield
    except RenderError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise RenderError(
            f"{error.filename or fallback}:{error.lineno}: {error.message}"
        ) from error
    except Exception as error:
        place = _place(error)
        if not place and not isinstance(error, jinja2.TemplateError):
            raise  # a defect of ours
        raise RenderError(f"{place or fallback}: {error}") from error


def _place(error: Exception) -> str:
    """File and line of the template that raised *error*; "" if none did."""
    place = ""
    step = error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if not name.startswith("<") and not name.endswith(".py"):
            place = f"{name}:{step.tb_lineno}"
        step = step.tb_next
    return place
