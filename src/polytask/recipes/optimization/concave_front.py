"""Which methods reach a concave Pareto front (experiment of the survey of Chen et al. 2025, arXiv:2501.10945)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from polytask.balancing import Balancer, backward, make
from polytask.recipes import Arm, Check, Measure, Recipe, Results, Trial, recipe
from polytask.recipes.figure import dots

RAYS = tuple(round(0.1 * i, 1) for i in range(1, 10))
NEAR = 0.1  # of an end of the front


@recipe(
    "concave-front",
    domain="optimization",
    paper="arXiv:2501.10945",
    claim="On a concave front linear scalarization ends at the end points whatever the weights, while smooth Tchebycheff scalarization, "
    "EPO search and FERERO land on the asked rays and cover the front.",
    reference="The specification's run (its figures): linear scalarization puts 100 % of the solutions within 0.1 of an end, angle 68 "
    "degrees, hypervolume .042; STCH 2.0 degrees, EPO 0.3, FERERO 0.0, their hypervolumes .29.",
    seeds=3,
    quick={"steps": 20},
)
class ConcaveFront(Recipe):
    r"""Can a weighted sum reach the middle of a concave front?

    :math:`f_{1,2}(x) = 1 - \exp(-\lVert x \mp 1/\sqrt n \rVert^2)`, n = 20, nine rays (a, 1 - a), a start drawn uniformly from
    :math:`[-0.3, 0.3]^n` for each, plain gradient descent. A solution on ray p has losses parallel to p, so the Tchebycheff arms weigh
    with 1 / p; the sums weigh with p. EPO, FERERO, WC-MGDA and Pareto MTL are given p itself, and the last one the other eight rays too,
    with a fifth of the steps for its first stage. There is nothing to be tuned beyond the nine weights that every arm has.

    Args:
        steps: of gradient descent.
        learning_rate: its rate.
        mu: smoothness of STCH, at weights 1 / p as they are.
    """

    steps: int = 400
    learning_rate: float = 0.1
    mu: float = 0.1

    arms: ClassVar = (
        Arm("ls", "linear scalarization"),
        Arm("mgda", "MGDA, weights as preference"),
        Arm("tch", "Tchebycheff"),
        Arm("pmtl", "Pareto MTL"),
        Arm("wc_mgda", "WC-MGDA"),
        Arm("stch", "smooth Tchebycheff", "method"),
        Arm("epo", "EPO search", "method"),
        Arm("ferero", "FERERO", "method"),
    )
    measures: ClassVar = (
        Measure("angle", "mean angle between the losses and the asked ray, in degrees"),
        Measure("hypervolume", "hypervolume with reference (1, 1)", True),
        Measure("at_ends", "share of solutions within 0.1 of an end of the front", None),
    )

    def trial(self, arm: str, seed: int, candidate: Any = None) -> Trial:  # noqa: ARG002
        g = torch.Generator().manual_seed(seed)
        found = torch.stack([self._descend(arm, a, 0.6 * torch.rand(20, generator=g) - 0.3) for a in RAYS])
        rays = torch.tensor([[a, 1 - a] for a in RAYS])
        cosine = (found * rays).sum(1) / (found.norm(dim=1) * rays.norm(dim=1))
        ends = torch.stack([objectives(x) for x in (torch.full((20,), s / 20**0.5) for s in (1, -1))])
        values = {
            "angle": float(torch.rad2deg(torch.arccos(cosine.clamp(-1, 1))).mean()),
            "hypervolume": hypervolume(found),
            "at_ends": float((torch.cdist(found, ends).amin(1) < NEAR).float().mean()),
        }
        return Trial(values, curves={"first": found[:, 0].tolist(), "second": found[:, 1].tolist()})

    def judge(self, results: Results) -> Sequence[Check]:
        at_ends, theirs = results.mean("ls", "at_ends"), results.mean("ls", "hypervolume")
        checks = [
            Check(f"linear scalarization puts {at_ends:.0%} of the solutions at an end (80 % asked)", at_ends >= 0.8)
        ]
        for arm in (arm for arm in self.arms if arm.role == "method"):
            angle, ours = results.mean(arm.name, "angle"), results.mean(arm.name, "hypervolume")
            checks += [
                Check(f"{arm.label} is {angle:.1f} degrees from the asked rays (less than 3 asked)", angle < 3),
                Check(
                    f"hypervolume {ours:.3f} of {arm.label} against {theirs:.3f} of linear scalarization (0.15 more asked)",
                    ours > theirs + 0.15,
                ),
            ]
        return checks

    def figures(self, results: Results) -> Mapping[str, str]:
        return {"measures.svg": dots(results, self.arms, "A concave front")}

    def _descend(self, arm: str, a: float, start: Tensor) -> Tensor:
        """The losses where the descent for the ray (a, 1 - a) ends."""
        balancer, unit = _balancer(arm, a, self.mu, self.steps // 5)
        x = start.clone().requires_grad_()
        for _ in range(self.steps):
            x.grad = None
            backward(list(objectives(x)), shared=[x], balancer=balancer)
            assert x.grad is not None
            with torch.no_grad():
                x -= self.learning_rate * unit * x.grad
        return objectives(x.detach())


def _balancer(arm: str, a: float, mu: float, warmup: int) -> tuple[Balancer, float]:
    """The method for a ray, and what its gradient is multiplied by: the library scales weights to the sum 2, the experiment does not."""
    ray, inverse = [a, 1 - a], [1 / a, 1 / (1 - a)]
    match arm:
        case "ls":
            return make("equal", preference=ray), 0.5
        case "tch":
            return make("tchebycheff", modified=True, preference=ray), 2.0
        case "stch":  # 2 m log sum exp(p f / m), p = 2 w / sum w, is mu log sum exp(w f / mu) times 4 / sum w where m = 2 mu / sum w
            total = sum(inverse)
            return make("stch", warmup=None, mu=2 * mu / total, preference=inverse), total / 4
        case "pmtl":
            others = [[b, 1 - b] for b in RAYS if b != a]
            return make("pmtl", others=others, warmup=warmup, preference=ray), 1.0
    return make(arm, preference=ray), 1.0


def objectives(x: Tensor) -> Tensor:
    """Both losses, shape (2,)."""
    c = torch.full_like(x, len(x) ** -0.5)
    return torch.stack([1 - torch.exp(-((x - c) ** 2).sum()), 1 - torch.exp(-((x + c) ** 2).sum())])


def hypervolume(points: Tensor) -> float:
    """The area that points of shape (n, 2) dominate within the unit square, lower being better."""
    area, lowest = 0.0, 1.0
    for first, second in sorted(points.tolist()):
        if first < 1 and second < lowest:
            area += (1 - first) * (lowest - second)
            lowest = second
    return area
