"""Who takes the steps: polytask's own methods, and those of other libraries that a file beside it brings.

Such a file defines ``contenders()``, which returns :class:`Contender` objects; polytask itself imports no other library.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from polytask.balancing import Balancer, LossWeighting, backward, backward_batches, make
from polytask.balancing.looks import looks_again
from polytask.benchmark.workload import Workload
from polytask.errors import InputError
from polytask.models import HardSharing
from polytask.registry import find

Level = Literal["auto", "representation", "exact"]
Step = Callable[[], object]
OURS = "polytask"


class Key(NamedTuple):
    """What names a contender."""

    library: str
    method: str
    level: str


@dataclass(frozen=True)
class Contender:
    """One way to take a step.

    Args:
        library: whose, with its version.
        method: the name under which polytask knows the method.
        level: where it takes gradients: ``values``, ``representation`` or ``exact``; like is compared with like.
        make: turns a workload of its own into a step: forward, losses, backward, optimizer.
    """

    library: str
    method: str
    level: str
    make: Callable[[Workload], Step]

    @property
    def key(self) -> Key:
        """What names it."""
        return Key(self.library, self.method, self.level)


def plain(work: Workload) -> Step:
    """The step that all are measured by: the sum of the losses, without any library."""

    def step() -> None:
        work.optimizer.zero_grad()
        z = work.trunk(work.inputs)
        torch.stack(work.losses(head(z) for head in work.heads)).sum().backward()  # type: ignore[no-untyped-call]
        work.optimizer.step()

    return step


class OwnStep:
    """A step of polytask.

    Args:
        work: the workload.
        balancer: of the losses.
        level: where gradients are taken.
    """

    def __init__(self, work: Workload, balancer: Balancer, level: Level) -> None:
        self.work, self.balancer, self.level = work, balancer, level
        self.model = HardSharing(work.trunk, {f"task {k}": head for k, head in enumerate(work.heads)})

    def _losses(self) -> dict[str, Tensor]:
        outputs = self.model(self.work.inputs)
        return dict(zip(outputs, self.work.losses(outputs.values()), strict=True))

    def __call__(self) -> None:
        self.work.optimizer.zero_grad()
        if looks_again(self.balancer):  # at this batch each time: the cost is that of as many of its size
            batches = [None] * len(self.balancer.roles)
            backward_batches(lambda _: self._losses(), batches, shared=self.model.trunk, balancer=self.balancer)
        else:
            losses = self._losses()
            features = None if self.level == "exact" else self.model.features
            backward(losses, shared=self.model.trunk, balancer=self.balancer, features=features, level=self.level)
        self.work.optimizer.step()
        if self.balancer.needs_second_evaluation:
            with torch.no_grad():
                self.balancer.after_step(self._losses())


def ours(names: Sequence[str], levels: Sequence[Level] = ("auto",)) -> list[Contender]:
    """Polytask's methods at the given levels; one that needs loss values only, or more than one look, appears once.

    Args:
        names: registered names or aliases; ``famo:one look`` is FAMO on the next step's losses instead of a second forward pass.
        levels: ``auto`` is ``representation`` here, the workloads having one.

    Raises:
        InputError: an unknown name.
    """
    wanted = dict.fromkeys("representation" if level == "auto" else level for level in levels)
    found: dict[Key, Contender] = {}
    for name in names:
        plain_name, _, variant = name.partition(":")
        method = find(plain_name, "balancing")
        options = {**method.example, **({"second_look": False} if variant else {})}
        if variant not in ("", "one look") or (variant and method.name != "famo"):
            raise InputError(f"there is no variant {variant!r} of {method.name}")
        by_value = issubclass(method.factory, LossWeighting) if isinstance(method.factory, type) else False
        again = looks_again(make(method.name, **options))
        for level in ("values",) if by_value else ("exact",) if again else wanted:
            engine: Level = "auto" if level == "values" else level  # type: ignore[assignment]
            one = Contender(
                OURS, f"{method.name}:{variant}" if variant else method.name, level, _own(method.name, options, engine)
            )
            found[one.key] = one
    return list(found.values())


def _own(name: str, options: dict[str, object], level: Level) -> Callable[[Workload], Step]:
    return lambda work: OwnStep(work, make(name, **options), level)


def read_beside(path: Path) -> list[Contender]:
    """The contenders of a file.

    Raises:
        InputError: no such file, one that does not import, or one without contenders; one sentence says which.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path} to measure beside")
    spec = importlib.util.spec_from_file_location(f"polytask_beside_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        found = list(module.contenders())
    except Exception as error:
        del sys.modules[spec.name]
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{path} cannot be used beside polytask: {type(error).__name__}: {reason}") from error
    wrong = next((c for c in found if not isinstance(c, Contender)), None)
    if wrong is not None or not found:
        raise InputError(
            f"contenders() of {path} returns {type(wrong).__name__ if found else 'nothing'}, not Contender objects"
        )
    return [Contender(c.library, find(c.method, "balancing").name, c.level, c.make) for c in found]


def gather(names: Sequence[str], levels: Sequence[Level], beside: Iterable[Path]) -> list[Contender]:
    """Polytask's contenders and those of other libraries for the same methods."""
    own = ours(names, levels)
    methods = {c.method for c in own}
    return [*own, *(c for path in beside for c in read_beside(path) if c.method in methods)]
