"""Which tasks to learn together where learning all of them together hurts: the groupings that are tried, and how they are scored.

All subsets are trained of three tasks; up to eight, all pairs, and the gain of a task in a larger group is the mean of its gains in that
group's pairs (the higher-order approximation of Standley et al., ICML 2020, arXiv:1905.07553); beyond, the groupings that average linkage
of the gradient cosines proposes. Every score comes from validation rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np
import numpy.typing as npt

Group = tuple[int, ...]
Grouping = tuple[Group, ...]

ALL_SUBSETS, ALL_PAIRS = 3, 8


def all_groupings(n: int) -> Iterator[Grouping]:
    """Every way to cut n tasks into groups (a Bell number of them), groups in order of their first task."""
    if n == 0:
        yield ()
        return
    last = n - 1
    for smaller in all_groupings(last):
        for i in range(len(smaller)):
            yield (*smaller[:i], (*smaller[i], last), *smaller[i + 1 :])
        yield (*smaller, (last,))


def groups_to_train(n: int, cosine: npt.NDArray[np.float64] | None) -> list[Group]:
    """The groups whose gains must be seen, without the single tasks and the whole."""
    if n <= ALL_SUBSETS:
        return [g for size in range(2, n) for g in combinations(range(n), size)]
    if n <= ALL_PAIRS:
        return list(combinations(range(n), 2))
    return sorted({g for grouping in linked(cosine) for g in grouping if 1 < len(g) < n})


def candidates(n: int, cosine: npt.NDArray[np.float64] | None) -> list[Grouping]:
    """The groupings that are scored; the whole and the single tasks are always among them."""
    if n <= ALL_PAIRS:
        return list(all_groupings(n))
    whole, apart = (tuple(range(n)),), tuple((k,) for k in range(n))
    return list(dict.fromkeys([whole, *linked(cosine), apart]))


def linked(cosine: npt.NDArray[np.float64] | None) -> list[Grouping]:
    """Two, three and four groups of tasks whose gradients point the same way; none without cosines."""
    if cosine is None:
        return []
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    distance = 1 - np.nan_to_num((cosine + cosine.T) / 2)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(np.maximum(distance, 0), checks=False), "average")
    found = []
    for count in (2, 3, 4):
        label = fcluster(tree, count, "maxclust")
        found.append(tuple(sorted(tuple(int(k) for k in np.flatnonzero(label == c)) for c in np.unique(label))))
    return list(dict.fromkeys(found))


def gain_of(grouping: Grouping, gains: Mapping[Group, Mapping[int, float]]) -> float:
    """Mean over tasks of the gain over single-task training in percent; 0 for a task alone.

    Args:
        grouping: groups of tasks.
        gains: {group: {task: percent}} of the groups that were trained; the gain in any other is the mean over its pairs.
    """
    found = []
    for group in grouping:
        for task in group:
            if len(group) == 1:
                found.append(0.0)
            elif group in gains:
                found.append(gains[group][task])
            else:
                pairs = [tuple(sorted((task, other))) for other in group if other != task]
                found.append(float(np.mean([gains[pair][task] for pair in pairs])))
    return float(np.mean(found))


def how(n: int) -> str:
    """In words, what was tried."""
    if n <= ALL_SUBSETS:
        return "every group of tasks was trained with equal weights on the first seed, and every grouping scored on validation rows"
    if n <= ALL_PAIRS:
        return (
            "every pair of tasks was trained with equal weights on the first seed; a grouping's score is the mean of its pairs' gains "
            "on validation rows, but for all tasks together, which were trained"
        )
    return (
        "two, three and four groups of tasks with similar gradients were trained with equal weights on the first seed "
        "and scored on validation rows"
    )
