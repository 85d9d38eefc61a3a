"""The documents of the house: what stands in them is tried as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


def blocks(document: str, language: str) -> dict[str, str]:
    """The fenced code blocks of one language in a document: {title, or position where it has none: text}."""
    text = (ROOT / document).read_text(encoding="utf-8")
    fence = r"^(?P<indent> *)```" + language + r"(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^(?P=indent)```$"
    fences = re.finditer(fence, text, re.M | re.S)
    return {f["title"] or str(i): re.sub(rf"^{f['indent']}", "", f["code"], flags=re.M) for i, f in enumerate(fences)}
