"""MAdam: metric-aware multi-objective Adam (Liu et al. 2026, arXiv:2606.03904)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from polytask.autograd import Losses, Shared, jacobian, leaves, partition
from polytask.errors import InputError
from polytask.optim.combination import TaskBalancer, Weights, balanced
from polytask.optim.pair_moments import Cross, PairMoments
from polytask.optim.task_optimizer import Given, TaskOptimizer, add_to_gradients, evaluated, require_finite
from polytask.registry import register


@register(
    "madam",
    family="optim",
    paper="arXiv:2606.03904",
    needs="jacobian",
    aliases=("MAdam", "metric_aware_adam"),
)
class MetricAwareAdam(TaskOptimizer):
    r"""Divide the combined gradient by its second moment **at the present weights** before Adam sees it.

    Adam divides by a mean of :math:`(\sum_i \lambda_i g_i)^2` over past weights :math:`\lambda`, so that a present preference is
    measured by a history of others; and its diagonal metric is not the one in which a balancer compared the gradients: for
    :math:`g = (10, \pm 1)` the product 99 becomes -0.9 under diag(1/1000, 1). With running means :math:`F_{ij}` of
    :math:`g_i \odot g_j` (:class:`~polytask.optim.pair_moments.PairMoments`) the shared parameters' gradient becomes

    .. math:: u = d / M, \qquad d = \sum_i \lambda_i g_i, \quad M = \sqrt{\textstyle\sum_{i,j} \lambda_i \lambda_j \hat F_{ij}} + \epsilon

    and goes to the wrapped optimizer, while task-specific parameters keep their gradient. In one's own loop::

        optimizer = MetricAwareAdam(torch.optim.AdamW(model.parameters(), lr=1e-3))
        ...
        optimizer.zero_grad()
        optimizer.backward(losses, shared=model.shared_parameters(), balancer=balancer)   # or weights={"a": 0.9, "b": 0.1}
        optimizer.step()

    ``backward`` adds the raw d to ``.grad``, as ``polytask.backward`` does: clip between the two lines, with thresholds for raw gradients;
    several calls before one ``step`` accumulate; ``step`` whitens. Use decoupled weight decay (AdamW). With weights that never change it
    is nearly Adam applied twice, and no gain is to be expected.

    Args:
        inner: an Adam-like optimizer of all parameters; its groups, state and learning rates are this optimizer's own.
        cross: ``full``: all pairs of tasks; ``diag``: without products of different tasks; ``sampled``: one random pair a step, so
            that a step costs 3 backward passes whatever K is, where weights are known before gradients (``weights=``, or a
            method that needs losses only).
        ramp: steps over which M takes over from ``base``; 0 starts whitened.
        base: ``mean``, the mean of M over each tensor, which keeps u at the scale it will have; ``unit``, 1, which Adam's own moments
            have to recover from when M takes over.
        beta2: of F; the inner optimizer's when omitted.
        eps: :math:`\epsilon`, in gradient units.
        seed: of the pairs drawn.

    Cost: K backward passes and :math:`O(K^2 P)` elementwise operations a step, K (K + 1) / 2 x P numbers (``diag``: K x P).
    Bias correction, floor, ramp and sampling are details that the paper leaves open.
    """

    def __init__(
        self,
        inner: Optimizer,
        *,
        cross: Cross = "full",
        ramp: int = 100,
        base: Literal["mean", "unit"] = "mean",
        beta2: float | None = None,
        eps: float = 1e-8,
        seed: int = 0,
    ) -> None:
        found = inner.defaults.get("betas", (0.9, 0.999))[1] if beta2 is None else beta2
        for name, value, allowed, valid in (
            ("cross", cross, "'full', 'diag' or 'sampled'", cross in ("full", "diag", "sampled")),
            ("base", base, "'mean' or 'unit'", base in ("mean", "unit")),
            ("ramp", ramp, "a number of steps", ramp >= 0),
            ("beta2", found, "a number in [0, 1)", 0 <= found < 1),
            ("eps", eps, "a number of at least 0", 0 <= eps < math.inf),
        ):
            if not valid:
                raise InputError(f"madam takes as {name} {allowed}, not {value!r}")
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.cross, self.ramp, self.base, self.beta2, self.eps = inner, cross, ramp, base, float(found), eps
        self._join()
        self.rng = np.random.default_rng(seed)
        self.steps = 0
        self._shared: list[int] = []  # positions among all parameters of the groups, in order
        self._moments: PairMoments | None = None
        self._forget()

    def _join(self) -> None:
        # the same objects: schedulers, scalers and wrappers that change one of the two change both
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def _forget(self) -> None:
        """Forget what was collected since the last step."""
        self._rows: dict[int, Tensor] = {}
        self._weights: list[Tensor] = []
        self._drawn: frozenset[int] | None = None

    @classmethod
    def for_tasks(cls, parameters: Iterable[Tensor], tasks: Sequence[str], *, lr: float, weight_decay: float) -> Self:
        new = cls(torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay))
        new.bind(tasks)
        return new

    def bind(self, tasks: Sequence[str], shared: Iterable[Tensor] | None = None) -> list[int]:
        """Fix the tasks and the shared parameters (once), or find the given tasks among those fixed."""
        found = super().bind(tasks)
        if shared is not None and not self._shared:
            self._share([p for p in shared if p.requires_grad])
        return found

    def backward(
        self,
        losses: Losses,
        *,
        shared: Shared = None,
        balancer: TaskBalancer | str | None = None,
        weights: Weights = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Float[Tensor, " tasks"]:
        """Add the combined gradient to ``.grad`` and remember every task's own until ``step``.

        Args:
            losses: {task: scalar} or a sequence of scalars, with graph. Absent tasks are left out.
            shared: the parameters on which tasks meet, fixed by the first call; those that at least two of its losses reach when omitted.
            balancer: a balancing method, kept by the caller from step to step; or the name of one without state.
            weights: the weights themselves, non-negative, instead of a balancer; ones when both are omitted.
            scaler: the gradient scaler of mixed precision; the gradients then stand scaled.

        Returns:
            The weights of the combination, shape (losses,), detached.

        Raises:
            InputError: both a balancer and weights, weights that do not fit, shared parameters that are not the inner optimizer's.
            TrainingError: a loss or gradient that is not finite (with an active scaler its step is skipped instead).
        """
        given = self.begin(losses, balancer, weights, scaler)
        own = self._own(given, shared)
        active = self.bind(given.names)
        if given.weights is not None and self._samples(active):
            d, lam = self._few_passes(given, active, own, given.weights), given.weights
        else:
            d, lam = self._all_passes(given, active, own)
        pieces = torch.split(d, [p.numel() for p in self.shared])
        add_to_gradients(self.shared, [given.scale * piece for piece in pieces])
        everyone = lam.new_zeros(len(self.tasks))
        everyone[active] = lam
        self._weights.append(everyone)
        return lam

    @property
    def shared(self) -> list[Tensor]:
        """The parameters on which tasks meet; none before the first ``backward``."""
        ours = [p for group in self.param_groups for p in group["params"]]
        return [ours[i] for i in self._shared]

    def _share(self, parameters: Sequence[Tensor]) -> None:
        """Fix the parameters on which tasks meet."""
        if not parameters:
            raise InputError("no parameter is shared by two tasks: there is nothing for madam to weigh")
        wanted = {id(p) for p in parameters}
        ours = [id(p) for group in self.param_groups for p in group["params"]]
        if not wanted <= set(ours):
            raise InputError("a shared parameter is not one of those that the wrapped optimizer was given")
        self._shared = [i for i, p in enumerate(ours) if p in wanted]

    def _own(self, given: Given, shared: Shared) -> list[list[Tensor]]:
        """For each loss the parameters it reaches that are not shared; the first call fixes which are."""
        reached = [leaves(loss, complete=True) for loss in given.losses]
        first = not self._shared
        groups, own = partition(
            given.names, first and len(given.names) == len(self.tasks), reached, shared if first else self.shared
        )
        if first:
            self._share([p for group in groups for p in group.parameters])
        return own

    @property
    def moments(self) -> PairMoments:
        """The second moments, made when they are first needed."""
        if self._moments is None:
            shared = self.shared
            like = shared[0].detach().new_empty(sum(p.numel() for p in shared))
            self._moments = PairMoments(len(self.tasks), like, self.beta2, self.cross)
        return self._moments

    def _samples(self, active: Sequence[int]) -> bool:
        """Whether this step looks at one pair of tasks only; a step with a pair never seen looks at all, so that none is unknown."""
        if self.cross != "sampled" or (self._drawn is None and (self._rows or self.moments.unknown(active))):
            return False
        if self._drawn is None:
            self._drawn = frozenset(self.rng.choice(active, 2).tolist())
        return True

    def _all_passes(
        self, given: Given, active: Sequence[int], own: Sequence[Sequence[Tensor]]
    ) -> tuple[Float[Tensor, " coordinates"], Float[Tensor, " tasks"]]:
        """One pass for each task, which serves its head too; returns the direction and its weights."""
        J, extra = jacobian([given.scale * loss for loss in given.losses], self.shared, own)
        J = J / given.scale
        if given.scale == 1.0:
            require_finite("gradient", given.names, J)
        if given.weights is None and given.balancer is not None and bool(torch.isfinite(J).all()):
            d, lam = balanced(given.balancer, J, given.values)
        else:  # known weights; or an overflow, which the scaler will find in .grad
            lam = torch.ones_like(given.values) if given.weights is None else given.weights
            d = lam.to(J) @ J
        self._collect(dict(zip(active, J, strict=True)))
        for k, (mine, gradients) in enumerate(zip(own, extra, strict=True)):
            add_to_gradients(mine, gradients, 1.0 if given.weights is None else lam[k])
        return d, lam

    def _few_passes(
        self, given: Given, active: Sequence[int], own: Sequence[Sequence[Tensor]], lam: Tensor
    ) -> Float[Tensor, " coordinates"]:
        """One pass of the weighted sum, which serves the heads too, and one for each drawn task; returns the direction."""
        drawn = [k for k in active if self._drawn is not None and k in self._drawn]
        total = (lam * torch.stack(given.losses)).sum()
        heads = [p for mine in own for p in mine]
        passes = [total, *(given.losses[active.index(k)] for k in drawn)]
        J, extra = jacobian([given.scale * loss for loss in passes], self.shared, [heads, *([] for _ in drawn)])
        add_to_gradients(heads, extra[0])
        J = J / given.scale
        self._collect(dict(zip(drawn, J[1:], strict=True)))
        return J[0]

    def _collect(self, rows: Mapping[int, Tensor]) -> None:
        for k, g in rows.items():
            self._rows[k] = self._rows[k] + g if k in self._rows else g

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Whiten the shared parameters' gradients and let the wrapped optimizer step.

        Args:
            closure: evaluated first, where given; it ends with ``backward`` of this optimizer.

        Raises:
            InputError: no task gradients were collected since the last step.
        """
        loss = evaluated(closure)
        if not self._weights:
            raise InputError(
                "madam found no task gradients: call optimizer.backward(losses, ...) in place of loss.backward()"
            )
        self.steps += 1
        self.moments.update(self._rows)
        M = self.moments.second_moment(torch.stack(self._weights).mean(0)).sqrt() + self.eps
        share = min(1.0, self.steps / self.ramp) if self.ramp else 1.0
        for p, m in zip(self.shared, torch.split(M, [p.numel() for p in self.shared]), strict=True):
            base = m.mean() if self.base == "mean" else 1.0
            if p.grad is not None:
                p.grad.div_(((1 - share) * base + share * m).view_as(p))
        self.inner.step()
        self._forget()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` and what was collected for the next step."""
        super().zero_grad(set_to_none)
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give the wrapped optimizer another group; its parameters belong to single tasks."""
        if "inner" in self.__dict__:
            self.inner.add_param_group(param_group)
        else:  # called while the base class is made
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, and under ``metric`` what is needed to go on: tensors, numbers and strings only."""
        metric = {
            "tasks": list(self.tasks),
            "steps": self.steps,
            "shared": list(self._shared),
            "rng": copy.deepcopy(self.rng.bit_generator.state),
            "moments": self.moments.state_dict() if self._shared else None,
        }
        return {**self.inner.state_dict(), "metric": metric}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            InputError: a state of another optimizer, or of other tasks, parameters or ``cross``.
        """
        if "metric" not in state_dict:
            raise InputError("this state was not saved by madam: it has no entry 'metric'")
        self.inner.load_state_dict({k: v for k, v in state_dict.items() if k != "metric"})
        self._join()
        metric = state_dict["metric"]
        self.tasks, self.steps, self._shared = tuple(metric["tasks"]), int(metric["steps"]), list(metric["shared"])
        self.rng.bit_generator.state = copy.deepcopy(metric["rng"])
        self._moments = None
        self._forget()
        if metric["moments"] is not None:
            self.moments.load_state_dict(metric["moments"])


MAdam = MetricAwareAdam
