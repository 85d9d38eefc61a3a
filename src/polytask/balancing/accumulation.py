"""Exact per-task gradients of a batch that arrives in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from polytask.autograd import Processes, apart, coordinates, gramian, jacobian, leaves, named_losses, number_type
from polytask.balancing.base import Balancer, GradientAggregator, GramianWeighting, LossWeighting, precision_of
from polytask.balancing.losses import same_start
from polytask.balancing.observation import Observation
from polytask.errors import InputError, TrainingError


class Accumulation:
    r"""Add up the Jacobians of micro-batches (and of processes), then balance once.

    With the loss of task k split into pieces, :math:`L_k = \sum_m L_{km}`, :meth:`add` takes the pieces of one micro-batch, adds
    their gradients to a K x P buffer and lets their graph go; :meth:`backward` then does what :func:`polytask.backward` at exact
    level does on the whole batch at once, for every method: loss weightings see the :math:`L_k`, Gramian methods
    :math:`JJ^\top`.

    Args:
        balancer: bound to all ``tasks``.
        tasks: all tasks, whether or not a batch has them.
        shared: the parameters to be balanced.
        scale: what the losses are multiplied by for float16 (``scaler.get_scale()``); the gradients written stand multiplied by it.

    Raises:
        InputError: no shared parameter that requires gradients.

    Cost: K backward passes a micro-batch, K x P numbers; between processes one all-reduce of them.

    Example:
        >>> import torch, polytask
        >>> theta = torch.nn.Parameter(torch.ones(2))
        >>> whole = polytask.balancing.Accumulation(polytask.balancing.make("upgrad"), ["first", "both"], [theta])
        >>> for x in torch.ones(4, 2).split(2):  # losses are means: each piece counts for its share of the rows
        ...     y = x * theta
        ...     whole.add({"first": y[:, 0].square().mean() / 2, "both": y.square().mean() / 2})
        >>> whole.backward().losses
        tensor([1., 1.])
    """

    def __init__(self, balancer: Balancer, tasks: Sequence[str], shared: Iterable[Tensor], scale: float = 1.0) -> None:
        self.balancer, self.tasks, self.scale = balancer, tuple(tasks), scale
        self.shared = list({id(p): p for p in shared if p.requires_grad}.values())
        if not self.shared:
            raise InputError("there is no shared parameter that requires gradients: nothing is to be balanced")
        first = self.shared[0]
        self.jacobian = torch.zeros(
            len(self.tasks), sum(map(coordinates, self.shared)), dtype=number_type(self.shared), device=first.device
        )
        self.losses = torch.zeros(len(self.tasks), dtype=torch.float32, device=first.device)
        self.present = torch.zeros(len(self.tasks), dtype=torch.bool)
        self.own: list[dict[Tensor, Tensor]] = [{} for _ in self.tasks]
        self._balanced = False

    def _start_anew(self) -> None:
        for tensor in (self.jacobian, self.losses, self.present):
            tensor.zero_()
        self.own = [{} for _ in self.tasks]
        self._balanced = False

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Take one micro-batch's pieces of the losses: {task: scalar with graph}; absent tasks are left out.

        Raises:
            InputError: a loss that is not a scalar with graph, or of a task that is none of ``tasks``.
        """
        if not losses:
            return
        losses = named_losses(losses)
        if self._balanced:
            self._start_anew()
        unknown = [n for n in losses if n not in self.tasks]
        if unknown:
            raise InputError(f"the tasks are {', '.join(self.tasks)}; {unknown[0]} is not one of them")
        common = {id(p) for p in self.shared}
        mine = [[p for p in leaves(loss) if id(p) not in common] for loss in losses.values()]
        rows, extra = jacobian([loss * self.scale for loss in losses.values()], self.shared, mine)
        at = torch.tensor([self.tasks.index(n) for n in losses])
        self.jacobian.index_add_(0, at.to(rows.device), rows)
        self.losses.index_add_(
            0, at.to(rows.device), torch.stack([loss.detach() for loss in losses.values()]).to(self.losses)
        )
        self.present[at] = True
        for k, parameters, gradients in zip(at.tolist(), mine, extra, strict=True):
            for p, g in zip(parameters, gradients, strict=True):
                if g is not None:
                    self.own[k][p] = self.own[k][p] + g if p in self.own[k] else g

    def reduce(self) -> None:
        """Add up the pieces of all processes; every one of them calls it, then :meth:`backward`, and chooses the same direction."""
        processes = Processes.of("world")
        if processes is None:
            return
        if self.balancer.agreed_in is not processes.group:
            same_start(self.balancer, self.tasks, processes)
        present = self.present.to(self.jacobian.device, torch.int32)
        for tensor in (self.jacobian, self.losses, present):
            processes.sum_(tensor)
        self.present = present.bool().cpu()

    def backward(self) -> Observation:
        """Fill ``.grad`` of shared and task parameters, adding to what is there; the next :meth:`add` begins another batch.

        Raises:
            InputError: the same micro-batches once more.
            TrainingError: a loss or a gradient that is not finite; the message names the task, and no ``.grad`` was touched.
        """
        if self._balanced:
            raise InputError("these micro-batches were balanced before: add the next ones first")
        kept = self.present.nonzero().flatten().to(self.jacobian.device)
        names = [self.tasks[k] for k in kept.tolist()]
        if not names:
            seen = self.balancer.observation = Observation((), self.losses[kept], None, None, "none", taken=False)
            return seen
        J = self.jacobian[kept] if len(kept) < len(self.tasks) else self.jacobian
        values = self.losses[kept]
        _refuse("loss", names, torch.isfinite(values))
        finite = torch.isfinite(J).all(1)
        if self.scale != 1.0 and not bool(finite.all()):
            return self._overflown(values, names, finite)
        _refuse("gradient", names, finite)
        self._balanced = True
        self.balancer.bind(names)
        direction, slopes, observation = self._choose(J, values, names)
        self.balancer.observation = observation
        for g, p in zip(apart(direction, self.shared), self.shared, strict=True):
            _add_to_gradient(p, g)
        for k, slope in zip(kept.tolist(), slopes, strict=True):
            for p, g in self.own[k].items():
                _add_to_gradient(p, slope * g)
        return observation

    def _overflown(self, values: Tensor, names: list[str], finite: Tensor) -> Observation:
        """Float16's scaler must see the overflow to skip the step and lower its scale; the balancer must not."""
        self._balanced = True
        for p in self.shared:
            _add_to_gradient(p, torch.full_like(p, torch.nan))
        bad = tuple(n for n, ok in zip(names, finite.tolist(), strict=True) if not ok)
        seen = self.balancer.observation = Observation(tuple(names), values, None, None, "exact", bad, taken=False)
        return seen

    def _choose(self, J: Tensor, values: Tensor, names: list[str]) -> tuple[Tensor, Tensor, Observation]:
        """The direction, d(what is differentiated)/d(loss) of each task for its own parameters, and what was seen."""
        balancer, s = self.balancer, self.scale
        L = values.clone().requires_grad_()
        balanced = balancer.transform(L)
        seen = balanced.detach()
        if isinstance(balancer, LossWeighting):
            total, weights = balancer.combine(balanced)
            total.backward()  # type: ignore[no-untyped-call]
            assert L.grad is not None
            C = gramian(J) / s**2
            return L.grad.to(J) @ J, L.grad, Observation(tuple(names), seen, weights, C, "exact")
        (slopes,) = torch.autograd.grad(balanced.sum(), L)
        rows = J if not balancer.log_losses else J * slopes.to(J)[:, None]
        C = gramian(rows) / s**2
        if isinstance(balancer, GradientAggregator):
            return balancer.direction_of(rows / s, seen) * s, slopes, Observation(tuple(names), seen, None, C, "exact")
        assert isinstance(balancer, GramianWeighting)
        found = balancer.weights_of(C.cpu().numpy(), seen.double().cpu().numpy(), precision_of(rows))
        w = torch.from_numpy(found).to(rows)
        return w @ rows, slopes, Observation(tuple(names), seen, w, C, "exact")


def _refuse(what: str, names: list[str], finite: Tensor) -> None:
    if not bool(finite.all()):
        bad = ", ".join(repr(n) for n, ok in zip(names, finite.tolist(), strict=True) if not ok)
        raise TrainingError(f"the {what} of task {bad} is not finite: no gradient was touched")


def _add_to_gradient(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
