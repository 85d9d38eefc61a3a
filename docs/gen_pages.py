"""Pages made from the code while the site is built: one a registered method, one a public package, the command line."""

from __future__ import annotations

import inspect
import pkgutil
import sys
from pathlib import Path

import mkdocs_gen_files

import polytask
from polytask import registry

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))

from rest_docstrings import to_markdown  # noqa: E402


def write(path: str, text: str) -> None:
    """Add one page to the site."""
    with mkdocs_gen_files.open(path, "w") as page:
        page.write(text.rstrip() + "\n")


def method_page(method: registry.Method) -> str:
    """Everything the registry knows of a method, and its docstring."""
    options = [n if d is inspect.Parameter.empty else f"{n}={d!r}" for n, d in method.options.items()]
    facts = {
        "family": method.family,
        "needs": method.needs,
        "paper": method.paper,
        "also called": ", ".join(f"`{a}`" for a in method.aliases),
        "options": ", ".join(f"`{o}`" for o in options),
        "tested to be": ", ".join(method.invariances),
        "exempt from": "; ".join(f"{test}: {reason}" for test, reason in method.exempt.items()),
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value]
    source = Path(inspect.getfile(method.factory)).read_text(encoding="utf-8")
    table = "\n".join([rows[0], "| --- | --- |", *rows[1:]])
    return f"""# {method.name}

{table}

::: {method.factory.__module__}.{method.factory.__qualname__}
    options:
      members: false
      show_bases: false
      show_signature: false

{usage(method)}
??? "The whole file"
    ```python
{"".join("    " + line for line in source.splitlines(keepends=True))}
    ```
"""


def usage(method: registry.Method) -> str:
    """The one line that uses a balancing method; other families are described by their docstrings alone."""
    if method.family != "balancing":
        return ""
    return f'```python\npolytask.backward(losses, balancer="{method.name}")\n```\n'


def methods_pages() -> None:
    """One page a method and the table of all."""
    rows = []
    for method in registry.methods():
        write(f"methods/{method.name}.md", method_page(method))
        rows.append(
            f"| [{method.name}]({method.name}.md) | {method.family} | {method.needs} | {method.paper} | {to_markdown(method.summary)} |"
        )
    head = "# Methods\n\nEvery registered method, as `polytask methods` lists them.\n\n"
    head += "| name | family | needs | paper | |\n| --- | --- | --- | --- | --- |\n"
    write("methods/index.md", head + "\n".join(rows))
    write(
        "methods/SUMMARY.md",
        "\n".join(["* [All](index.md)", *(f"* [{m.name}]({m.name}.md)" for m in registry.methods())]),
    )


def api_pages() -> None:
    """One page a public package, written by mkdocstrings from its docstrings."""
    names = ["polytask.registry", "polytask.errors"]
    names += [f"polytask.{m.name}" for m in pkgutil.iter_modules(polytask.__path__) if m.ispkg and m.name != "commands"]
    for name in names:
        write(f"api/{name}.md", f"# {name}\n\n::: {name}\n")
    write("api/index.md", "# API\n\n" + "\n".join(f"- [`{n}`]({n}.md)" for n in names))
    write("api/SUMMARY.md", "\n".join(["* [All](index.md)", *(f"* [{n}]({n}.md)" for n in names)]))


def command_page() -> None:
    """The help of every command, as the terminal shows it."""
    import typer

    from polytask.cli import app
    from polytask.commands import merge_compare
    from polytask.commands.failures import EXIT_CODES

    group = typer.main.get_command(app)
    parts = ["# Command line", "", "```text", "polytask COMMAND --help", "```", ""]
    commands = dict(group.commands)  # type: ignore[attr-defined]
    for name, command in {**commands, "merge compare": merge_compare.command()}.items():
        parts += [
            f"## polytask {name}",
            "",
            inspect.cleandoc(command.help or ""),
            "",
            "| option | what it does |",
            "| --- | --- |",
        ]
        for option in command.params:
            spelled = (
                ", ".join(f"`{o}`" for o in option.opts)
                if option.param_type_name == "option"
                else f"`{option.metavar or option.name.upper()}`"
            )
            if "--help" not in spelled:
                parts.append(f"| {spelled} | {(option.help or '').replace('|', chr(92) + '|')} |")
        parts.append("")
    parts += [
        "## Exit codes",
        "",
        "| code | meaning |",
        "| --- | --- |",
        *(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()),
    ]
    write("cli.md", "\n".join(parts))


def documents() -> None:
    """The documents at the root of the repository, their links to one another led to their places in the site."""
    places = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
    for source, page in places.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, place in places.items():
            text = text.replace(f"]({other})", f"]({place})")
        write(page, text)


documents()
methods_pages()
api_pages()
command_page()
