"""What all balancing methods share: their tasks and preference, what they keep from step to step, and how it is saved."""

from __future__ import annotations

import copy
import zlib
from abc import ABC
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from polytask.autograd import Processes, Workspace
from polytask.balancing.given import given_losses, refuse_negative, refuse_preference
from polytask.balancing.observation import Observation
from polytask.balancing.packing import packed, unpacked
from polytask.errors import InputError

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
