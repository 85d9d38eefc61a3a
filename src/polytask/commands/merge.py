"""``polytask merge``: several fine-tuned models on disk, one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polytask.commands.console import AsJson, err, out, print_json, table
from polytask.commands.deferred import defer
from polytask.commands.failures import Interrupted

if TYPE_CHECKING:
    from polytask.merging.on_disk import MergePlan
    from polytask.merging.proxy import Proxy
    from polytask.merging.routing import Routing

METHOD = "task_arithmetic"
NAMED = 3
"""How many names of tensors a sentence lists."""

Paths = Annotated[
    list[Path],
    typer.Argument(
        metavar="CONFIG.yml OUT | BASE EXPERT...",
        help="A file in mergekit's language and the result's folder; or the base and its fine-tuned experts, paths or names on the hub.",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="An option of the method; several numbers, one an expert, with commas: --set weights=1,0.5.",
        show_default=False,
    ),
]


def merge(
    paths: Paths,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="As `polytask methods --family merging` lists them.")
    ] = METHOD,
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The folder of the merged model.", show_default=False)
    ] = None,
    settings: Settings = None,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="NAME[:OPTION=VALUE]",
            help="A filter of task vectors before the method; options follow it: trim:density=0.1.",
            show_default=False,
        ),
    ] = None,
    no_base: Annotated[
        bool, typer.Option("--no-base", help="All models are experts; for methods that need no base.")
    ] = False,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Tensors to take from the base unmerged, such as 'head.*'; experts may differ in them.",
            show_default=False,
        ),
    ] = None,
    proxy: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="A few dozen inputs for methods that look at data: arrays, a table with 'text', or a folder with a file an expert.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="Makes the model that runs them (or FILE.py:FACTORY); transformers folders need none.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="float32, bfloat16, ... of the result; the base's when omitted.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all random draws.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, sizes and peak memory; read no weight.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    as_adapter: Annotated[
        int | None,
        typer.Option(
            "--as-adapter",
            metavar="RANK",
            help="Write an adapter of this rank in place of a whole model; 0, where all experts are adapters, for the sum of their ranks.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Merge fine-tuned models into one, tensor by tensor; killed and started again, it goes on where it was."""
    from polytask.errors import InputError

    if dry_run:
        defer("torch")
    inputs = _proxy(proxy, model)
    if paths[0].suffix in (".yml", ".yaml"):
        if model is not None and inputs is None:
            raise InputError("a model without inputs to run tells nothing: name them with --proxy DATA")
        given = settings or filters or skip or no_base or dtype or seed or method != METHOD
        plan, folder = _configured(paths, folder, inputs, dry_run, given=bool(given))
    else:
        from polytask.merging.on_disk import plan_of

        if len(paths) < 2:
            raise InputError("name the base and at least one fine-tuned model, or a configuration file")
        options = dict(_setting(s) for s in settings or ())
        method, routing = _routing(method, options)
        base, experts = (None, paths) if no_base else (paths[0], paths[1:])
        plan = plan_of(method)(
            experts,
            base,
            method,
            lambda _: options,
            tuple(filters or ()),
            tuple(skip or ()),
            dtype,
            seed,
            proxy=inputs,
            model=model if inputs is None else None,
            routing=routing,
            headers_only=dry_run,
        )
    if not dry_run and folder is None:
        raise InputError("say where the merged model goes with --out DIR, or only plan it with --dry-run")
    if dry_run or folder is None:
        print_json(described(plan)) if as_json else show(plan)
        return
    if as_adapter is not None:
        _carry_out_as_adapter(plan, folder, as_adapter, overwrite, as_json)
        return
    carry_out(plan, folder, overwrite, quiet=as_json)
    if as_json:
        print_json({**described(plan), "folder": str(folder)})
    else:
        more = " with routed experts" if plan.routing is not None else ""
        models = f"{len(plan.experts)} model{'s' * (len(plan.experts) > 1)}"
        out().print(f"{plan.title} of {models}{more}: {folder}", markup=False, soft_wrap=True)


def _carry_out_as_adapter(plan: MergePlan, folder: Path, rank: int, overwrite: bool, as_json: bool) -> None:
    from polytask.merging.adapter_writer import write_adapter

    loss = write_adapter(plan, folder, rank or None, overwrite=overwrite)
    if as_json:
        print_json({"folder": str(folder), "lost": loss.share, "left_out": list(loss.left_out)})
        return
    count = len(plan.experts)
    text = f"{plan.method} of {count} model{'s' * (count > 1)}: {folder}, {loss.share:.2%} of the squared update lost"
    out().print(text, markup=False, soft_wrap=True)
    if loss.left_out:
        named, more = ", ".join(loss.left_out[:NAMED]), len(loss.left_out) - NAMED
        text = f"Changed, but with no place in an adapter: {named}{f' and {more} more' if more > 0 else ''}."
        out().print(text, markup=False, soft_wrap=True)


def _routing(method: str, options: dict[str, Any]) -> tuple[str, Routing | None]:
    """The merger of a method, and what adds experts to its result where the method does; that takes its options out."""
    from polytask.merging.base import Merger
    from polytask.merging.in_memory import built, merging_method

    found = merging_method(method)
    if found.needs == "inputs" or issubclass(found.factory, Merger):  # type: ignore[arg-type]
        return found.name, None
    own = {name: options.pop(name) for name in list(options) if name in found.options}
    made: Routing = built(found, own)
    options.update(made.static_options)
    return made.static, made


def _proxy(data: Path | None, model: str | None) -> Proxy | None:
    if data is None:
        return None
    from polytask.merging.proxy import Proxy

    return Proxy(data, model)


def _configured(
    paths: list[Path], folder: Path | None, proxy: Proxy | None, dry_run: bool, given: bool
) -> tuple[MergePlan, Path | None]:
    from polytask.errors import InputError
    from polytask.merging.config import read_config

    if given:
        raise InputError(
            f"{paths[0]} says how to merge: leave out --method, --set, --filter, --skip, --dtype, --seed and --no-base"
        )
    if len(paths) > 2 or (len(paths) == 2 and folder is not None):
        raise InputError("after a configuration file comes one folder for the result")
    return read_config(paths[0], proxy, headers_only=dry_run), paths[1] if len(paths) == 2 else folder


def _setting(text: str) -> tuple[str, Any]:
    from polytask.errors import InputError

    name, sign, value = text.partition("=")
    if not sign or not name or not value:
        raise InputError(f"--set takes NAME=VALUE, such as scale=0.3, not {text!r}")
    whole = _value(value, text)
    return name, [_value(v, text) for v in value.split(",")] if isinstance(whole, str) and "," in whole else whole


def _value(value: str, text: str) -> Any:
    import yaml

    from polytask.errors import InputError

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        if value.startswith("*"):  # a pattern of names, which YAML takes for a reference
            return value
        raise InputError(f"the value in --set {text} cannot be read: lists are written [1, 2] or 1,2") from None


def carry_out(plan: MergePlan, folder: Path, overwrite: bool, quiet: bool) -> None:
    """Merge, with a bar of the tensors done while somebody watches."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from polytask.merging.on_disk import write

    columns = (BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    console = err()
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=len(plan.specs))
        try:
            write(
                plan,
                folder,
                overwrite=overwrite,
                progress=lambda name: bar.update(task, advance=1, description=name),
                told=lambda what: bar.update(task, description=what),
            )
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; finished files are kept beside {folder}: the same command goes on"
            ) from None


def described(plan: MergePlan) -> dict[str, Any]:
    """The plan, JSON-ready."""
    return {
        "method": plan.title,
        "models": [{"path": str(m.path), "tensors": len(m.specs), "bytes": m.bytes} for m in plan.models],
        "has_base": plan.base is not None,
        "merged": len(plan.match.merged),
        "kept": list(plan.match.kept),
        "parameters": sum(s.elements for s in plan.specs.values()),
        "files": {name: sum(s.bytes for s in specs.values()) for name, specs in plan.files.items()},
        "bytes": plan.bytes,
        "peak_bytes": plan.peak_bytes,
    }


def show(plan: MergePlan) -> None:
    """The plan as text."""
    facts = described(plan)
    roles = ["base"] * facts["has_base"] + ["expert"] * len(plan.experts)
    rows = [
        [role, m["path"], str(m["tensors"]), size(m["bytes"])] for role, m in zip(roles, facts["models"], strict=True)
    ]
    right = {"justify": "right", "no_wrap": True}
    screen = out()
    screen.print(table(["", ("model", {"overflow": "fold"}), ("tensors", right), ("size", right)], rows))
    whose = roles[0] if plan.reference is plan.models[0] else str(plan.reference.path)
    kept = f", {len(facts['kept'])} taken from {'the ' * (whose in roles)}{whose}" if facts["kept"] else ""
    screen.print(
        f"\n{plan.title}: {facts['merged']} tensors merged{kept}; {facts['parameters'] / 1e6:,.1f} million numbers in "
        f"{len(facts['files'])} file{'s' * (len(facts['files']) > 1)} of {size(facts['bytes'])}.\n"
        f"Peak memory for tensors: {size(facts['peak_bytes'])}.",
        markup=False,
    )


def size(count: int) -> str:
    """Bytes for people: 1.4 GB."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}" if value < 1000 else f"{value:.0f} {units[0]}"
