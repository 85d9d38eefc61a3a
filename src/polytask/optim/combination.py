"""Which weighted sum of the task gradients a step takes, whoever decides it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.autograd import gramian
from polytask.errors import InputError

if TYPE_CHECKING:
    from polytask.registry import Method

Weights = Mapping[str, float] | Sequence[float] | Tensor | None


class TaskBalancer(Protocol):
    """What is asked of a balancing method here; every one of :mod:`polytask.balancing` answers to it."""

    needs: ClassVar[str]
    method: ClassVar[Method]

    @property
    def roles(self) -> Sequence[str]:
        """Of the batches it looks at in a step."""

    def bind(self, tasks: Sequence[str]) -> None:
        """Fix the tasks, or find those given among them."""

    def transform(self, losses: Tensor) -> Tensor:
        """What is balanced."""


def weights_before_gradients(
    balancer: TaskBalancer | None, weights: Weights, names: Sequence[str], losses: Float[Tensor, " tasks"]
) -> Float[Tensor, " tasks"] | None:
    """The weights, shape (tasks,), where they follow from the losses or are given; None where the gradients decide.

    Raises:
        InputError: weights that are negative, not finite, or not one a task.
    """
    if balancer is not None:
        balancer.bind(names)
        return cast(Tensor, cast(Any, balancer).combine(losses)[1]).detach() if balancer.needs == "losses" else None
    if weights is None:
        return torch.ones_like(losses)
    if isinstance(weights, Mapping) and not set(names) <= set(weights):
        raise InputError(f"no weight is given for the task {sorted(set(names) - set(weights))[0]!r}")
    try:
        given = [float(weights[n]) for n in names] if isinstance(weights, Mapping) else [float(w) for w in weights]
    except (TypeError, ValueError) as error:
        raise InputError(f"{len(names)} weights of at least 0 are needed, one a task, not {weights!r}") from error
    if len(given) != len(names) or not all(0 <= w < math.inf for w in given):
        raise InputError(f"{len(names)} weights of at least 0 are needed, one a task, not {given}")
    return losses.new_tensor(given)


def balanced(
    balancer: TaskBalancer, J: Float[Tensor, "tasks coordinates"], losses: Float[Tensor, " tasks"]
) -> tuple[Float[Tensor, " coordinates"], Float[Tensor, " tasks"]]:
    """The direction d and weights with d = sum_i w_i g_i; by least squares for a method that only gives d."""
    method = cast(Any, balancer)
    if balancer.needs == "gramian":
        w = torch.from_numpy(method.weights_of(gramian(J).cpu().numpy(), losses.double().cpu().numpy())).to(J)
        return w @ J, w
    d = cast(Tensor, method.direction_of(J, losses))
    solution = torch.linalg.lstsq(gramian(J).cpu(), (J.double() @ d.double()).cpu()[:, None], driver="gelsd").solution
    return d, solution[:, 0].to(J)
