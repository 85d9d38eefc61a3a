"""A search for the best of a few numbers, each trial of which is dear."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from polytask.errors import InputError, TrainingError

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]
Objective = Callable[[Vector], float]

RANDOM_CANDIDATES = 2048
BEST, AROUND, WIDTH = 5, 64, 0.05
"""How many of the best points are looked around, by how many perturbations each, of which standard deviation in the unit cube."""
NOISE_FLOOR = 1e-4
GRID = 5


@dataclass(frozen=True)
class Trial:
    """One point that was tried, and what came of it."""

    z: tuple[float, ...]
    value: float


@dataclass(frozen=True)
class Found:
    """What a search found: the best trial (the first of equals) and all of them in order."""

    best: Trial
    trials: tuple[Trial, ...]


def search(
    objective: Objective,
    bounds: Sequence[tuple[float, float]],
    *,
    budget: int = 40,
    how: Literal["gp", "random", "grid"] = "gp",
    start: Sequence[Sequence[float]] = (),
    seed: int = 0,
) -> Found:
    """Look for the point with the largest value.

    Args:
        objective: is given a point, shape (dimensions,).
        bounds: the lowest and the highest value in each dimension.
        budget: how many points are tried.
        how: ``gp``: expected improvement under a Gaussian process (Matern 5/2, one length a dimension), after two points a dimension
            of a Sobol sequence; ``random``: uniform points; ``grid``: one dimension after another, over five values each.
        start: points that are tried first.
        seed: of all draws.

    Raises:
        InputError: bounds that hold nothing, a start outside, no budget.
        TrainingError: the objective gave no number.

    Cost: the objective's, and for ``gp`` a fit of as many points as there are trials.
    """
    low, high = (np.array([b[i] for b in bounds], dtype=np.float64) for i in (0, 1))
    if not len(low) or not bool((low < high).all()) or budget < 1:
        raise InputError("a search needs a budget, and in each dimension a lowest value below the highest")
    firsts = [np.asarray(z, dtype=np.float64) for z in start]
    if any(z.shape != low.shape or bool(((z < low) | (z > high)).any()) for z in firsts):
        raise InputError("a search starts within its bounds")
    trials: list[Trial] = []
    proposals = {"gp": _expected_improvement, "random": _random, "grid": _coordinates}[how](
        len(low), trials, low, high, seed
    )
    while len(trials) < budget:
        z = firsts[len(trials)] if len(trials) < len(firsts) else low + next(proposals) * (high - low)
        value = float(objective(z))
        if not math.isfinite(value):
            raise TrainingError(f"the objective of the search is {value} at {np.round(z, 4).tolist()}")
        trials.append(Trial(tuple(z.tolist()), value))
    return Found(max(trials, key=lambda t: t.value), tuple(trials))


def _random(dimensions: int, trials: list[Trial], low: Vector, high: Vector, seed: int) -> Iterator[Vector]:  # noqa: ARG001
    generator = np.random.default_rng(seed)
    while True:
        yield generator.random(dimensions)


def _coordinates(dimensions: int, trials: list[Trial], low: Vector, high: Vector, seed: int) -> Iterator[Vector]:  # noqa: ARG001
    best = np.full(dimensions, 0.5)
    while True:
        for i in range(dimensions):
            for value in np.linspace(0, 1, GRID):
                z = _best_of(trials, low, high) if trials else best
                z[i] = value
                yield z


def _best_of(trials: Sequence[Trial], low: Vector, high: Vector) -> Vector:
    best: Vector = np.asarray(max(trials, key=lambda t: t.value).z, dtype=np.float64)
    return (best - low) / (high - low)


def _expected_improvement(
    dimensions: int, trials: list[Trial], low: Vector, high: Vector, seed: int
) -> Iterator[Vector]:
    from scipy.stats import norm
    from scipy.stats.qmc import Sobol

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The balance properties")  # of fewer points than a power of two
        yield from Sobol(dimensions, seed=seed).random(2 * dimensions)
    generator = np.random.default_rng(seed)
    while True:
        x = (np.array([t.z for t in trials]) - low) / (high - low)
        values = np.array([t.value for t in trials])
        y = (values - values.mean()) / (values.std() or 1.0)
        candidates = _candidates(x, y, generator)
        mean, deviation = _process(x, y).predict(candidates, return_std=True)
        deviation = np.maximum(deviation, 1e-9)
        u = (mean - y.max()) / deviation
        yield candidates[int(np.argmax(deviation * (u * norm.cdf(u) + norm.pdf(u))))]


def _candidates(x: Matrix, y: Vector, generator: np.random.Generator) -> Matrix:
    best = x[np.argsort(-y)[:BEST]]
    near = np.repeat(best, AROUND, axis=0)
    near = near + WIDTH * generator.standard_normal(near.shape)
    points: Matrix = np.clip(np.concatenate([generator.random((RANDOM_CANDIDATES, x.shape[1])), near]), 0, 1)
    return points


def _process(x: Matrix, y: Vector) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    lengths = np.full(x.shape[1], 0.5)
    kernel = ConstantKernel(1.0, (0.01, 100)) * Matern(lengths, (0.02, 20), nu=2.5) + WhiteKernel(
        1e-2, (NOISE_FLOOR, 1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound is an answer too
        return GaussianProcessRegressor(kernel).fit(x, y)
