"""``polytask doctor``: is this installation sound?"""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from polytask.commands.console import AsJson, out, print_json, table

if TYPE_CHECKING:
    from packaging.requirements import Requirement

OPTIONAL = ("demo", "lightning", "tensorboard", "torchmetrics")


@dataclass(frozen=True)
class Finding:
    """One thing looked at: ``ok``, ``missing`` (optional, fine) or ``broken``."""

    what: str
    state: str
    detail: str


def doctor(as_json: AsJson = False) -> None:
    """Check the installation: versions, devices, every method's import, one training step.

    The exit code is 1 when something is broken; an optional dependency may be missing.
    """
    findings = [*_versions(), *(_checked(name, look) for name, look in CHECKS.items())]
    if as_json:
        print_json([asdict(f) for f in findings])
    else:
        colour = {"ok": "green", "missing": "yellow", "broken": "red"}
        out().print(
            table(["", "what", "found"], [[Text(f.state, style=colour[f.state]), f.what, f.detail] for f in findings])
        )
    if any(f.state == "broken" for f in findings):
        raise typer.Exit(1)


def _versions() -> Iterator[Finding]:
    """Every declared dependency: the installed version against the declared range."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield Finding("polytask", "ok", f"{version('polytask')} at {Path(__file__).parents[1]}")
    for line in requires("polytask") or []:
        need = Requirement(line)
        extra = _extra_of(need)
        if need.name == "polytask" or extra not in ("", *OPTIONAL):
            continue
        try:
            found = version(need.name)
        except PackageNotFoundError:
            if extra:
                yield Finding(need.name, "missing", f"optional: pip install 'polytask[{extra}]'")
            else:
                yield Finding(need.name, "broken", f"not installed, {need.specifier} is needed")
            continue
        fits = need.specifier.contains(found, prereleases=True)
        yield Finding(
            need.name, "ok" if fits else "broken", found if fits else f"{found}, but {need.specifier} is needed"
        )


def _extra_of(need: Requirement) -> str | None:
    """The extra a requirement belongs to, empty for none, None where it belongs to another one (tests, documentation)."""
    if need.marker is None or need.marker.evaluate({"extra": ""}):
        return ""
    return next((extra for extra in OPTIONAL if need.marker.evaluate({"extra": extra})), None)


def _checked(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "ok", look())
    except Exception as error:
        return Finding(name, "broken", f"{type(error).__name__}: {error}")


def _devices() -> str:
    import torch

    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        accelerators.append("Apple GPU (mps)")
    return ", ".join([f"{torch.get_num_threads()} CPU threads", *(accelerators or ["no accelerator"])])


def _registry() -> str:
    from polytask import registry

    families = [m.family for m in registry.methods()]
    return ", ".join(f"{families.count(f)} of {f}" for f in sorted(set(families)))


def _one_step() -> str:
    import torch

    import polytask

    x = torch.linspace(-1, 1, 8).unsqueeze(1)
    weight = torch.ones(1, requires_grad=True)
    seen = polytask.backward(
        {"up": ((weight * x - x) ** 2 + weight).mean(), "down": (weight**2).mean()}, balancer="mgda"
    )
    if weight.grad is None or not torch.isfinite(weight.grad).all():
        raise ArithmeticError("one balanced backward pass left no finite gradient")
    return f"one balanced backward pass of {len(seen.tasks)} tasks"


def _writable() -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"polytask")
    return f"temporary files in {tempfile.gettempdir()}"


CHECKS: dict[str, Callable[[], str]] = {
    "devices": _devices,
    "methods": _registry,
    "step": _one_step,
    "disk": _writable,
    "encoding": lambda: f"{sys.stdout.encoding} on stdout",
}
