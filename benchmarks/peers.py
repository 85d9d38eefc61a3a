"""Steps of TorchJD and LibMTL beside polytask's: ``polytask bench steps --beside benchmarks/peers.py``.

TorchJD is the extra ``bench``; LibMTL comes by ``pip install --no-deps LibMTL==1.1.5``, without torchvision, which no step needs.

Each library takes the step its own documentation shows, with its defaults. TorchJD's aggregators combine exact gradients at the shared
parameters; LibMTL's weightings do so with ``rep_grad=False``, and work on the representation with ``rep_grad=True``.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from polytask.benchmark import Contender, Workload

TASKS = object()
"""Stands for the number of tasks among a class's options."""
Made = tuple[str, dict[str, Any]]
AGGREGATORS: dict[str, Made] = {
    "equal": ("Sum", {}),
    "aligned_mtl": ("AlignedMTL", {}),
    "cagrad": ("CAGrad", {"c": 0.5}),
    "config": ("ConFIG", {}),
    "dualproj": ("DualProj", {}),
    "excess_mtl": ("ExcessMTL", {}),
    "fairgrad": ("FairGrad", {"alpha": 1.0}),
    "graddrop": ("GradDrop", {}),
    "gradvac": ("GradVac", {}),
    "imtl_g": ("IMTLG", {}),
    "krum": ("Krum", {"n_byzantine": 0}),
    "mgda": ("MGDA", {}),
    "nash_mtl": ("NashMTL", {"n_tasks": TASKS}),
    "pcd": ("PCD", {}),
    "pcgrad": ("PCGrad", {}),
    "trimmed_mean": ("TrimmedMean", {"trim_number": 1}),
    "upgrad": ("UPGrad", {}),
}
SCALARIZERS: dict[str, Made] = {
    "dwa": ("DWA", {}),
    "famo": ("FAMO", {"shape": TASKS}),
    "geometric_mean": ("GeometricMean", {}),
    "imtl_l": ("IMTLL", {"shape": TASKS}),
    "rlw": ("Random", {}),
    "stch": ("STCH", {"mu": 1.0}),
    "uncertainty": ("UW", {"shape": TASKS}),
}
WEIGHTINGS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "cagrad": ("CAGrad", ("exact",), {"calpha": 0.5, "rescale": 1}),
    "equal": ("EW", ("values",), {}),
    "dwa": ("DWA", ("values",), {"T": 2.0}),
    "geometric_mean": ("GLS", ("values",), {}),
    "graddrop": ("GradDrop", ("representation",), {"leak": 0.0}),
    "gradnorm": ("GradNorm", ("exact", "representation"), {"alpha": 1.5}),
    "gradvac": ("GradVac", ("exact",), {"beta": 0.5}),
    "imtl": ("IMTL", ("exact", "representation"), {}),
    "mgda": ("MGDA", ("exact", "representation"), {"mgda_gn": "none"}),
    "pcgrad": ("PCGrad", ("exact",), {}),
    "rlw": ("RLW", ("values",), {"dist": "Normal"}),
    "uncertainty": ("UW", ("values",), {}),
}


def contenders() -> Iterator[Contender]:
    """The methods of the libraries that are installed."""
    if not (_installed("torchjd") or _installed("LibMTL")):
        raise ImportError(
            "neither torchjd nor LibMTL is installed: pip install 'polytask[bench]', pip install --no-deps LibMTL"
        )
    if _installed("torchjd"):
        name = f"torchjd {version('torchjd')}"
        for method, what in AGGREGATORS.items():
            yield Contender(name, method, "exact", _aggregated(what, None))
        yield Contender(f"{name}, one by one", "upgrad", "exact", _aggregated(AGGREGATORS["upgrad"], 1))
        for method, what in SCALARIZERS.items():
            yield Contender(name, method, "values", _scalarized(what))
    if _installed("LibMTL"):
        name = f"LibMTL {version('LibMTL')}"
        for method, (weighting, levels, options) in WEIGHTINGS.items():
            for level in levels:
                yield Contender(name, method, level, _weighted(weighting, level, options))


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _made(module: types.ModuleType, what: Made, n_tasks: int) -> Any:
    name, options = what
    return getattr(module, name)(**{o: n_tasks if v is TASKS else v for o, v in options.items()})


def _aggregated(what: Made, chunk: int | None) -> Callable[[Workload], Callable[[], None]]:
    """``mtl_backward`` to the shared parameters' Jacobians, then the aggregator; ``chunk`` = 1 runs its backward passes one by one."""

    def of(work: Workload) -> Callable[[], None]:
        from torchjd import aggregation
        from torchjd.autojac import jac_to_grad, mtl_backward

        aggregator = _made(aggregation, what, len(work.heads))
        from_gramian = isinstance(aggregator, aggregation.GramianWeightedAggregator)

        def step() -> None:
            work.optimizer.zero_grad()
            z = work.trunk(work.inputs)
            mtl_backward(work.losses(head(z) for head in work.heads), features=z, parallel_chunk_size=chunk)
            jac_to_grad(work.trunk.parameters(), aggregator, optimize_gramian_computation=from_gramian)
            work.optimizer.step()

        return step

    return of


def _scalarized(what: Made) -> Callable[[Workload], Callable[[], None]]:
    def of(work: Workload) -> Callable[[], None]:
        from torchjd import scalarization

        scalarizer = _made(scalarization, what, len(work.heads))

        def losses() -> torch.Tensor:
            z = work.trunk(work.inputs)
            return torch.stack(work.losses(head(z) for head in work.heads))

        def step() -> None:
            work.optimizer.zero_grad()
            scalarizer(losses()).backward()
            work.optimizer.step()
            if hasattr(scalarizer, "update"):
                with torch.no_grad():
                    scalarizer.update(losses())

        return step

    return of


def _weighted(weighting: str, level: str, options: dict[str, Any]) -> Callable[[Workload], Callable[[], None]]:
    """LibMTL's hard parameter sharing with one of its weightings, stepped as its trainer steps it."""

    def of(work: Workload) -> Callable[[], None]:
        _without_trainer()
        from LibMTL import weighting as weightings
        from LibMTL.architecture.HPS import HPS

        class Model(HPS, getattr(weightings, weighting)):  # type: ignore[misc]
            """As its trainer makes it, but for gradients set to zero: since torch 2 they vanish, which its weightings do not survive."""

            def zero_grad_share_params(self) -> None:
                self.encoder.zero_grad(set_to_none=False)

        names = [f"task {i}" for i in range(len(work.heads))]
        heads = torch.nn.ModuleDict(dict(zip(names, work.heads, strict=True)))
        device = torch.device("cpu")
        model = Model(names, lambda: work.trunk, heads, level == "representation", False, device)
        model.init_param()
        # as after two epochs of losses: what DWA and GradNorm read
        model.epoch, model.train_loss_buffer = 2, torch.ones(len(names), 3).numpy()

        def step() -> None:
            outputs = model(work.inputs)
            losses = torch.stack(work.losses(outputs[name] for name in names))
            work.optimizer.zero_grad()
            model.backward(losses, **options)
            work.optimizer.step()

        return step

    return of


def _without_trainer() -> None:
    """Make ``LibMTL`` importable without its trainer, whose imports (torch_geometric, torchvision, CUDA) no step needs."""
    if "LibMTL" in sys.modules:
        return
    found = importlib.util.find_spec("LibMTL")
    assert found is not None
    assert found.origin is not None
    package = types.ModuleType("LibMTL")
    package.__path__ = [str(Path(found.origin).parent)]
    sys.modules["LibMTL"] = package
    architecture = types.ModuleType("LibMTL.architecture")
    architecture.__path__ = [str(Path(found.origin).parent / "architecture")]
    sys.modules["LibMTL.architecture"] = architecture
