"""The little reStructuredText in our docstrings, read by the documentation: formulas become MathML, roles become code."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert

BLOCK = re.compile(
    r"^(?P<indent>[ ]*)\.\. math::(?P<first>[^\n]*)\n(?P<rest>(?:(?P=indent)[ ]+[^\n]*\n|[ ]*\n)*)", re.MULTILINE
)
INLINE = re.compile(r":math:`([^`]+)`")
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([^`]+)`")


def to_markdown(docstring: str) -> str:
    """The docstring with every formula as MathML and every role as inline code."""
    text = BLOCK.sub(lambda m: _block(m["indent"], m["first"] + "\n" + m["rest"]), docstring + "\n")
    text = INLINE.sub(lambda m: _mathml(m[1], "inline"), text)
    return ROLE.sub(r"`\1`", text).rstrip("\n")


def _block(indent: str, source: str) -> str:
    return f"{indent}{_mathml(' '.join(textwrap.dedent(source).split()), 'block')}\n\n"


def _mathml(source: str, display: str) -> str:
    # markdown reads what stands between tags: its own characters go through as entities
    made: str = convert(source, display=display)
    return made.replace("*", "&#42;").replace("_", "&#95;")


class RestDocstrings(Extension):
    """Rewrites every docstring as it is collected."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
