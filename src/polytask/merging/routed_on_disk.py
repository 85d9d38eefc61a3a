"""A merge on disk that ends in a model with experts: their files beside the merged weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from polytask.merging.checkpoint import INDEX, open_checkpoint
from polytask.merging.proxy import build_model, stored_names
from polytask.merging.routed_model import save_routed
from polytask.merging.stored import CheckpointTensors, Renamed

if TYPE_CHECKING:
    from polytask.merging.on_disk import MergePlan


@torch.no_grad()
def add_routed_experts(plan: MergePlan, work: Path, journal: Path) -> None:
    """Put experts beside the merged weights of a work folder, which becomes one that ``load_routed`` reads.

    Args:
        plan: with statistics gathered.
        work: holds the merged weights.
        journal: is removed when they go, since none of it can be gone on with.

    Raises:
        InputError: the model cannot be built, or takes no experts.
    """
    assert plan.routing is not None
    merged = open_checkpoint(work / next(iter(plan.files)) if len(plan.files) == 1 else work)
    factory = plan.model if plan.proxy is None else plan.proxy.model
    model = build_model(factory, plan.models[0], plan.base_folder)
    names = stored_names(model, plan.models[0])
    for name, tensor in model.state_dict().items():
        if name in names:
            tensor.copy_(merged.read(names[name]))
    # heads that are not merged differ from expert to expert
    merged_here = {n: old for n, old in names.items() if old in set(plan.match.merged)}
    states = (Renamed(CheckpointTensors(e), merged_here) for e in plan.models[-len(plan.experts) :])
    experts = dict(zip(plan.names, states, strict=True))
    plan.routing.route(model, experts, [Renamed(s, merged_here) for s in plan.engine.statistics])
    shutil.rmtree(work / "routed", ignore_errors=True)
    save_routed(model, work / "routed")
    journal.unlink()
    for name in (*plan.files, INDEX):
        (work / name).unlink(missing_ok=True)
    for file in sorted((work / "routed").iterdir()):
        file.rename(work / file.name)
    shutil.rmtree(work / "routed")
