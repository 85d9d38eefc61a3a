"""The HTML report: one self-contained file that needs no network, no font and no library."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from polytask.errors import StorageError
from polytask.report import comparison, conflict, context, courses
from polytask.report.markup import Markup, tag
from polytask.report.reading import Results, check
from polytask.report.verdict import verdict

# the browser itself is told to load nothing from anywhere
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
CONTENTS = ("results", "methods", "curves", "weights", "interference", "groupings", "data", "cost", "replay")


def write_html(results: Results, path: str | os.PathLike[str]) -> Path:
    """Write the report of a run.

    Args:
        results: what stands in ``results.json`` (schema 1).
        path: the file to write, by convention ``report.html`` in the run's folder; the folder's name stands in the
            commands that the page shows.

    Returns:
        The path written.

    Raises:
        InputError: the results lack a part that every run has, or have an unknown schema.
        StorageError: the file cannot be written; an older report at the path is left as it was.
    """
    target = Path(path)
    return put(page(results, run=target.resolve().parent.name), target)


def put(text: str, target: Path) -> Path:
    """Write a page beside its place first, so that there is always a whole one.

    Raises:
        StorageError: it cannot be written; an older page is left as it was.
    """
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise StorageError(f"the report {target} cannot be written: {error.strerror or error}") from error
    return target


def page(results: Results, run: str = "RUN") -> str:
    """The report as text.

    Args:
        results: what stands in ``results.json``.
        run: the run's folder, as the commands on the page name it.

    Raises:
        InputError: the results lack a part that every run has, or have an unknown schema.
    """
    check(results)
    main = tag(
        "main",
        verdict(results),
        comparison.results_table(results),
        comparison.methods(results),
        courses.learning_curves(results),
        courses.weight_curves(results),
        conflict.interference(results),
        context.groupings(results),
        context.data_and_budget(results),
        context.cost(results),
        context.replay(results, run),
    )
    source = (results.get("data") or {}).get("source")
    return document(main, CONTENTS, source, f"polytask: {source or run}", str(results.get("polytask", "")))


def document(main: Markup, contents: Sequence[str], source: str | None, title: str, version: str) -> str:
    """A whole page around its main part: style and script within it, contents that link to its sections."""
    made = f"Made by polytask {version}. This page is one file and loads nothing."
    body = tag("body", _header(source, contents), main, tag("footer", made), tag("script", Markup(_own("script.js"))))
    return f"<!doctype html>\n{tag('html', _head(title), body, lang='en')}\n"


def _head(title: str) -> Markup:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        tag("style", Markup(_own("style.css"))),
    )


def _header(source: str | None, contents: Sequence[str]) -> Markup:
    brand = tag(
        "div",
        tag("b", "polytask"),
        " report",
        tag("span", source, class_="quiet source") if source else None,
        class_="brand",
    )
    links = tag("nav", *(tag("a", name.capitalize(), href=f"#{name}") for name in contents), aria_label="Contents")
    return tag("header", brand, links)


def _own(name: str) -> str:
    return files("polytask.report").joinpath(name).read_text(encoding="utf-8")
