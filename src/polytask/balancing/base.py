"""What a balancing method is: three protocols, from the least a method can ask of the engine to the most.

============================  ==============================================  =====================================
base class                    a method writes                                 the engine computes
============================  ==============================================  =====================================
:class:`LossWeighting`        ``combine(losses) -> scalar``                   one backward pass of that scalar
:class:`GramianWeighting`     ``solve(C, losses) -> w``                       the K x K Gramian, then ``sum w_i g_i``
:class:`GradientAggregator`   ``aggregate(J, losses) -> d``                   the K x P Jacobian
============================  ==============================================  =====================================

The base classes check input, set scales, drop zero gradients, find the state of the tasks that are present, and keep everything that
must survive a restart in ``state``. K x K problems are solved in float64 NumPy on the host: for K up to 100 that is faster than any chain
of kernels, and it costs a step its only synchronisation.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polytask.autograd import TaskGradients, gramian
from polytask.balancing.balancer import Balancer, BaseOptions, Matrix, Preference, Role, Vector
from polytask.balancing.given import given_gramian, given_jacobian, refuse_nonfinite
from polytask.errors import InputError
from polytask.linalg import DOUBLE, SINGLE

__all__ = [
    "Balancer",
    "BaseOptions",
    "GradientAggregator",
    "GramianWeighting",
    "LossWeighting",
    "Matrix",
    "Preference",
    "Role",
    "Vector",
    "precision_of",
]


class LossWeighting(Balancer):
    """A method that needs the values of the losses only; its weights act on the task heads too."""

    needs = "losses"
    reads_values: ClassVar[bool] = True

    @abstractmethod
    def combine(self, losses: Float[Tensor, " tasks"]) -> tuple[Float[Tensor, ""], Float[Tensor, " tasks"]]:
        """The scalar to differentiate, and the weights d(scalar)/d(loss) for the logs, detached."""

    def weights(self, losses: Float[Tensor, " tasks"]) -> Float[Tensor, " tasks"]:
        """d(scalar)/d(loss) at these loss values, shape (tasks,); state moves on as in a step."""
        self._bind_count(len(losses))
        return self._weights(losses)

    def _weights(self, losses: Float[Tensor, " tasks"]) -> Float[Tensor, " tasks"]:
        values, slopes = self._balanced(losses)
        assert values is not None
        w = self.combine(values)[1]
        return w if slopes is None else w * slopes.to(w)

    def direction(
        self, jacobian: Float[Tensor, "tasks coordinates"], losses: Float[Tensor, " tasks"] | None = None
    ) -> Float[Tensor, " coordinates"]:
        """The update direction, shape (coordinates,), from per-task gradients J, shape (tasks, coordinates), and the losses they belong to.

        Raises:
            InputError: no losses, for methods that read their values; or what does not fit.
        """
        J = given_jacobian(jacobian)
        self._bind_count(len(J))
        if losses is None:
            if self.reads_values:
                raise InputError(f"{self.method.name} weighs losses by their values: give losses=")
            losses = J.new_ones(len(J))
        refuse_nonfinite(self._names(), torch.isfinite(J).all(1).tolist())
        return self._weights(losses).to(J.dtype) @ J


class GramianWeighting(Balancer):
    """A method that needs only the inner products of the task gradients, and returns the weights of their sum.

    Attributes:
        degree: r such that w(cC) = c^r w(C); the base class solves at mean squared norm 1 and applies it, which makes every
            tolerance inside ``solve`` relative.
        precision: relative rounding of C, that of the type in which gradients were multiplied.
        mean_square: the mean squared gradient norm that C was divided by, for a ``solve`` that compares norms between steps.
    """

    needs = "gramian"
    degree: float = 0.0
    precision: float = SINGLE
    mean_square: float = 1.0

    @abstractmethod
    def solve(self, C: Matrix, losses: Vector | None) -> Vector:
        """The weights, shape (tasks,), given the Gramian C of non-zero gradients with mean diagonal 1, and the losses."""

    def weights(
        self,
        gramian: Float[Tensor, "tasks tasks"],
        losses: Float[Tensor, " tasks"] | None = None,
        precision: float | None = None,
    ) -> Float[Tensor, " tasks"]:
        """Weights w of the direction sum_i w_i g_i.

        Args:
            gramian: C with C_ij = <g_i, g_j>, shape (tasks, tasks).
            losses: shape (tasks,), for the methods that read them.
            precision: relative rounding of the Gramian's entries where it is coarser than their type tells.

        Returns:
            Shape (tasks,), in the Gramian's dtype and device; 0 for a task whose gradient is exactly 0.

        Raises:
            InputError: not square, symmetric and finite, no inner products at all, or of another size than before.
        """
        given = given_gramian(gramian)
        self._bind_count(len(given))
        return self._weights(given.detach().double(), losses, precision or precision_of(given)).to(given)

    def _weights(self, C: Tensor, losses: Float[Tensor, " tasks"] | None, precision: float) -> Tensor:
        balanced, slopes = self._balanced(losses)
        values = None if balanced is None else balanced.double().cpu().numpy()
        s = np.ones(len(C)) if slopes is None else slopes.double().cpu().numpy()
        return torch.from_numpy(s * self.weights_of(C.cpu().numpy() * np.outer(s, s), values, precision))

    def weights_of(
        self, C: Matrix, losses: Vector | None, precision: float = SINGLE, squares: Vector | None = None
    ) -> Vector:
        """:meth:`weights` on NumPy arrays, for the active tasks, from gradients multiplied in single precision or the given one.

        Where C holds inner products between the gradients of two batches, ``squares`` are the products of their norms, shape (tasks,).
        """
        self.precision = precision
        kept_weights = self.reuse()
        if kept_weights is not None:
            return kept_weights
        if not np.isfinite(C).all():
            # one such gradient spoils a row and a column: the diagonal tells whose it was
            finite = np.isfinite(np.diag(C))
            rows = np.asarray(np.isfinite(C).all(axis=1))
            refuse_nonfinite(self._names(), [bool(ok) for ok in (rows if finite.all() else finite)])
        squares = np.diag(C) if squares is None else squares
        nonzero = squares > 0
        w = np.zeros(len(C))
        if not nonzero.any():
            return np.asarray(w + self.p)
        everyone, kept = self.active, np.flatnonzero(nonzero)
        self.mean_square = float(squares[kept].mean())
        self.active = everyone[kept]
        try:
            solved = self.solve(C[np.ix_(kept, kept)] / self.mean_square, None if losses is None else losses[kept])
            w[kept] = solved * self.mean_square**self.degree
        finally:
            self.active = everyone
        self.keep(w)
        return w

    def direction(
        self, jacobian: Float[Tensor, "tasks coordinates"], losses: Float[Tensor, " tasks"] | None = None
    ) -> Float[Tensor, " coordinates"]:
        """The update direction w @ J, shape (coordinates,), from per-task gradients J, shape (tasks, coordinates)."""
        J = given_jacobian(jacobian)
        self._bind_count(len(J))
        return self._weights(gramian(J), losses, precision_of(J)).to(J) @ J


def precision_of(tensor: Tensor) -> float:
    """The relative rounding of inner products taken in the tensor's type; half types are multiplied in single precision."""
    return DOUBLE if tensor.dtype == torch.float64 else SINGLE


class GradientAggregator(Balancer):
    """A method that needs the coordinates of the task gradients."""

    needs = "jacobian"

    @abstractmethod
    def aggregate(
        self, J: Float[Tensor, "tasks coordinates"], losses: Float[Tensor, " tasks"] | None
    ) -> Float[Tensor, " coordinates"]:
        """The update direction, shape (coordinates,), given finite per-task gradients."""

    def direction(
        self, jacobian: Float[Tensor, "tasks coordinates"], losses: Float[Tensor, " tasks"] | None = None
    ) -> Float[Tensor, " coordinates"]:
        """The update direction.

        Args:
            jacobian: J, one row a task, shape (tasks, coordinates).
            losses: shape (tasks,), for the methods that read them.

        Returns:
            Shape (coordinates,), to be written where a gradient is expected.

        Raises:
            InputError: not a matrix, not finite, or of another number of tasks than before.
        """
        J = given_jacobian(jacobian)
        self._bind_count(len(J))
        values, slopes = self._balanced(losses)
        refuse_nonfinite(self._names(), torch.isfinite(J).all(1).tolist())
        return self.direction_of(J if slopes is None else J * slopes.to(J)[:, None], values)

    def direction_at(
        self, gradients: TaskGradients, scale: float, losses: Float[Tensor, " tasks"] | None
    ) -> Float[Tensor, " coordinates"]:
        """:meth:`direction_of` gradients in the form in which they arrive: they, and the direction, are multiplied by the scale."""
        rows = gradients.rows()
        return self.direction_of(rows, losses) if scale == 1.0 else self.direction_of(rows / scale, losses) * scale

    def direction_of(
        self, jacobian: Float[Tensor, "tasks coordinates"], losses: Float[Tensor, " tasks"] | None
    ) -> Float[Tensor, " coordinates"]:
        """:meth:`direction` for the active tasks, their gradients known to be finite."""
        kept = self.reuse()
        if kept is not None:
            return torch.from_numpy(kept).to(jacobian) @ jacobian
        J = jacobian.detach()
        d = self.aggregate(J, None if losses is None else losses.detach())
        if self.every > 1:
            self.keep(nearest_combination(J, d))
        return d


def nearest_combination(J: Float[Tensor, "tasks coordinates"], d: Float[Tensor, " coordinates"]) -> Vector:
    """The weights w that make w @ J least different from d, for gradients each measured by its own length."""
    C = gramian(J).cpu().numpy()
    size = np.sqrt(np.diag(C))
    size[size == 0] = 1.0
    wide = torch.promote_types(J.dtype, torch.float32)
    products = (J.to(wide) @ d.to(wide)).double().cpu().numpy()
    return np.asarray(np.linalg.lstsq(C / np.outer(size, size), products / size, rcond=1e-10)[0] / size)
