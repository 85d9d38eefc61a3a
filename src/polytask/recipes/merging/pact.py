"""PACT where fine-tuning leaks onto a core that all tasks share (Shi et al. 2026, arXiv:2606.18627)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from polytask.errors import InputError
from polytask.merging import Filter, Place, merge
from polytask.merging.pact import PACT, intrusion
from polytask.merging.sift import SIFT
from polytask.merging.subspaces import without
from polytask.recipes import Arm, Check, Measure, Recipe, Results, Trial, recipe

INPUTS, OUTPUTS, CORE, PRIVATE = 64, 48, 6, 5
SCALES = tuple(round(0.1 * i, 1) for i in range(1, 13))
PLACE = Place("layer")
SHIPPED = 0.8


class RandomSubspace(Filter):
    """Keeps each task vector off as many random directions as PACT keeps it off chosen ones: the control of the experiment.

    Args:
        pact: decides how many.
        seed: of the directions.
    """

    def __init__(self, pact: PACT, seed: int) -> None:
        self.pact, self.seed = pact, seed

    def apply(self, W0: Tensor, D: Tensor, place: Place) -> Tensor:
        g = torch.Generator().manual_seed(self.seed)
        for tau, P in zip(D, self.pact.protected(W0, D, place), strict=True):
            tau.copy_(without(tau, torch.linalg.qr(torch.randn(P.shape, generator=g, dtype=P.dtype))[0]))
        return D


@dataclass(frozen=True)
class Family:
    """A base, its experts, and for each task what the base lacks on its private inputs."""

    base: Tensor
    experts: tuple[Tensor, ...]
    core: Tensor
    private: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]

    @cached_property
    def intrusion(self) -> float:
        """The mean share of a task vector's energy within the space protected from it."""
        D = torch.stack(self.experts) - self.base
        spaces = PACT(core_ratio=CORE / OUTPUTS, task_rank=PRIVATE).protected(self.base, D, PLACE)
        return sum(intrusion(tau, P) for tau, P in zip(D, spaces, strict=True)) / len(D)

    def error(self, W: Tensor, task: int) -> float:
        """Expected squared error on inputs whose private part has nothing to do with the core, in units of the base's.

        With independent standard normal coordinates the expectation is a sum of squares: no test sample is drawn.
        """
        A, tau = self.targets[task], W - self.base
        wrong = (tau @ self.core).square().sum() + (tau @ self.private[task] - A).square().sum()
        return float(wrong / A.square().sum())


@recipe(
    "pact",
    domain="merging",
    paper="arXiv:2606.18627",
    claim="Before task arithmetic, PACT more than halves the error that comes of updates leaking onto directions that other tasks rely on; "
    "removing as many random directions does harm; and the ratio shipped with the paper's code is refused instead of leaving nothing.",
    reference="The specification's prototype (its figures, 5 seeds), as shares of the base's error: experts alone .06, task arithmetic "
    ".21-.23, PACT .026-.029, random directions .61-.68, the shipped ratio 1.00. The paper's claim is about eight image tasks on CLIP, "
    "whose checkpoints are not at hand.",
    seeds=5,
    quick={"tasks": 3, "steps": 60},
)
class PACTRecipe(Recipe):
    """Does it help to keep task vectors off what other tasks rely on without having changed it?

    One linear layer, 64 inputs, 48 outputs. The base is strong on a core of 6 directions, with noise elsewhere; each task adds a map from
    5 private directions. Experts start from the base and descend for some steps on 60 noisy samples whose private coordinates are
    correlated with the core, so that updates leak onto it; in the error they are not. The error is the exact expectation, and each arm
    has the scale at which its own is least, as in the specification.

    Args:
        tasks: how many experts.
        steps: of plain gradient descent, at rate 0.05.
        samples: for each expert.
        noise: standard deviation of what is added to the targets.
        mixing: how much of a private coordinate is the core's, while fine-tuning.
        strength: standard deviation of the base's map on the core.
        size: standard deviation of the tasks' maps. The specification leaves it and the strength open.
    """

    tasks: int = 6
    steps: int = 300
    samples: int = 60
    noise: float = 1.0
    mixing: float = 0.4
    strength: float = 1.0
    size: float = 1.0

    arms: ClassVar = (
        Arm("single_task", "each expert on its own task", "reference"),
        Arm("task_arithmetic", "task arithmetic", candidates=SCALES),
        Arm("random", "random directions, task arithmetic", candidates=SCALES),
        Arm("sift", "SIFT, task arithmetic", "method", candidates=SCALES),
        Arm("pact", "PACT, task arithmetic", "method", candidates=SCALES),
        Arm("shipped", "PACT with the shipped ratio", "method"),
    )
    measures: ClassVar = (
        Measure("error", "expected squared error, in units of the base's"),
        Measure("intrusion", "share of the task vectors' energy on what other experts rely on", None),
        Measure("refused", "1 where the library refused to merge", None),
    )

    def trial(self, arm: str, seed: int, candidate: Any = None) -> Trial:
        family = _family(self, seed)
        models, refused = family.experts, 0.0
        if arm != "single_task":
            try:
                models = (family.base + (candidate or 1.0) * _update(self, arm, seed),) * self.tasks
            except InputError:
                models, refused = (family.base,) * self.tasks, 1.0
        error = sum(family.error(W, t) for t, W in enumerate(models)) / self.tasks
        return Trial({"error": error, "intrusion": family.intrusion, "refused": refused}, selection=error)

    def judge(self, results: Results) -> Sequence[Check]:
        ours, plain, random = (results.values(a, "error") for a in ("pact", "task_arithmetic", "random"))
        refused = results.values("shipped", "refused")
        return [
            Check(
                f"less than half of task arithmetic's error in every seed: at most {(ours / plain).max():.2f} of it "
                f"({ours.mean():.3f} against {plain.mean():.3f})",
                bool((ours < 0.5 * plain).all()),
            ),
            Check(
                f"less than with as many random directions in every seed ({ours.mean():.3f} against {random.mean():.3f})",
                bool((ours < random).all()),
            ),
            Check(
                f"the shipped ratio is refused in {refused.mean():.0%} of the seeds (all asked)",
                bool((refused == 1).all()),
            ),
        ]


@lru_cache(maxsize=8)
def _update(options: PACTRecipe, arm: str, seed: int) -> Tensor:
    """What an arm adds to the base at scale 1; it is linear in the scale."""
    family = _family(options, seed)
    pact = PACT(core_ratio=CORE / OUTPUTS, task_rank=PRIVATE)
    filters: dict[str, list[Filter]] = {
        "task_arithmetic": [],
        "pact": [pact],
        "random": [RandomSubspace(pact, seed)],
        "sift": [SIFT(core_ratio=CORE / OUTPUTS)],
        "shipped": [PACT(core_ratio=SHIPPED, task_rank=10)],
    }
    experts = [{"layer": W} for W in family.experts]
    merged = merge({"layer": family.base}, experts, "task_arithmetic", filters=filters[arm], scale=1.0)
    return merged["layer"] - family.base


@lru_cache(maxsize=2)
def _family(options: PACTRecipe, seed: int) -> Family:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    directions = torch.linalg.qr(draw(INPUTS, CORE + PRIVATE * options.tasks))[0]
    core, *private = directions.split([CORE] + [PRIVATE] * options.tasks, dim=1)
    base = options.strength * draw(OUTPUTS, CORE) @ core.T + 0.15 * draw(OUTPUTS, INPUTS)
    targets, experts = [], []
    for P in private:
        A = options.size * draw(OUTPUTS, PRIVATE)
        c, own = draw(options.samples, CORE), draw(options.samples, PRIVATE)
        s = own + options.mixing * c[:, :PRIVATE]
        x = c @ core.T + s @ P.T
        lacking = s @ A.T + options.noise * draw(options.samples, OUTPUTS)
        W = base.clone()
        for _ in range(options.steps):
            W -= 0.05 * (x @ (W - base).T - lacking).T @ x / options.samples
        targets.append(A)
        experts.append(W)
    return Family(base, tuple(experts), core, tuple(private), tuple(targets))
