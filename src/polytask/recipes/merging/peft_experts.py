"""Ensembling, merging and routing among low-rank experts (Lotfi et al. 2026, arXiv:2603.03535)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from polytask.merging.clustering import mbc_clusters
from polytask.merging.coefficients import (
    expert_losses,
    expert_probabilities,
    fit_coefficients,
    fit_ensemble,
    train_router,
)
from polytask.merging.fusion import Ensemble, ensemble, fusion_report, merge_experts, route_experts
from polytask.merging.greedy import greedy_coverage
from polytask.merging.library import ExpertLibrary
from polytask.merging.routed import recording, routed_layers
from polytask.recipes import Arm, Check, Measure, Recipe, Results, Trial, recipe
from polytask.recipes.merging.gaussian_tasks import World, gaussian_world, subspace_world

FEW = 4
FITTED = ("merge_model", "merge_layer", "merge_task", "ensemble_fitted")


@recipe(
    "peft-experts",
    domain="merging",
    paper="arXiv:2603.03535",
    claim="Fitted weights beat uniform ones, by 0.03 in merging and by 0.005 in ensembling; a learned router beats the best of both by "
    "0.04; with four experts chosen greedily it keeps half of its gain over the uniform merge; and Arrow, without training, finds a task's "
    "own expert for 70 % of the inputs where tasks live in orthogonal subspaces.",
    reference="The specification's prototype (its figures, seeds 0 / 1 / 2): base .469/.459/.420, uniform merge .451/.405/.401, fitted "
    "merge .511/.465/.454, uniform ensemble .494/.472/.414, fitted ensemble .512/.461/.461, learned router .625/.556/.511, router on "
    "greedy-4 .596/.494/.531, own expert .745/.783/.728, Arrow .383/.378/.343. The paper's own figures, for language models, are not "
    "tried here.",
    seeds=3,
    quick={"steps": 30, "router_steps": 30},
)
class PEFTExpertsRecipe(Recipe):
    """Is it worth more to weigh experts, to let the input choose among them, and how few of them suffice?

    A network 16-32-4, trained for 60 steps on 20 examples of each of five tasks, then frozen; inputs N(mu_t, 0.8^2), labels by the
    largest entry of (0.6 W + W_t)(x - mu_t). Eight experts of rank 4 on both layers, each from 150 examples: one a task, and three bad
    ones trained with nine labels of ten at random. Weights and routers are fitted on 40 examples a task, 400 judge. Means are standard
    normal and the base has 20 examples a task, which the specification leaves open. The last arm has other tasks: inputs of mean zero
    in orthogonal subspaces of four dimensions.

    Args:
        tasks: how many.
        bad: how many experts are bad.
        steps: of Adam for each expert.
        router_steps: of Adam for routers.
    """

    tasks: int = 5
    bad: int = 3
    steps: int = 150
    router_steps: int = 200

    arms: ClassVar = (
        Arm("base", "the base", "reference"),
        Arm("own", "each task's own expert", "reference"),
        Arm("merge_uniform", "merge, uniform"),
        Arm("merge_factors", "merge, A and B each uniform"),
        Arm("merge_model", "merge, fitted", "method"),
        Arm("merge_layer", "merge, fitted a layer", "method"),
        Arm("merge_task", "merge, fitted a task", "method"),
        Arm("ensemble_uniform", "ensemble, uniform"),
        Arm("ensemble_fitted", "ensemble, fitted", "method"),
        Arm("router", "router, learned", "method"),
        Arm("router_greedy", "router, learned, greedy 4", "method"),
        Arm("router_clusters", "router, learned, 4 clusters", "method"),
        Arm("arrow", "Arrow"),
        Arm("arrow_subspaces", "Arrow, top 1, orthogonal subspaces", "method"),
    )
    measures: ClassVar = (
        Measure("accuracy", "share of test examples that are right, mean over tasks", True),
        Measure(
            "own_expert",
            "share of test examples whose heaviest expert in the first layer is their task's own, where inputs choose",
            True,
        ),
        Measure("forward", "multiplications of a forward pass, in the base's", None),
        Measure("parameters", "numbers kept beside the base's", None),
    )

    def trial(self, arm: str, seed: int, candidate: Any = None) -> Trial:  # noqa: ARG002
        if arm == "arrow_subspaces":
            w = subspace_world(self.tasks, self.steps, seed)
        else:
            w = gaussian_world(self.tasks, self.bad, self.steps, seed)
        systems = self._systems(arm, w, seed)
        accuracy = sum(_accuracy(m, *task["test"]) for m, task in zip(systems, w.tasks, strict=True)) / self.tasks
        own = sum(_own_share(m, w, t) for t, m in enumerate(systems)) / self.tasks
        # where each task has a model of its own, all of them are kept
        (row,) = fusion_report(w.library, {arm: systems[0]}, lambda _: accuracy)
        each = 1 if all(m is systems[0] for m in systems) else self.tasks
        return Trial(
            {
                "accuracy": row.metric,
                "own_expert": own,
                "forward": row.forward,
                "parameters": float(_beside(w.library) * each if each > 1 else row.parameters),
            }
        )

    def _systems(self, arm: str, w: World, seed: int) -> list[nn.Module]:
        """The model that serves each task."""
        lib, fit = w.library, [w.together("fit")]
        if arm == "own":
            return [lib.subset([name]).merged() for name in w.own]
        if arm == "merge_task":
            return [merge_experts(lib, fit_coefficients(lib, [task["fit"]], seed=seed)) for task in w.tasks]
        return [self._one(arm, lib, fit, w, seed)] * self.tasks

    def _one(self, arm: str, lib: ExpertLibrary, fit: list[tuple[Tensor, Tensor]], w: World, seed: int) -> nn.Module:
        if arm == "base":
            return lib.base
        if arm in ("merge_uniform", "merge_factors"):
            return merge_experts(lib, space="delta" if arm == "merge_uniform" else "factors")
        if arm in ("merge_model", "merge_layer"):
            return merge_experts(
                lib, fit_coefficients(lib, fit, per="model" if arm == "merge_model" else "layer", seed=seed)
            )
        if arm in ("ensemble_uniform", "ensemble_fitted"):
            weights = fit_ensemble(*expert_probabilities(lib, fit)) if arm == "ensemble_fitted" else None
            return ensemble(lib, weights)
        if arm in ("arrow", "arrow_subspaces"):
            return route_experts(lib, "arrow", top_k=FEW if arm == "arrow" else 1)
        if arm == "router_greedy":
            losses = expert_losses(lib, {name: [task["fit"]] for name, task in zip(w.own, w.tasks, strict=True)})
            lib = lib.subset([lib.names[k] for k in greedy_coverage(losses, FEW)])
        elif arm == "router_clusters":
            lib = lib.grouped(mbc_clusters(lib, FEW))
        return train_router(route_experts(lib, "linear"), fit, steps=self.router_steps)

    def judge(self, results: Results) -> Sequence[Check]:
        mean = {a.name: results.mean(a.name, "accuracy") for a in self.arms}
        fitted = max(("merge_model", "merge_layer"), key=mean.__getitem__)
        best = max((a for a in mean if a.startswith(("merge", "ensemble")) and a != "merge_task"), key=mean.__getitem__)
        whole, kept = mean["router"] - mean["merge_uniform"], mean["router_greedy"] - mean["merge_uniform"]
        share = results.mean("arrow_subspaces", "own_expert")
        return [
            _beats("fitted merge", mean[fitted], "uniform merge", mean["merge_uniform"], 0.03),
            _beats("fitted ensemble", mean["ensemble_fitted"], "uniform ensemble", mean["ensemble_uniform"], 0.005),
            _beats("router", mean["router"], "best without a router or the task's name", mean[best], 0.04),
            Check(
                f"with 4 experts chosen greedily the router gains {kept:+.3f} over the uniform merge, with all {whole:+.3f} "
                "(half of it asked)",
                kept >= 0.5 * whole,
            ),
            Check(
                f"in orthogonal subspaces Arrow chooses the own expert for {share:.0%} (at least 70 % asked)",
                share >= 0.7,
            ),
        ]


def _beats(ours: str, value: float, theirs: str, other: float, margin: float) -> Check:
    return Check(f"{ours} {value:.3f}, {theirs} {other:.3f} ({margin:.3f} more asked)", value >= other + margin)


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(-1) == y).double().mean())


@torch.no_grad()
def _own_share(model: nn.Module, w: World, task: int) -> float:
    """How many of a task's test inputs the first routed layer gives to its own expert; 0 where no expert is chosen by the input."""
    if isinstance(model, Ensemble) or not hasattr(model, "expert_names"):
        return 0.0
    first = next(iter(routed_layers(model)))
    with recording(model) as record:
        model(w.tasks[task]["test"][0])
    return record.shares(first).get(w.own[task], 0.0)


def _beside(library: ExpertLibrary) -> int:
    """Numbers of the weights that experts change, which a model of a task's own keeps."""
    return sum(int(library.base.state_dict()[name].numel()) for name in library.layers)
