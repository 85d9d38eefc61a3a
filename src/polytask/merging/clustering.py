"""Which experts are alike: model-based clustering (MBC, Ostapenko et al., ICML 2024, arXiv:2405.11157)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.errors import InputError
from polytask.merging.base import in_range
from polytask.merging.library import ExpertLibrary

COMPONENTS = 64
STARTS, SEED = 10, 42


def mbc_clusters(library: ExpertLibrary, clusters: int, quantile: float = 0.5) -> dict[str, list[str]]:
    """Group experts by their parameters alone.

    The entries of each expert up to the quantile of their size become zero; what is left is projected on its leading 64 directions and
    scaled to length 1; k-means then groups the rows of the matrix of cosines.

    Args:
        library: the experts.
        clusters: how many groups.
        quantile: the share of small entries that is left out.

    Returns:
        {name of a group's first member: its members}, in the order of the library.

    Raises:
        InputError: more groups than experts, or none.
    """
    from sklearn.cluster import KMeans

    in_range(quantile, "the quantile", 0, 1)
    if not 1 <= clusters <= len(library.names):
        raise InputError(f"{len(library.names)} experts make 1 to {len(library.names)} groups, not {clusters}")
    cosines = expert_cosines(library, quantile)
    labels = KMeans(clusters, init="k-means++", n_init=STARTS, random_state=SEED).fit_predict(cosines.numpy()).tolist()
    groups: dict[int, list[str]] = {}
    for name, label in zip(library.names, labels, strict=True):
        groups.setdefault(label, []).append(name)
    return {members[0]: members for members in groups.values()}


def medoids(library: ExpertLibrary, groups: dict[str, list[str]], quantile: float = 0.5) -> list[str]:
    """Of each group the member that is most like all of them."""
    cosines = expert_cosines(library, quantile)
    at = [[library.names.index(n) for n in members] for members in groups.values()]
    return [library.names[i[int(cosines[i][:, i].sum(1).argmax())]] for i in at]


def expert_cosines(library: ExpertLibrary, quantile: float = 0.5) -> Float[Tensor, "experts experts"]:
    """Cosines between the experts' parameters, small entries left out, within their leading directions; float64."""
    rows = torch.stack(
        [
            torch.cat([t[k].double().flatten() for low in library.layers.values() for t in (low.A, low.B)])
            for k in range(len(library.names))
        ]
    )
    for row in rows:
        size = row.abs()
        row[size <= size.kthvalue(max(1, int(quantile * len(row)))).values if quantile else size < 0] = 0
    # of rows X = U S V', the Gramian gives U S, which is all that cosines need
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    projected = (vectors * values.clamp_min(0).sqrt())[:, -COMPONENTS:]
    unit = torch.nn.functional.normalize(projected, dim=1)
    return unit @ unit.T
