"""HTML and SVG as nested calls: text is escaped unless it is already :class:`Markup`, so that no name of a user can break the page."""

from __future__ import annotations

import html
import re

VOID = frozenset({"br", "hr", "input", "meta", "link", "wbr"})
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Text that is already HTML and is put into the page as it is."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """The text with HTML's special characters escaped and characters that no XML file may hold replaced."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(_FORBIDDEN.sub("�", str(text)), quote=True))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element, e.g. ``tag("td", "a < b", class_="number", data_label="x")``.

    Args:
        name: the element's name.
        children: escaped unless Markup; None is left out.
        attributes: a trailing underscore is dropped and the others become hyphens; None and False are left out, True stands alone.
    """
    written = "".join(
        _attribute(key, value) for key, value in attributes.items() if value is not None and value is not False
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: object) -> Markup:
    """The children one after the other, escaped unless Markup."""
    return Markup("".join(escape(child) for child in children if child is not None))


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-") if key != "viewBox" else key
    return f" {name}" if value is True else f' {name}="{escape(_short(value))}"'


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def section(name: str, title: str, *children: object) -> Markup:
    """A titled part of the page that the contents link to."""
    return tag("section", tag("h2", title), *children, id=name)
