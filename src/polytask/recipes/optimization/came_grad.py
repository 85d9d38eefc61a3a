"""CAME-Grad on two conflicting tasks and a narrow trunk (Zhang et al., ICML 2026, arXiv:2605.22635)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.balancing import Balancer, backward, make
from polytask.models import HardSharing
from polytask.recipes import Arm, Check, Measure, Recipe, Results, Trial, recipe

SCALARIZATION = {"nu": 1.0, "kappa": 1.0}  # with these the method is the weighted sum, exactly
OPTIONS: dict[str, dict[str, float]] = {"came_grad": {}, "cagrad_direction": {"nu": 0.0, "kappa": 1.0}}


@dataclass(frozen=True)
class Sample:
    """Inputs of one split with the labels of both tasks."""

    x: Tensor
    value: Tensor
    label: Tensor

    def losses(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Squared error of the regression and cross entropy of the label, of those that the model serves."""
        charged: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
            "value": (F.mse_loss, self.value),
            "label": (F.binary_cross_entropy_with_logits, self.label),
        }
        return {n: charge(outputs[n][:, 0], y) for n, (charge, y) in charged.items() if n in outputs}


@recipe(
    "came-grad",
    domain="optimization",
    paper="arXiv:2605.22635",
    claim="With the same task weights and plain SGD, CAME-Grad ends with lower held-out losses on both of two conflicting tasks than "
    "linear scalarization, and than linear scalarization with 1.5 times the learning rate (which is what its gain alone would do).",
    reference="The specification's prototype (its figures, 5 seeds), as (mse, bce): linear scalarization (0.128, 0.200), with 1.5x rate "
    "(0.107, 0.186), CAGrad direction (0.076, 0.188), CAME-Grad (0.064, 0.161); conflict rate above 0.9. The paper's claim is about "
    "radiology reports, +2.3 % clinical efficacy on MIMIC-CXR: that needs credentialed data and is not tried here.",
    seeds=5,
    quick={"points": 256, "steps": 20},
)
class CAMEGradRecipe(Recipe):
    """Does repairing direction and magnitude beat a weighted sum, beyond what a larger step does?

    A teacher h = tanh(2 x W), x in R^16, W 16 x 8, gives a regression target h v1 (standardised) and a label h v2 + 0.3 noise > 0, with
    v2 = -0.7 v1 + 0.7 v2': the tasks conflict. The student has a trunk 16-16-2 and linear heads; full batches, plain SGD, w = (1, 4).

    Args:
        points: examples, half of them for training and half held out.
        steps: gradient steps.
        learning_rate: of plain SGD.
        teacher_scale: standard deviation of W's entries; the specification does not give it. At 1/4 the entries of x W have variance 1 and
            the scalarization rows come out near the prototype's; the checks were met with 1 as well, at higher losses throughout.
    """

    points: int = 3072
    steps: int = 300
    learning_rate: float = 0.05
    teacher_scale: float = 0.25

    arms: ClassVar = (
        Arm("single_task", "two single-task models", "reference"),
        Arm("equal", "equal weights"),
        Arm("ls", "linear scalarization"),
        Arm("ls_faster", "same, 1.5x rate"),
        Arm("ls_tuned", "same, 1.5x rate, tuned weights", candidates=(0.5, 1.0, 2.5, 4.0, 4.5)),
        Arm("cagrad_direction", "rectified direction only", "method"),
        Arm("came_grad", "CAME-Grad", "method"),
    )
    measures: ClassVar = (
        Measure("mse", "held-out mean squared error of the regression, in variances of its target"),
        Measure("bce", "held-out cross entropy of the label, in nats"),
        Measure("conflict_rate", "share of steps in which the two gradients had a negative product", None),
    )

    def trial(self, arm: str, seed: int, candidate: Any = None) -> Trial:
        data = _draw(self.points, self.teacher_scale, seed)
        w = {"value": 1.0, "label": 4.0}
        if arm == "equal":
            w = {"value": 2.5, "label": 2.5}
        if candidate is not None:
            w = {"value": 5.0 - candidate, "label": candidate}
        rate = self.learning_rate * (1.5 if arm in ("ls_faster", "ls_tuned") else 1.0)
        together = [("value",), ("label",)] if arm == "single_task" else [("value", "label")]
        found: dict[str, float] = {}
        chosen_by: dict[str, float] = {}
        conflicts = 0
        for names in together:
            balancer = make("came_grad", preference={n: w[n] for n in names}, **OPTIONS.get(arm, SCALARIZATION))
            model, opposed = _train(data["train"], balancer, w, names, rate, self.steps, seed)
            conflicts += opposed
            found |= _losses(model, data["test"])
            chosen_by |= _losses(model, data["validation"])
        values = {"mse": found["value"], "bce": found["label"], "conflict_rate": conflicts / self.steps}
        return Trial(values, selection=chosen_by["value"] * chosen_by["label"])

    def judge(self, results: Results) -> Sequence[Check]:
        checks = []
        for other, label in (("ls", "linear scalarization"), ("ls_faster", "linear scalarization with 1.5x rate")):
            pairs = [(m, results.mean("came_grad", m), results.mean(other, m)) for m in ("mse", "bce")]
            text = ", ".join(f"{m} {ours:.3f} against {theirs:.3f}" for m, ours, theirs in pairs)
            checks.append(
                Check(f"lower mean of both than {label}: {text}", results.better("came_grad", other, "mse", "bce"))
            )
        share = results.share_better("came_grad", "ls", "mse", "bce")
        checks.append(
            Check(f"lower on both tasks at once in {share:.0%} of the seeds (at least 80 % asked)", share >= 0.8)
        )
        rate = results.mean("came_grad", "conflict_rate")
        checks.append(Check(f"the gradients conflict in {rate:.1%} of the steps (more than 90 % asked)", rate > 0.9))
        return checks


def _draw(points: int, scale: float, seed: int) -> dict[str, Sample]:
    """Training and test halves of the teacher's data, and as much again as the test half to select by."""
    g = torch.Generator().manual_seed(seed)
    W, v1, other = torch.randn(16, 8, generator=g), torch.randn(8, generator=g), torch.randn(8, generator=g)
    v2 = -0.7 * v1 + 0.7 * other
    half = points // 2
    x = torch.randn(3 * half, 16, generator=g)
    h = torch.tanh(2 * scale * x @ W)
    value = h @ v1
    value = (value - value.mean()) / value.std()
    label = (h @ v2 + 0.3 * torch.randn(3 * half, generator=g) > 0).float()
    parts = zip(*(torch.split(whole, half) for whole in (x, value, label)), strict=True)
    return dict(zip(("train", "test", "validation"), (Sample(*part) for part in parts), strict=True))


def _train(
    train: Sample, balancer: Balancer, w: Mapping[str, float], names: Sequence[str], rate: float, steps: int, seed: int
) -> tuple[HardSharing, int]:
    """The trained model and the number of steps in conflict."""
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2), nn.Tanh())
    model = HardSharing(trunk, {n: nn.Linear(2, 1) for n in names})
    # a head follows the gradient of its own weighted loss: under plain SGD that is w times the rate
    heads: list[dict[str, Any]] = [{"params": list(model.task_parameters(n)), "lr": rate * w[n]} for n in names]
    optimizer = torch.optim.SGD([{"params": list(trunk.parameters())}, *heads], lr=rate)
    opposed = 0
    for _ in range(steps):
        optimizer.zero_grad()
        seen = backward(train.losses(model(train.x)), shared=trunk, balancer=balancer)
        opposed += seen.gramian is not None and bool(seen.gramian.min() < 0)
        optimizer.step()
    return model, opposed


@torch.no_grad()
def _losses(model: HardSharing, sample: Sample) -> dict[str, float]:
    return {n: float(loss) for n, loss in sample.losses(model(sample.x)).items()}
