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

import copy
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from polytask.autograd import Processes, TaskGradients, Workspace, gramian
from polytask.balancing.given import (
    given_gramian,
    given_jacobian,
    given_losses,
    refuse_negative,
    refuse_nonfinite,
    refuse_preference,
)
from polytask.balancing.observation import Observation
from polytask.balancing.packing import packed, unpacked
from polytask.errors import InputError
from polytask.linalg import DOUBLE, SINGLE

if TYPE_CHECKING:
    from polytask.registry import Method

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]
Preference = Sequence[float] | Mapping[str, float] | None
Role = Literal["train", "validation"]


class BaseOptions(TypedDict, total=False):
    """What every balancer takes beside its own options; see :class:`Balancer`."""

    preference: Preference
    log_losses: bool
    every: int
    seed: int


class Balancer(ABC):
    """A stateful rule that turns the losses of several tasks into one update.

    Args:
        preference: positive importance of each task, by position or by name; ones when omitted. Only its direction matters.
        log_losses: balance log L instead of L (all losses must be positive): a scale-free start for any method. Without effect on the
            methods that take logarithms themselves. Gradients given by hand are those of L, and their losses are needed; without losses
            they count as those of log L.
        every: ask the method at every so many steps only and use its last weights between, as long as the same tasks are present: such
            a step costs what a plain one does. A method that returns no weights keeps the combination of gradients nearest to its
            direction. Without effect on methods that need the values of the losses only, whose weights cost nothing.
        seed: seeds the method's own random generator, whose state is part of ``state_dict``.

    Attributes:
        tasks: names of all tasks ever to be seen, fixed by :meth:`bind`; batches may lack some of them.
        active: indices into ``tasks`` of those present in the current call.
        state: everything that must survive a restart: tensors, arrays, numbers, by name.
        observation: what the last step saw.
        workspace: memory for the task gradients, kept between steps.
        probed: how many losses a backward pass takes, by the model's shape, where that was measured.
        branches: balancers like this one for further groups of shared parameters; see :meth:`branch`.
        roles: of the independent batches it looks at in a step: ``train`` ones, of which the last is followed, and ``validation`` ones,
            whose gradients never reach the parameters. Where these are more than one, see :func:`polytask.backward_batches`.
        remembers_gradients: whether gradients of several steps are compared, which ``level="auto"`` then takes at the parameters: those
            at a representation belong to other examples in every step.
        agreed_in: the group of processes whose balancers have the same state and random numbers.
    """

    needs: ClassVar[str]
    method: ClassVar[Method]
    needs_second_evaluation: bool = False
    takes_logarithms: ClassVar[bool] = False
    remembers_gradients: ClassVar[bool] = False
    roles: tuple[Role, ...] = ("train",)

    def __init__(
        self, *, preference: Preference = None, log_losses: bool = False, every: int = 1, seed: int = 0
    ) -> None:
        if preference is not None:
            refuse_preference(preference)
        if not (isinstance(every, int) and every >= 1):
            raise InputError(f"weights are found anew at every 1, 2, 3 ... steps, not every={every!r}")
        if not (isinstance(seed, int | np.integer) and seed >= 0):
            raise InputError(f"a seed is a whole number from 0 on, not seed={seed!r}")
        self.preference = preference
        self.log_losses = log_losses
        self.every, self.seed = every, seed
        self.rng = np.random.default_rng(seed)
        self.tasks: tuple[str, ...] | None = None
        self.active: npt.NDArray[np.intp] = np.empty(0, dtype=np.intp)
        self.state: dict[str, Any] = {}
        self.kept: dict[str, Any] = {"weights": None, "steps_left": 0}
        self.branches: dict[str, Balancer] = {}
        self.probed: dict[str, int] = {}
        self.agreed_in: Any = None
        self.observation: Observation | None = None
        self.workspace = Workspace()

    def initial_state(self, n_tasks: int) -> dict[str, Any]:  # noqa: ARG002
        """The state before the first step, all of it, with its final shapes."""
        return {}

    def bind(self, tasks: Sequence[str]) -> None:
        """Fix the tasks (once) and create the state; or find the given tasks among those fixed before.

        Raises:
            InputError: a task that was not among the first ones, or a preference that does not fit.
        """
        if self.tasks is None:
            self._check_preference(tasks)
            self.tasks = tuple(tasks)
            self.state = self.initial_state(len(self.tasks))
        unknown = [t for t in tasks if t not in self.tasks]
        if unknown:
            raise InputError(
                f"this balancer serves the tasks {', '.join(map(str, self.tasks))}; {', '.join(map(str, unknown))} is not one of them: "
                "where the first batch lacks some tasks, call balancer.bind(all of them) before it"
            )
        self.active = np.array([self.tasks.index(t) for t in tasks], dtype=np.intp)

    def _check_preference(self, tasks: Sequence[str]) -> None:
        if self.preference is None:
            return
        if isinstance(self.preference, Mapping) and set(self.preference) != set(tasks):
            raise InputError(f"the preference names {sorted(self.preference)}, the tasks are {sorted(tasks)}")
        if len(self.preference) != len(tasks):
            raise InputError(f"the preference has {len(self.preference)} numbers for {len(tasks)} tasks")

    def _names(self) -> list[str]:
        """The active tasks."""
        assert self.tasks is not None
        return [self.tasks[i] for i in self.active]

    def _bind_count(self, n: int) -> None:
        # direct calls give no names: all tasks are present, in order
        if self.tasks is None:
            self.bind([str(i) for i in range(n)])
        if self.tasks is not None and len(self.active) != n:
            if n != len(self.tasks):
                raise InputError(f"this balancer serves {len(self.tasks)} tasks and was given {n}")
            self.active = np.arange(n)

    @property
    def importance(self) -> Vector:
        """The preference of the active tasks as it was given, shape (active,); ones when it was omitted."""
        if self.preference is None:
            return np.ones(len(self.active))
        assert self.tasks is not None
        ordered = (
            [self.preference[t] for t in self.tasks] if isinstance(self.preference, Mapping) else list(self.preference)
        )
        return np.asarray(ordered, dtype=np.float64)[self.active]

    @property
    def p(self) -> Vector:
        """The preference of the active tasks, shape (active,), scaled to sum to their number."""
        importance = self.importance
        return np.asarray(importance * (len(importance) / importance.sum()))

    def reuse(self) -> Vector | None:
        """With ``every``: the weights of an earlier step, shape (active,), where they serve this one too, which then counts as a step."""
        weights = self.kept["weights"]
        if self.kept["steps_left"] == 0 or set(np.flatnonzero(~np.isnan(weights))) != set(self.active):
            return None
        self.kept["steps_left"] -= 1
        return np.asarray(weights[self.active])

    def keep(self, weights: Vector) -> None:
        """Remember the weights of the active tasks for the steps up to the next time the method is asked."""
        if self.every > 1 and self.tasks is not None:
            remembered = np.full(len(self.tasks), np.nan)
            remembered[self.active] = weights
            self.kept = {"weights": remembered, "steps_left": self.every - 1}

    def branch(self, key: str) -> Balancer:
        """The balancer, with state and generator of its own, of a further group of shared parameters; bound to the same tasks."""
        assert self.tasks is not None
        if key not in self.branches:
            new = self._copy()
            new.rng = np.random.default_rng([self.seed, zlib.crc32(key.encode())])
            new.bind(self.tasks)
            self.branches[key] = new
        return self.branches[key]

    def _copy(self) -> Self:
        """One with the same options and nothing seen."""
        new = copy.copy(self)
        new.tasks, new.state, new.branches, new.observation = None, {}, {}, None
        new.kept, new.workspace, new.rng = {"weights": None, "steps_left": 0}, Workspace(), np.random.default_rng()
        new.probed = {}
        return new

    def begin_epoch(self) -> None:  # noqa: B027
        """Told by the training loop at the start of each epoch; for methods that work on epoch means."""

    def after_validation(self, metric: float) -> None:  # noqa: B027
        """Told by the training loop what an epoch's validation gave, lower being better; for methods with a schedule of their own."""

    def after_step(self, losses: Mapping[str, Tensor], counts: Mapping[str, float | Tensor] | None = None) -> None:
        """Told the losses of the same batch after the optimizer's step, where ``needs_second_evaluation`` asks for them.

        Where processes share the batch, each tells its own, of the same tasks, and their means by ``counts`` (labelled examples; equal
        when omitted) are learnt from.
        """
        if self.agreed_in is not None and losses:
            mine = torch.stack([v.detach().reshape(()) for v in losses.values()])
            number = torch.tensor([1.0 if counts is None else float(counts[n]) for n in losses]).to(mine)
            total, number = Processes(self.agreed_in).sum_(torch.stack([mine * number, number]))
            losses = {n: t / c for n, t, c in zip(losses, total, number, strict=True) if c > 0}
        self.look_again(losses)

    def look_again(self, losses: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Learn from the losses of the same batch after the optimizer's step, shape () each, of all processes."""

    @property
    def logarithmic(self) -> bool:
        """Whether what is balanced are logarithms of the losses."""
        return self.log_losses and not self.takes_logarithms

    def _balanced(self, losses: Any) -> tuple[Tensor | None, Tensor | None]:
        """What is balanced of losses given by hand, and its derivatives by them where these are not 1; shape (tasks,) each."""
        if losses is None:
            return None, None
        values = given_losses(losses, self._names())
        if not self.logarithmic:
            return values, None
        refuse_negative(dict(zip(self._names(), values.tolist(), strict=True)))
        L = values.clone().requires_grad_()
        balanced = self.transform(L)
        return balanced.detach(), torch.autograd.grad(balanced.sum(), L)[0]

    def transform(self, losses: Float[Tensor, "*tasks"]) -> Float[Tensor, "*tasks"]:
        """What is balanced, elementwise: L, or log L with ``log_losses``."""
        if not self.logarithmic:
            return losses
        return torch.log(losses.clamp_min(torch.finfo(losses.dtype).tiny))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a restarted run needs: tasks, state, generator. Tensors, numbers and strings only: any checkpoint holds them."""
        return {
            "tasks": list(self.tasks) if self.tasks is not None else None,
            "seed": self.seed,
            "rng": copy.deepcopy(self.rng.bit_generator.state),
            "state": packed(self.state),
            "kept": packed(self.kept),
            "probed": dict(self.probed),
            "branches": {key: b.state_dict() for key, b in self.branches.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            InputError: what is no balancer's state, another method's, or that of more or fewer tasks than there are preferences.
        """
        missing = [part for part in ("tasks", "seed", "rng", "state", "kept", "branches") if part not in state]
        if missing:
            raise InputError(f"this is no state of a balancer: it has no {missing[0]!r}")
        tasks = tuple(state["tasks"]) if state["tasks"] is not None else None
        if tasks is not None:
            self._check_preference(tasks)
            expected = set(self.initial_state(len(tasks)))
            if set(state["state"]) != expected:
                raise InputError(
                    f"{self.method.name} keeps {', '.join(sorted(expected)) or 'nothing'}, and the state given holds "
                    f"{', '.join(sorted(state['state'])) or 'nothing'}: it is another method's"
                )
        self.tasks, self.active = tasks, np.arange(len(tasks or ()))
        self.rng.bit_generator.state = copy.deepcopy(state["rng"])
        self.state = unpacked(dict(state["state"]))
        self.kept = unpacked(dict(state["kept"]))
        self.probed = dict(state.get("probed", {}))
        self.seed = state["seed"]
        self.branches = {key: self._copy() for key in state["branches"]}
        for key, branch in self.branches.items():
            branch.load_state_dict(state["branches"][key])

    def __repr__(self) -> str:
        shown = {n: getattr(self, n) for n in self.method.options if n not in ("seed",) and hasattr(self, n)}
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in shown.items() if v is not None)})"


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
