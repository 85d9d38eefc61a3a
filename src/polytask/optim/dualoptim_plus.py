"""DualOptim+: one shared and one own Adam state for each objective (Zhong et al., ICML 2026, arXiv:2605.21539)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.autograd import Losses
from polytask.errors import InputError
from polytask.optim.blockwise import dequantise, quantise
from polytask.optim.combination import TaskBalancer
from polytask.optim.task_optimizer import TaskOptimizer, evaluated, working
from polytask.registry import register

States = Literal["both", "base", "delta"]

SIGNED = {"m": True, "v": False}  # of the base; a delta's second moment may be negative


@register(
    "dualoptim_plus",
    family="optim",
    paper="arXiv:2605.21539",
    needs="optimizer",
    aliases=("DualOptimPlus",),
)
class DualOptimPlus(TaskOptimizer):
    r"""Adam for objectives that take turns: what they have in common is remembered once, what sets each apart for itself.

    At a step of objective o with gradient g, step size :math:`\eta_o` and decoupled weight decay, the base moments
    :math:`m_B, v_B` are read before, and updated after, the parameters:

    .. math:: m_o \leftarrow \beta_1 m_o + (1-\beta_1)(g - \hat m_B), \qquad
        v_o \leftarrow \beta_2 v_o + (1-\beta_2)(g^2 - \hat v_B)

    .. math:: \theta \leftarrow \theta - \eta_o\, \frac{\hat m_o + \hat m_B}{\sqrt{|\hat v_o + \hat v_B|} + \epsilon}, \qquad
        m_B \leftarrow B_1 m_B + (1-B_1) g, \quad v_B \leftarrow B_2 v_B + (1-B_2) g^2

    Hats correct for the start; the base is corrected for the gradients it has seen, one fewer than the steps. Where the objectives agree
    the deltas vanish; where the base averages to nothing each objective has an Adam of its own. ::

        optimizer = DualOptimPlus(model.parameters(), {"forget": 1.0, "retain": 1.0}, lr=1e-5)
        for objective in turns({"forget": 1, "retain": 5}):
            optimizer.zero_grad()
            losses[objective](next(streams[objective])).backward()
            optimizer.step(objective=objective)

    Where every batch has the losses of all objectives, ``optimizer.backward(losses)`` differentiates that of the objective which has had
    the fewest steps, and ``optimizer.step()`` serves it.

    Args:
        params: parameters or groups of them.
        objectives: their names, or {name: factor of the learning rate} (which scales the weight decay too).
        lr: learning rate of factor 1.
        betas: :math:`\beta_1, \beta_2` of the deltas.
        base_betas: :math:`B_1, B_2` of the base.
        eps: :math:`\epsilon`.
        weight_decay: decoupled.
        states: ``both``; ``delta``: no base, which is DualOptim, an Adam for each objective; ``base``: no deltas, alternating steps on
            one state (read before the new gradient enters it).
        floor: c in :math:`|\hat v_o + \hat v_B| \ge c\, \hat v_B`; 0 as published. The sum can pass through zero, and the coordinate then
            takes one very long step; 0.01 prevents that.
        bits: 32, or 8: states of float tensors are kept block-wise in eight bits and computed with in single precision.
        quantised: which states 8 bits mean: ``both``, ``base`` or ``delta``.
        full_precision_below: tensors of fewer entries stay in 32 bits.
        foreach: update tensors of the same history together.

    Raises:
        InputError: an option outside its range, or no objective.

    Cost: one backward pass a step, that of its objective; 2 (1 + objectives) numbers a parameter, at 8 bits about as many bytes.
    Steps are counted for each parameter by the gradients it received, so that heads of single objectives are corrected rightly.
    """

    def __init__(
        self,
        params: Iterable[Any],
        objectives: Sequence[str] | Mapping[str, float] = ("forget", "retain"),
        *,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        base_betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        states: States = "both",
        floor: float = 0.0,
        bits: Literal[8, 32] = 32,
        quantised: States = "both",
        full_precision_below: int = 4096,
        foreach: bool = True,
    ) -> None:
        factors = dict(objectives) if isinstance(objectives, Mapping) else dict.fromkeys(objectives, 1.0)
        for name, value, allowed, valid in (
            ("objectives", objectives, "at least one name", bool(factors)),
            ("objectives", factors, "factors above 0", all(0 < f < math.inf for f in factors.values())),
            ("lr", lr, "a number of at least 0", 0 <= lr < math.inf),
            ("betas", betas, "numbers in [0, 1)", all(0 <= b < 1 for b in betas)),
            ("base_betas", base_betas, "numbers in [0, 1)", all(0 <= b < 1 for b in base_betas)),
            ("eps", eps, "a number above 0", 0 < eps < math.inf),
            ("weight_decay", weight_decay, "a number of at least 0", 0 <= weight_decay < math.inf),
            ("floor", floor, "a number of at least 0", 0 <= floor < math.inf),
            ("states", states, "'both', 'base' or 'delta'", states in ("both", "base", "delta")),
            ("quantised", quantised, "'both', 'base' or 'delta'", quantised in ("both", "base", "delta")),
            ("bits", bits, "8 or 32", bits in (8, 32)),
        ):
            if not valid:
                raise InputError(f"dualoptim_plus takes as {name} {allowed}, not {value!r}")
        self.factors, self.states, self.foreach = factors, states, foreach
        self.tasks = tuple(factors)
        self._turn: str | None = None
        self._eight_bits = frozenset(("base", "delta") if quantised == "both" else (quantised,)) if bits == 8 else ()
        self._full_below = full_precision_below
        # learning rates may be scheduled; the rest is read from each group too, so that groups may differ
        defaults = {"lr": lr, "betas": betas, "base_betas": base_betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay, "floor": floor})

    @classmethod
    def for_tasks(cls, parameters: Iterable[Tensor], tasks: Sequence[str], *, lr: float, weight_decay: float) -> Self:
        return cls(parameters, tasks, lr=lr, weight_decay=weight_decay)

    def backward(
        self, losses: Losses, *, balancer: TaskBalancer | str | None = None, scaler: torch.amp.GradScaler | None = None
    ) -> Float[Tensor, " tasks"]:
        """Add the gradient of one loss to ``.grad``: that of the objective, among those given, which has had the fewest steps.

        Args:
            losses: {objective: scalar}, or scalars, with graph.
            balancer: one that gives all objectives the same weight; nothing else has a meaning where they take turns.
            scaler: the gradient scaler of mixed precision; the gradients then stand scaled.

        Returns:
            1 for the objective whose turn it is and 0 for the others, shape (losses,); the turn lasts until ``step``.

        Raises:
            InputError: losses or objectives that do not fit, or different weights.
            TrainingError: a loss that is not finite (with an active scaler its step is skipped instead).

        Cost: one backward pass.
        """
        given = self.begin(losses, balancer, None, scaler)
        others = given.balancer is not None and given.balancer.method.name != "equal"
        if others or given.weights is None or not bool((given.weights == given.weights[0]).all()):
            raise InputError(
                "the objectives of dualoptim_plus take turns: give each a factor of the learning rate in place of a balancer"
            )
        if self._turn is None:
            served = {n: max((s["steps"][n] for s in self.state.values()), default=0) for n in given.names}
            self._turn = min(served, key=lambda n: served[n])
        weights = given.values.new_tensor([float(n == self._turn) for n in given.names])
        for name, loss in zip(given.names, given.losses, strict=True):
            if name == self._turn:
                (given.scale * loss).backward()  # type: ignore[no-untyped-call]
        return weights

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` and whose turn it is."""
        super().zero_grad(set_to_none)
        self._turn = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, objective: str | None = None) -> float | None:  # type: ignore[override]
        """One step with the gradient of one objective.

        Args:
            closure: evaluated first, where given.
            objective: whose gradient ``.grad`` holds; may be left out where there is only one, and after ``backward``.

        Raises:
            InputError: an objective that is none of those named at the start, or none where there are several.
        """
        o = (self._turn or (self.tasks[0] if len(self.tasks) == 1 else None)) if objective is None else objective
        if o not in self.factors:
            raise InputError(f"a step serves one of the objectives {', '.join(self.factors)}, not {objective!r}")
        loss = evaluated(closure)
        for group in self.param_groups:
            ready = [p for p in group["params"] if p.grad is not None]
            for p in ready:
                if not self.state[p]:
                    self.state[p].update(self._initial(p))
            for parameters in self._together(ready, o):
                self._update(parameters, group, o)
        self._turn = None
        return loss

    def _initial(self, p: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {"steps": dict.fromkeys(self.factors, 0)}
        for owner in (*((None,) if self.states != "delta" else ()), *(self.factors if self.states != "base" else ())):
            for moment in ("m", "v"):
                self._keep(state, owner, moment, torch.zeros_like(p, dtype=working(p.dtype)))
        return state

    def _keep(self, state: dict[str, Any], owner: str | None, moment: str, value: Tensor) -> None:
        """Store a moment of an objective, or of the base (``owner`` is None), in eight bits where that was asked for."""
        kind, key = ("base", moment) if owner is None else ("delta", f"{moment}:{owner}")
        if kind in self._eight_bits and value.numel() >= self._full_below:
            state[f"{key}.codes"], state[f"{key}.scale"] = quantise(value, SIGNED[moment] or kind == "delta")
        else:
            state[key] = value

    def moment(self, p: Tensor, moment: Literal["m", "v"], objective: str | None = None) -> Tensor:
        """A first ("m") or second ("v") moment of a parameter, uncorrected, in its shape: the base's, or an objective's delta."""
        state = self.state[p]
        key = moment if objective is None else f"{moment}:{objective}"
        if f"{key}.codes" in state:
            signed = SIGNED[moment] or objective is not None
            kept = dequantise(state[f"{key}.codes"], state[f"{key}.scale"], signed)
            return kept.view_as(p).to(working(p.dtype))
        found: Tensor | None = state.get(key)
        return torch.zeros_like(p, dtype=working(p.dtype)) if found is None else found

    def _together(self, parameters: Sequence[Tensor], o: str) -> Iterable[list[Tensor]]:
        if not self.foreach:
            return [[p] for p in parameters]

        def history(p: Tensor) -> tuple[str, str, int, int]:
            steps = self.state[p]["steps"]
            return str(p.device), str(p.dtype), steps[o], sum(steps.values())

        return [list(same) for _, same in groupby(sorted(parameters, key=history), key=history)]

    def _update(self, parameters: list[Tensor], group: Mapping[str, Any], o: str) -> None:
        """One step of tensors that have seen equally many gradients."""
        (b1, b2), (B1, B2), lr = group["betas"], group["base_betas"], group["lr"] * self.factors[o]
        seen = self.state[parameters[0]]["steps"]
        T, t = sum(seen.values()) + 1, seen[o] + 1
        g = [p.grad.to(working(p.dtype)) for p in parameters if p.grad is not None]
        gg = torch._foreach_mul(g, g)
        mB = [self.moment(p, "m") for p in parameters]
        vB = [self.moment(p, "v") for p in parameters]
        mB_hat = torch._foreach_div(mB, 1 - B1 ** (T - 1)) if T > 1 else mB
        vB_hat = torch._foreach_div(vB, 1 - B2 ** (T - 1)) if T > 1 else vB
        num, second = list(mB_hat), list(vB_hat)
        if self.states != "base":
            m = torch._foreach_lerp([self.moment(p, "m", o) for p in parameters], torch._foreach_sub(g, mB_hat), 1 - b1)
            v = torch._foreach_lerp(
                [self.moment(p, "v", o) for p in parameters], torch._foreach_sub(gg, vB_hat), 1 - b2
            )
            num = list(torch._foreach_add(torch._foreach_div(m, 1 - b1**t), mB_hat))
            second = list(torch._foreach_add(torch._foreach_div(v, 1 - b2**t), vB_hat))
            for p, m_o, v_o in zip(parameters, m, v, strict=True):
                self._keep(self.state[p], o, "m", m_o)
                self._keep(self.state[p], o, "v", v_o)
        second = list(torch._foreach_abs(second))
        if group["floor"]:
            second = list(torch._foreach_maximum(second, torch._foreach_mul(vB_hat, group["floor"])))
        den = torch._foreach_add(torch._foreach_sqrt(second), group["eps"])
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        moves = torch._foreach_div(num, den)
        torch._foreach_add_(parameters, [d.to(p.dtype) for d, p in zip(moves, parameters, strict=True)], alpha=-lr)
        if self.states != "delta":
            for p, m_new, v_new in zip(
                parameters, torch._foreach_lerp(mB, g, 1 - B1), torch._foreach_lerp(vB, gg, 1 - B2), strict=True
            ):
                self._keep(self.state[p], None, "m", m_new)
                self._keep(self.state[p], None, "v", v_new)
        for p in parameters:
            self.state[p]["steps"][o] += 1

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where ``state_dict()`` was taken.

        Raises:
            InputError: a state of other objectives.
        """
        saved = state_dict["state"]
        for entry in saved.values():
            if list(entry.get("steps", ())) != list(self.factors):
                raise InputError(f"this state was saved for other objectives than {', '.join(self.factors)}")
        super().load_state_dict(state_dict)
