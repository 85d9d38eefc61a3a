"""Methods that look at the model more than once in a step: at several batches, or at other parameters."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from polytask.autograd import (
    Losses,
    Processes,
    Shared,
    apart,
    coordinates,
    flat,
    gramian,
    jacobian,
    leaves,
    named_losses,
    number_type,
    partition,
)
from polytask.balancing.base import Balancer, Role
from polytask.balancing.given import given_jacobian, given_losses, refuse_nonfinite
from polytask.balancing.losses import Counts, begin
from polytask.errors import TrainingError

Evaluate = Callable[[Any], Losses]
CountsOf = Callable[[Any], Counts] | None


class Overflow(Exception):
    """A gradient multiplied by the scale of float16 is not finite: the gradient scaler's business."""


class Evaluations:
    """The batches of one step, evaluated as often as a method likes.

    The first evaluation of a training batch is an ordinary one. All others leave the buffers of modules (BatchNorm's averages) as they
    were, and repeated ones draw the same random numbers (dropout masks) as the first, without moving torch's generators on.

    Args:
        evaluate: batch -> losses with graph, at the parameters as they stand.
        batches: what it is called with.
        roles: of each of them.
    """

    def __init__(self, evaluate: Evaluate, batches: Sequence[Any], roles: Sequence[Role]) -> None:
        self.evaluate, self.batches, self.roles = evaluate, batches, roles
        self._generators: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def __call__(self, number: int) -> Losses:
        """The losses of a batch."""
        seen = number in self._generators
        if not seen:
            self._generators[number] = _generators()
            if self.roles[number] == "train":
                return self.evaluate(self.batches[number])
        now = _generators()
        _set_generators(self._generators[number])
        try:
            with _buffers_kept():
                return self.evaluate(self.batches[number])
        finally:
            if seen:
                _set_generators(now)


def _generators() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_generators(states: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])


@contextmanager
def _buffers_kept() -> Iterator[None]:
    """Put the buffers of every module that runs back to what they held before it ran."""
    before: dict[int, tuple[Tensor, Tensor]] = {}

    def remember(module: nn.Module, _: Any) -> None:
        for b in module.buffers():
            if id(b) not in before:
                before[id(b)] = (b, b.detach().clone())

    hook = register_module_forward_pre_hook(remember)
    try:
        yield
    finally:
        hook.remove()
        for b, old in before.values():
            b.data.copy_(old)  # unseen by autograd: graphs that have read the buffer stay usable


class Looks:
    r"""What a method sees of the model in one step: losses and gradients of its batches, at :math:`\theta` or beside it.

    Coordinates are those of all parameters that the losses reach, the shared ones first. Gradients come unscaled.

    Args:
        balancer: bound here to the tasks of the step: those that every training batch has.
        evaluations: of the batches.
        shared: the shared parameters, as for :func:`polytask.backward`; groups are balanced together.
        scale: of float16.
        watched: whether a gradient scaler is to hear of gradients that are not finite.
        transform: what is balanced, given a loss.
        processes: those that share the batches; losses and gradients are those of all examples then.
        counts: batch -> the examples that this process's losses are the means of.

    Attributes:
        names: the tasks of the step.
        followed: number of the batch whose gradients make the step: the last training batch.
        values: its losses, shape (tasks,), detached.
        theta: the parameters, in the order of the coordinates.
        n_shared: number of coordinates that are shared.
        shared_sizes: how many of them each shared parameter has.
        watched: as given.
        gramian: of the shared gradients of a training batch at :math:`\theta`, where they were asked for, float64.

    Raises:
        InputError: losses that are not scalars with graph, a task never seen before, shared parameters that no loss reaches.
        TrainingError: a loss that is not finite.
    """

    def __init__(
        self,
        balancer: Balancer,
        evaluations: Evaluations,
        shared: Shared,
        scale: float = 1.0,
        watched: bool = False,
        transform: Callable[[Tensor], Tensor] | None = None,
        processes: Processes | None = None,
        counts: CountsOf = None,
    ) -> None:
        self._balancer, self._processes, self._counts = balancer, processes, counts
        self._means: dict[int, dict[str, Tensor]] = {}
        self._names_known = False
        self._evaluations, self._scale, self.watched = evaluations, scale, watched
        self._transform = transform or balancer.transform
        self._displaced = False
        self.gramian: Tensor | None = None
        train = [i for i, role in enumerate(evaluations.roles) if role == "train"]
        self._fresh = {i: self._evaluated(i) for i in train}
        union = list(dict.fromkeys(n for losses in self._fresh.values() for n in losses))
        if balancer.tasks is None and union:
            balancer.bind(union)
        self.names = [n for n in union if all(n in losses for losses in self._fresh.values())]
        if self.names:
            balancer.bind(self.names)
        self._names_known = True
        for losses in self._fresh.values():
            _refuse({n: losses[n] for n in self.names})
        self.followed = train[-1]
        self.theta: list[Tensor] = []
        self.n_shared, self.shared_sizes = 0, list[int]()
        if self.names:
            scalars = [self._fresh[self.followed][n] for n in self.names]
            means = self._means[self.followed] if processes is not None else self._fresh[self.followed]
            self.values = torch.stack([means[n] for n in self.names]).detach()
            self._find_parameters(scalars, len(self.names) == len(balancer.tasks or ()), shared)

    def _find_parameters(self, scalars: list[Tensor], complete: bool, shared: Shared) -> None:
        reached = [leaves(loss, complete=True) for loss in scalars]
        groups, own = partition(self.names, complete, reached, shared)
        common = [p for g in groups for p in g.parameters]
        self.shared_sizes = [coordinates(p) for p in common]
        self.n_shared = sum(self.shared_sizes)
        singles = list({id(p): p for mine in own for p in mine}.values())
        self.theta, self._common = [*common, *singles], len(common)
        self._own = {n: {id(p) for p in mine} for n, mine in zip(self.names, own, strict=True)}

    def _evaluated(self, number: int) -> dict[str, Tensor]:
        losses = self._evaluations(number)
        if isinstance(losses, Mapping) and not losses:
            return {}
        if self._processes is None:
            return {n: self._transform(loss) for n, loss in named_losses(losses).items()}
        counts = self._counts(self._evaluations.batches[number]) if self._counts is not None else None
        step = begin(self._balancer, losses, counts, "raise", self._processes)
        if self._names_known:
            self._balancer.bind(self.names)
        self._means[number] = dict(zip(step.names, step.values.unbind(), strict=True))
        return dict(zip(step.names, step.scalars, strict=True))

    def losses(self, number: int) -> dict[str, Tensor]:
        """Losses of a batch with graph, here; a validation batch may lack some of the tasks."""
        losses = self._fresh.pop(number, None)
        if losses is None:
            losses = self._evaluated(number)
        return {n: losses[n] for n in self.names if n in losses}

    def losses_without_graph(self, number: int) -> dict[str, Tensor]:
        """Losses of a batch, here, detached."""
        if self._processes is not None:
            self._evaluated(number)
            means = self._means[number]
            return {n: means[n] for n in self.names if n in means}
        with torch.no_grad():
            losses = self._evaluations(number)
            named = losses.items() if isinstance(losses, Mapping) else ((str(i), x) for i, x in enumerate(losses))
            found = {n: self._transform(loss.reshape(())) for n, loss in named if n in self.names}
        _refuse(found)
        return {n: found[n] for n in self.names if n in found}

    def rows(self, number: int, heads: bool = True) -> Float[Tensor, "tasks coordinates"]:
        """Gradients of the losses of a batch, here, one row a task, zeros where it lacks one; without ``heads`` in shared coordinates."""
        losses = self.losses(number)
        parameters = self.theta if heads else self.theta[: self._common]
        if not parameters:  # one task alone shares nothing
            return self._zeros().new_zeros(len(self.names), 0)
        found, _ = jacobian([loss * self._scale for loss in losses.values()], parameters)
        found = self._everywhere(found)
        self._check(list(losses), torch.isfinite(found).all(1))
        J = found.new_zeros(len(self.names), found.shape[1])
        J[[self.names.index(n) for n in losses]] = found / self._scale
        if self.gramian is None and len(losses) == len(self.names) and not self._displaced:
            self.gramian = gramian(J[:, : self.n_shared])
        return J

    def row(self, number: int, name: str) -> Float[Tensor, " coordinates"]:
        """The gradient of one loss of a batch, here."""
        found = torch.autograd.grad(self.losses(number)[name] * self._scale, self.theta, allow_unused=True)
        return self._flat(found, [name])

    def without_others(self, vector: Float[Tensor, " coordinates"], name: str) -> Float[Tensor, " coordinates"]:
        """The vector with zeros for the parameters that belong to other tasks."""
        pieces = torch.split(vector, [coordinates(p) for p in self.theta])
        mine = [True] * self._common + [id(p) in self._own[name] for p in self.theta[self._common :]]
        return torch.cat([d if its else torch.zeros_like(d) for d, its in zip(pieces, mine, strict=True)])

    def slope(self, number: int, w: Float[Tensor, " tasks"], heads: bool = True) -> Float[Tensor, " coordinates"]:
        r"""The gradient of :math:`\sum_i w_i L_i` of a batch, here, over the tasks it has.

        Without ``heads`` the weights act on the shared parameters only, and those of single tasks get the gradient of their own loss.
        """
        losses = self.losses(number)
        if not losses:
            return self._zeros()
        scalars = torch.stack(list(losses.values())) * self._scale
        w = w[[self.names.index(n) for n in losses]].to(scalars)
        common, own = self.theta[: self._common], self.theta[self._common :]
        its: Sequence[Tensor | None] = ()
        if own:
            total = (w * scalars).sum() if heads else scalars.sum()
            its = torch.autograd.grad(total, own, retain_graph=bool(common), allow_unused=True)
        theirs = torch.autograd.grad((w * scalars).sum(), common, allow_unused=True) if common else ()
        return self._flat([*theirs, *its], [])

    def _zeros(self) -> Tensor:
        kind, place = number_type(self.theta), self.theta[0].device
        return torch.zeros(sum(map(coordinates, self.theta)), dtype=kind, device=place)

    def _flat(self, gradients: Sequence[Tensor | None], names: Sequence[str]) -> Tensor:
        g = self._zeros()
        for cell, d in zip(torch.split(g, [coordinates(p) for p in self.theta]), gradients, strict=True):
            if d is not None:
                cell.copy_(flat(d))
        g = self._everywhere(g)
        self._check(names, torch.isfinite(g).all()[None])
        return g / self._scale if self._scale != 1.0 else g

    def _everywhere(self, mine: Tensor) -> Tensor:
        """The mean over processes."""
        return mine if self._processes is None else self._processes.sum_(mine) / self._processes.size

    @contextmanager
    def moved(self, step: Float[Tensor, " coordinates"]) -> Iterator[None]:
        r"""Look from :math:`\theta` + step; :math:`\theta` is put back bit by bit afterwards, whatever happens."""
        self._fresh.clear()  # their graphs hold the parameters that are about to be overwritten
        before = [p.detach().clone() for p in self.theta]
        steps = apart(step.detach(), self.theta)
        self._displaced = True
        try:
            with torch.no_grad():
                for p, d in zip(self.theta, steps, strict=True):
                    p.add_(d)
            yield
        finally:
            self._displaced = False
            with torch.no_grad():
                for p, old in zip(self.theta, before, strict=True):
                    p.copy_(old)

    def _check(self, names: Sequence[str], finite: Tensor) -> None:
        if bool(finite.all()):
            return
        if self.watched:
            raise Overflow
        bad = [n for n, ok in zip(names, finite.tolist(), strict=False) if not ok]
        of = ", ".join(map(repr, bad)) if bad else "the weighted losses"
        raise TrainingError(f"the gradient of {of} is not finite although the loss is: no gradient was touched")


def _refuse(losses: Mapping[str, Tensor]) -> None:
    if not losses:
        return
    values = torch.stack([loss.detach() for loss in losses.values()])
    if not bool(torch.isfinite(values).all()):
        name, value = next((n, v) for n, v in zip(losses, values.tolist(), strict=True) if not math.isfinite(v))
        raise TrainingError(f"the loss of task {name!r} is {value}: no gradient was touched")


def looks_again(balancer: Balancer) -> bool:
    """Whether the losses of one batch are not enough for a method."""
    return isinstance(balancer, LookingBalancer) or len(balancer.roles) > 1


class LookingBalancer(Balancer):
    """A method that finds its step by several looks at the model.

    :func:`polytask.backward_batches` runs it: one :class:`Looks` a step, on as many batches as ``roles`` names.

    Attributes:
        weighs_heads: whether the weights act on the parameters of single tasks too.
        degree: r such that gradients c times as long give weights c^2r as large.
    """

    needs = "several batches"
    weighs_heads: ClassVar[bool] = False
    degree: float = 0.0

    @abstractmethod
    def look(self, looks: Looks) -> tuple[Float[Tensor, " coordinates"], Float[Tensor, " tasks"] | None]:
        """The direction in the coordinates of ``looks``, and the weights of the losses; None where there are none to speak of."""

    def take(self, looks: Looks) -> tuple[Float[Tensor, " coordinates"], Float[Tensor, " tasks"] | None]:
        """:meth:`look`, or with ``every`` the weights of an earlier one."""
        kept = self.reuse()
        if kept is not None:
            w = torch.from_numpy(kept).to(looks.values)
            return looks.slope(looks.followed, w, heads=self.weighs_heads), w
        d, found = self.look(looks)
        if self.every > 1 and found is not None:
            self.keep(found.double().cpu().numpy())
        return d, found

    def direction(
        self, jacobian: Float[Tensor, "tasks coordinates"], losses: Float[Tensor, " tasks"] | None = None
    ) -> Float[Tensor, " coordinates"]:
        """The update direction where all batches have these losses, linear in the parameters with these gradients.

        Args:
            jacobian: one row a task, shape (tasks, coordinates).
            losses: shape (tasks,); ones when omitted.

        Raises:
            InputError: not a matrix, not finite, or of another number of tasks than before.
        """
        given = given_jacobian(jacobian)
        self._bind_count(len(given))
        names = self._names()
        refuse_nonfinite(names, torch.isfinite(given).all(1).tolist())
        J = given.detach().to(torch.promote_types(given.dtype, torch.float32))
        at = J.new_ones(len(J)) if losses is None else given_losses(losses, names).to(J)
        x = J.new_zeros(J.shape[1]).requires_grad_()

        def evaluate(_: None) -> dict[str, Tensor]:
            return dict(zip(names, (at + J @ x).unbind(), strict=True))

        evaluations = Evaluations(evaluate, [None] * len(self.roles), self.roles)
        transform = None
        if losses is None:  # nothing to take a logarithm of

            def transform(loss: Tensor) -> Tensor:
                return loss

        return self.take(Looks(self, evaluations, [x], transform=transform))[0].to(given.dtype)
