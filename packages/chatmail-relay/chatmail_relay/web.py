# SPDX-License-Identifier: MIT
"""The web site: a folder of sources in, published files out. Nothing on disk is changed here.

The operator's folder lies over the relay's: a file there replaces ours that is published under the
same name, or is one more. The name says what becomes of a file:

    page.md        jinja2, then markdown, then inside _layout.html -> page.html
    name.j2        jinja2 -> name
    _name          used by the others, not published
    .name  name~   ignored, but for .well-known
    name           published as it is

What renders to nothing is not published. Values of settings are never taken for markdown or HTML.
Texts get a compressed copy beside them, which nginx sends as it is.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markdown
from chatmaild import qr
from markupsafe import Markup, escape

from .component import Component
from .errors import RenderError, naming_the_place
from .paths import Paths

LAYOUT = "_layout.html"
MAX_FILE = 16 * 2**20  # bytes; everything is held in memory
TEXTS = {".css", ".html", ".js", ".json", ".svg", ".txt", ".xml"}
MIN_COMPRESSED = 1024  # bytes; less is one packet anyway
_HIDDEN = re.compile(r"(?:^|/)\.(?!well-known(?:/|$))|~$")
_STASHED = re.compile("\ue000([0-9]+)\ue001")  # private use: no meaning in markdown


@dataclass(frozen=True)
class Source:
    """One file of one of the two folders; *name* is what it is published as, and its place."""

    name: str
    path: Path

    @property
    def is_published(self) -> bool:
        """Whether it is a file of the site, not a part of others."""
        return not self.path.name.startswith("_")


@dataclass(frozen=True)
class Page:
    """A page before it is laid out; *menu* is its place in the menu, None if it is not there."""

    source: Source
    title: str
    menu: int | None
    content: str


def sources(folder: Path) -> dict[str, Source]:
    """The files of one folder by the name they are published as; {} if there is none."""
    found: dict[str, Source] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if _HIDDEN.search(name) or not path.is_file() or name == "component.toml":
            continue
        if not path.name.startswith("_"):
            name = re.sub(r"\.md$", ".html", name).removesuffix(".j2")
        if name in found:
            raise RenderError(f"{path}: {found[name].path.name} makes {name} too; remove one")
        found[name] = Source(name, path)
    return found


def build(paths: Paths, component: Component, values: dict[str, Any]) -> dict[str, bytes]:
    """The published files of *component*'s site by name; raises RenderError with file and line."""
    return _Builder(site_sources(paths, component), values).build()


def site_sources(paths: Paths, component: Component) -> dict[str, Source]:
    """The sources of both folders, the operator's over the relay's."""
    assert component.site is not None
    return sources(component.folder) | sources(paths.real(component.site.overrides))


def overrides(paths: Paths, components: list[Component]) -> list[Path]:
    """The operator's files that are part of a site."""
    folders = [paths.real(item.site.overrides) for item in components if item.site]
    return [source.path for folder in folders for source in sources(folder).values()]


class _Builder:
    def __init__(self, found: dict[str, Source], values: dict[str, Any]) -> None:
        self.sources = found
        self.files: dict[str, bytes] = {}
        self.stash: list[str] = []
        self.plain = self._environment()
        self.pages = self._environment(finalize=self._hide)
        # "config" as in the pages of older relays
        self.values = values | {"config": values, "qr": _qr, "asset": self._asset}

    def _environment(self, **more: Any) -> jinja2.Environment:
        environment = jinja2.Environment(
            loader=jinja2.FunctionLoader(self._load),
            undefined=jinja2.StrictUndefined,
            autoescape=lambda name: bool(name and re.search(r"\.(html|svg|xml)(\.j2)?$", name)),
            keep_trailing_newline=True,
            trim_blocks=True,
            lstrip_blocks=True,
            **more,
        )
        environment.filters |= {"days": days, "size": size}
        return environment

    def build(self) -> dict[str, bytes]:
        published = [item for item in self.sources.values() if item.is_published]
        pages = [item for item in published if item.path.suffix == ".md"]
        for source in published:
            if source not in pages:
                self._publish(source, self._file(source))
        self._lay_out([page for page in map(self._page, pages) if page.content])
        for name, content in list(self.files.items()):
            if Path(name).suffix in TEXTS and len(content) >= MIN_COMPRESSED:
                self.files.setdefault(f"{name}.gz", gzip.compress(content, mtime=0))
        return self.files

    def _publish(self, source: Source, content: bytes) -> None:
        if content:
            self.files[source.name] = content

    def _file(self, source: Source) -> bytes:
        if source.path.suffix == ".j2":
            return self._render(self.plain, source).encode()
        return _read(source.path)

    def _page(self, source: Source) -> Page:
        text = self._render(self.pages, source)
        converter = markdown.Markdown(extensions=["attr_list", "md_in_html", "meta", "tables"])
        content = converter.convert(text)
        meta: dict[str, list[str]] = converter.Meta  # type: ignore[attr-defined]
        title = self._show(" ".join(meta.get("title", [str(self.values["mail_host"])])))
        menu = " ".join(meta.get("menu", []))
        if menu and not menu.isdecimal():
            raise RenderError(f"{source.path}: menu: {menu}: write a number, its place in the menu")
        return Page(source, title, int(menu) if menu else None, self._show(content))

    def _lay_out(self, pages: list[Page]) -> None:
        menu = sorted((page for page in pages if page.menu is not None), key=_menu_order)
        items = [(f"/{page.source.name}", Markup(page.title)) for page in menu]
        if pages and LAYOUT not in self.sources:
            raise RenderError(f"{LAYOUT}: not there, and pages need it")
        for page in pages:
            text = self._render(
                self.plain,
                self.sources[LAYOUT],
                title=Markup(page.title),
                content=Markup(page.content),
                menu=items,
                here=f"/{page.source.name}",
            )
            self._publish(page.source, text.encode())

    def _render(self, environment: jinja2.Environment, source: Source, **more: Any) -> str:
        with naming_the_place(str(source.path)):
            text = environment.get_template(source.name).render(self.values, **more)
        return text if text.strip() else ""

    def _load(self, name: str) -> tuple[str, str, None] | None:
        source = self.sources.get(name)
        return None if source is None else (_text(source.path), str(source.path), None)

    def _hide(self, value: object) -> object:
        """Keep a text away from markdown: a token in its place, which `_show` replaces."""
        if not isinstance(value, str) or isinstance(value, Markup):
            return value
        self.stash.append(value)
        return f"\ue000{len(self.stash) - 1}\ue001"

    def _show(self, text: str) -> str:
        return _STASHED.sub(lambda match: str(escape(self.stash[int(match[1])])), text)

    def _asset(self, name: str) -> str:
        """The address of a published file, with a query that changes when the file does."""
        if name not in self.files:
            raise jinja2.TemplateRuntimeError(f"{name} is not among the files of the site")
        return f"/{name}?{hashlib.sha256(self.files[name]).hexdigest()[:8]}"


def _menu_order(page: Page) -> tuple[int, str]:
    return page.menu or 0, page.source.name


def _qr(text: str) -> Markup:
    return Markup(qr.svg(text))


def days(number: int) -> str:
    """A number of days in words."""
    return "one day" if number == 1 else f"{number} days"


def size(count: int) -> str:
    """A number of bytes for people: whole MB, or GB with at most one decimal."""
    if count >= 2**30:
        return f"{round(count / 2**30, 1):g} GB"
    return f"{count // 2**20} MB"


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_FILE:
        raise RenderError(f"{path}: larger than {MAX_FILE // 2**20} MB; publish it elsewhere")
    return path.read_bytes()


def _text(path: Path) -> str:
    content = _read(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RenderError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from error
