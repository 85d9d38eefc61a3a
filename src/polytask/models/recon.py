"""Recon: reducing conflicting gradients from the root for multi-task learning (Shi et al., ICLR 2023, arXiv:2302.11289)."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from polytask.autograd import Losses, named_losses
from polytask.errors import InputError
from polytask.models.base import HardSharing, MultiTaskModel
from polytask.registry import register


@register(
    "recon",
    family="models",
    paper="arXiv:2302.11289",
    needs="jacobian",
    aliases=("Recon",),
)
class Recon:
    r"""Count, layer by layer, how often task gradients conflict; then give every task its own copy of the worst layers.

    The score of a layer is the share, of all pairs of tasks in all steps observed, with

    .. math:: \cos(g_i^{(l)}, g_j^{(l)}) < S .

    First a model is trained for a while and observed, then the same architecture with the worst layers copied is trained from the
    start, by any method. ::

        recon = Recon(model, S=-0.02)
        for batch in loader:                       # an ordinary loop
            losses = ...
            recon.observe(losses)                  # before the backward pass
            ...
        branched = recon.branch(make_model(), layers=3)     # a MultiTaskModel like any other

    Args:
        model: the shared model that is observed. A layer is a module that holds shared parameters itself.
        S: the cosine below which two gradients count as in conflict; 0 and small negative numbers are usual.

    Raises:
        InputError: S outside [-1, 1], or a model that shares nothing.

    Cost: K backward passes at every step observed; after branching, one pass a task from the first copied layer on.
    """

    def __init__(self, model: MultiTaskModel, *, S: float = 0.0) -> None:
        if not -1 <= S <= 1:
            raise InputError(f"recon takes as S a cosine, in [-1, 1], not {S}")
        self.tasks, self.S = model.tasks, S
        self.layers = shared_layers(model)
        if not self.layers:
            raise InputError("recon finds no shared parameter that is trained: there is no layer to be copied")
        self.conflicts = torch.zeros(len(self.layers), dtype=torch.int64)
        self.pairs = torch.zeros(len(self.layers), dtype=torch.int64)

    def observe(self, losses: Losses) -> Float[Tensor, "layers tasks tasks"]:
        """Look at the gradients of one step; the graph is kept for the backward pass that follows.

        Args:
            losses: {task: scalar} with graph. Absent tasks are left out.

        Returns:
            The cosines between the tasks given, NaN where a loss does not reach a layer or has no slope there.

        Raises:
            InputError: losses that are no scalars with graph.
        """
        parameters = [p for layer in self.layers.values() for p in layer]
        rows = []
        for loss in named_losses(losses).values():
            found = iter(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
            rows.append([_row(layer, [next(found) for _ in layer]) for layer in self.layers.values()])
        stacked = [torch.stack(layer) for layer in zip(*rows, strict=True)]
        unit = [g / g.norm(dim=1, keepdim=True) for g in stacked]
        cosines = torch.stack([u @ u.T for u in unit])
        upper = torch.ones_like(cosines[0], dtype=torch.bool).triu(1)
        self.conflicts += ((cosines < self.S) & upper).sum((1, 2)).cpu()
        self.pairs += (cosines.isfinite() & upper).sum((1, 2)).cpu()
        return cosines

    @property
    def scores(self) -> dict[str, float]:
        """{layer: share of its pairs in conflict}, the worst first, earlier layers first among equals; 0 where none was seen."""
        share = (self.conflicts / self.pairs.clamp_min(1)).tolist()
        return dict(sorted(zip(self.layers, share, strict=True), key=lambda item: -item[1]))

    def branch(self, model: MultiTaskModel, layers: int | Sequence[str]) -> BranchedModel:
        """A copy of a model of the same architecture with the worst layers task-specific.

        Args:
            model: usually a fresh one, to be trained from the start.
            layers: how many, or which.

        Raises:
            InputError: more layers than there are, or names of none.
        """
        if isinstance(layers, int) and not 0 <= layers <= len(self.layers):
            raise InputError(f"{layers} layers are to be copied, and the model shares {len(self.layers)}")
        return BranchedModel(model, list(self.scores)[:layers] if isinstance(layers, int) else layers)

    def state_dict(self) -> dict[str, Any]:
        """What was counted."""
        return {"layers": list(self.layers), "conflicts": self.conflicts.clone(), "pairs": self.pairs.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where :meth:`state_dict` was taken.

        Raises:
            InputError: a state of other layers.
        """
        if list(state["layers"]) != list(self.layers):
            raise InputError("this state counts the conflicts of other layers than this model has")
        self.conflicts, self.pairs = state["conflicts"].clone(), state["pairs"].clone()


class BranchedModel(MultiTaskModel):
    """A model some of whose shared layers every task has for itself; all copies begin equal.

    Args:
        model: is copied; its first task keeps the layers in their places.
        layers: the dotted names of modules that hold shared parameters themselves.

    Raises:
        InputError: a name that is none.

    Where the model is :class:`HardSharing` with a sequential trunk, what comes before the first copied layer runs once, and is a feature
    for balancing at representation level where nothing behind it is shared. Other models run once a task.
    """

    def __init__(self, model: MultiTaskModel, layers: Sequence[str]) -> None:
        super().__init__()
        known = shared_layers(model)
        for name in layers:
            if name not in known:
                raise InputError(f"the model has no shared layer called {name!r}; it has {', '.join(known)}")
        self.model = copy.deepcopy(model)
        self.layers = tuple(layers)
        self.copies = nn.ModuleList(
            nn.ModuleList(_Tensors(self.model.get_submodule(name)) for name in layers) for _ in model.tasks[1:]
        )
        trunk = getattr(model, "trunk", None)
        self._cut: int | None = None
        if type(model).forward is HardSharing.forward and isinstance(trunk, nn.Sequential):
            names = [name for name, _ in trunk.named_children()]
            self._cut = min((names.index(layer.split(".")[1]) for layer in layers), default=len(trunk))

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.model.tasks

    def forward(self, inputs: Any, tasks: Collection[str] | None = None) -> dict[str, Tensor]:
        names = [n for n in self.tasks if tasks is None or n in tasks]
        self.features.clear()
        if self._cut is None:
            return {n: functional_call(self.model, self._own(n), (inputs, [n]))[n] for n in names}
        assert isinstance(self.model, HardSharing)
        before, behind = self.model.trunk[: self._cut], self.model.trunk[self._cut :]  # type: ignore[index]
        z = before(inputs)
        shared = {id(p) for p in self.shared_parameters()}
        apart = self._cut > 0 and not any(id(p) in shared for p in behind.parameters())
        views = self.fan_out(z, names) if apart else dict.fromkeys(names, z)
        outputs = {}
        for n in names:
            mine = {key.removeprefix("trunk."): t for key, t in self._own(n).items()}
            head = self.model.heads[self.tasks.index(n)]
            outputs[n] = head(functional_call(behind, mine, (views[n],)))
        return outputs

    def _own(self, task: str) -> dict[str, Tensor]:
        """What takes the place of the model's tensors for a task, by name."""
        k = self.tasks.index(task)
        if k == 0:
            return {}
        mine = cast(nn.ModuleList, self.copies[k - 1])
        return {
            f"{layer}.{name}".removeprefix("."): t
            for layer, held in zip(self.layers, mine, strict=True)
            for name, t in chain(held.named_parameters(), held.named_buffers())
        }

    def task_parameters(self, name: str) -> Iterator[nn.Parameter]:
        yield from self.model.task_parameters(name)
        k = self.tasks.index(name)
        if k:
            yield from self.copies[k - 1].parameters()
        else:
            for layer in self.layers:
                yield from self.model.get_submodule(layer).parameters(recurse=False)


class _Tensors(nn.Module):
    """Copies of the tensors that a module holds itself, by their names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, p in module.named_parameters(recurse=False):
            self.register_parameter(name, copy.deepcopy(p))
        for name, b in module.named_buffers(recurse=False):
            self.register_buffer(name, copy.deepcopy(b), persistent=name not in module._non_persistent_buffers_set)


def shared_layers(model: MultiTaskModel) -> dict[str, list[nn.Parameter]]:
    """{name of a module: the shared, trained parameters that it holds itself}, in the model's order."""
    shared = {id(p) for p in model.shared_parameters() if p.requires_grad}
    found = {
        name: [p for p in module.parameters(recurse=False) if id(p) in shared] for name, module in model.named_modules()
    }
    return {name: parameters for name, parameters in found.items() if parameters}


def _row(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Float[Tensor, " coordinates"]:
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradients, strict=True)]
    )
