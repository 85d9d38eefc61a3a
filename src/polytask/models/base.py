"""Models that serve several tasks: what is shared, what belongs to one task, and where the two meet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polytask.autograd import Copies, FanOut, LinearHeads
from polytask.errors import InputError


class MultiTaskModel(nn.Module, ABC):
    """A model whose forward pass maps inputs to ``{task: prediction}``.

    Attributes:
        features: the shared representation(s) of the last training-mode forward pass, by name, for ``polytask.backward(features=...)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, FanOut] = {}

    def __getstate__(self) -> dict[str, Any]:
        # features hold the graph of the last step, which can be neither copied nor pickled
        return {**self.__dict__, "features": {}}

    @property
    @abstractmethod
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks served."""

    @abstractmethod
    def forward(self, inputs: Any, tasks: Collection[str] | None = None) -> dict[str, Tensor]:
        """Predict the given tasks (all when omitted): {task: (batch, outputs)}."""

    @abstractmethod
    def task_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters that only one task uses."""

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter that is no single task's own."""
        owned = {id(p) for name in self.tasks for p in self.task_parameters(name)}
        return (p for p in self.parameters() if id(p) not in owned)

    def fan_out(
        self, z: Float[Tensor, "batch *shape"], tasks: Iterable[str], name: str = "features"
    ) -> dict[str, Tensor]:
        """Hand a shared representation to the heads of several tasks, one view each, and remember it as a feature."""
        names = tuple(tasks)
        if not (torch.is_grad_enabled() and z.requires_grad):
            return dict.fromkeys(names, z)
        port = Copies(z, names)
        self.features[name] = port
        return port.copies


class HardSharing(MultiTaskModel):
    """One trunk for all tasks, one head a task (Caruana 1997).

    Args:
        trunk: maps inputs to a representation z, shape (batch, ...).
        heads: {task: module mapping z to (batch, outputs)}.
    """

    def __init__(self, trunk: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not heads:
            raise InputError("a multi-task model needs at least one head")
        self.trunk = trunk
        # a ModuleDict refuses names with dots: heads are kept by position and found by name
        self.heads = nn.ModuleList(heads.values())
        self._names = tuple(heads)

    @property
    def tasks(self) -> tuple[str, ...]:
        return self._names

    def forward(self, inputs: Any, tasks: Collection[str] | None = None) -> dict[str, Tensor]:
        self.features.clear()
        z = self.trunk(inputs)
        heads = {n: head for n, head in zip(self._names, self.heads, strict=True) if tasks is None or n in tasks}
        if torch.is_grad_enabled() and z.requires_grad and LinearHeads.fits(heads.values()):
            port = LinearHeads(z, cast(dict[str, nn.Linear], heads))
            self.features["features"] = port
            return port.outputs
        copies = self.fan_out(z, list(heads))
        return {n: head(copies[n]) for n, head in heads.items()}

    def task_parameters(self, name: str) -> Iterator[nn.Parameter]:
        return self.heads[self._names.index(name)].parameters()


class Wrapped(MultiTaskModel):
    """Any module that already returns a dict of predictions, with its shared and task-specific parts declared.

    Made by :func:`wrap`.
    """

    def __init__(self, module: nn.Module, shared: Mapping[str, nn.Module], heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.module = module
        self._shared = dict(shared)
        self._heads = dict(heads)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self._heads)

    def forward(self, inputs: Any, tasks: Collection[str] | None = None) -> dict[str, Tensor]:
        outputs = (
            self.module(**inputs)
            if isinstance(inputs, Mapping) and not _takes_mapping(self.module)
            else self.module(inputs)
        )
        missing = [n for n in self._heads if n not in outputs]
        if missing:
            raise InputError(f"the wrapped module returned {sorted(outputs)}, without the task {missing[0]!r}")
        return {n: outputs[n] for n in self._heads if tasks is None or n in tasks}

    def task_parameters(self, name: str) -> Iterator[nn.Parameter]:
        return self._heads[name].parameters()

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        seen: set[int] = set()
        for part in self._shared.values():
            for p in part.parameters():
                if id(p) not in seen:
                    seen.add(id(p))
                    yield p


def _takes_mapping(module: nn.Module) -> bool:
    import inspect

    return len(inspect.signature(module.forward).parameters) == 1


def wrap(
    module: nn.Module, *, shared: Iterable[str | nn.Module], heads: Mapping[str, str | nn.Module]
) -> MultiTaskModel:
    """Serve several tasks with a module of one's own.

    Two cases. A module that returns ``{task: prediction}`` itself is taken as it is, ``shared`` and ``heads`` naming its parts. A module
    that returns one representation gets the given head modules put on top, which makes the representation level available.

    Args:
        module: the user's module.
        shared: its shared parts: submodules, or their dotted names.
        heads: {task: submodule of ``module``, or its dotted name, or a new module to be put on top}.

    Raises:
        InputError: a name that is no submodule, heads half inside and half outside, a parameter that is shared and a head's own.
    """
    parts: dict[str, nn.Module] = dict(module.named_modules())

    def part(which: str | nn.Module) -> nn.Module:
        if isinstance(which, nn.Module):
            return which
        if which not in parts:
            raise InputError(
                f"the module has no part called {which!r}; its parts are {', '.join(n for n in parts if n)}"
            )
        return parts[which]

    inner = {id(m) for m in parts.values()}
    chosen = {name: part(head) for name, head in heads.items()}
    inside = [name for name, head in chosen.items() if id(head) in inner]
    if not inside:
        return HardSharing(module, chosen)
    if len(inside) < len(chosen):
        outside = next(n for n in chosen if n not in inside)
        raise InputError(
            f"the head of {inside[0]!r} is part of the module and that of {outside!r} is not: give all heads or none from inside"
        )
    trunk = {(s if isinstance(s, str) else str(i)): part(s) for i, s in enumerate(shared)}
    common = {id(p): name for name, s in trunk.items() for p in s.parameters()}
    for name, head in chosen.items():
        for p in head.parameters():
            if id(p) in common:
                raise InputError(f"a parameter of the head of {name!r} is also listed as shared (in {common[id(p)]!r})")
    return Wrapped(module, trunk, chosen)
