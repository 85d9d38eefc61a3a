"""Clicks with a conversion type each: generated ones, and a real table that has the same shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from polytask.errors import InputError
from polytask.recipes.advertising.conversion_types import History, rare_types, rates

FREQUENT = RARE = 20
WINDOW_CLICKS = 3000  # of each generated type, before the training data
CLUSTERS = 16

# the census file has no header: the columns that are named here, by position
NAMED = {3: "occupation", 9: "major_occupation", 24: "weight", 40: "year", 41: "income"}
NUMBERS = (
    "0",
    "5",
    "16",
    "17",
    "18",
    "30",
    "39",
)  # age, wage an hour, gains, losses, dividends, employer's size, weeks worked


@dataclass(frozen=True)
class Clicks:
    """Clicks of one split.

    Args:
        categorical: codes, shape (clicks, fields); field 0 is the conversion type.
        numeric: shape (clicks, numbers); number 0 is the type's historical log-odds.
        y: whether each converted, shape (clicks,).
        hard: whether its type is rare, shape (clicks,).
        sizes: codes of each field.
    """

    categorical: Tensor
    numeric: Tensor
    y: Tensor
    hard: Tensor
    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.y)

    def rows(self, at: Tensor) -> Clicks:
        """Those at the given positions."""
        return replace(
            self, categorical=self.categorical[at], numeric=self.numeric[at], y=self.y[at], hard=self.hard[at]
        )


def generated(clicks: int, strength: float, seed: int) -> dict[str, Clicks]:
    """Training clicks, and half as many each to select and to test.

    A user u and a type's ad a, both standard normal in R^8, have the affinity :math:`0.35 (u^T W a + k u^T V_{class} a)` on top of
    the type's base rate. The model sees clusters of u and a, noisy projections of both, and the type's history. Entries of W and V
    have the standard deviation 1/2: 120,000 clicks then hold about as many rare conversions as the specification tells of (700 to 1200).
    """
    g = torch.Generator().manual_seed(seed)
    types = FREQUENT + RARE
    bounds = torch.tensor([[0.05, 0.20]] * FREQUENT + [[0.002, 0.008]] * RARE)
    base = bounds[:, 0] + (bounds[:, 1] - bounds[:, 0]) * torch.rand(types, generator=g)
    W, V = torch.randn(8, 8, generator=g) / 2, torch.randn(2, 8, 8, generator=g) / 2
    ads = torch.randn(types, 8, generator=g)
    centres, mixing = torch.randn(2, CLUSTERS, 8, generator=g), torch.randn(16, 12, generator=g) / 4
    class_of = (torch.arange(types) >= FREQUENT).long()
    k = torch.binomial(torch.full((types,), float(WINDOW_CLICKS)), base, generator=g)
    history = {str(c): History(WINDOW_CLICKS, int(k[c])) for c in range(types)}
    rare = rare_types(history)
    hard = torch.tensor([rare[str(c)] for c in range(types)])
    logit = torch.logit(torch.tensor([rates(history)[str(c)] for c in range(types)]))
    total = 2 * clicks
    c = torch.randint(0, types, (total,), generator=g)
    u, a = torch.randn(total, 8, generator=g), ads[c]
    common = torch.einsum("ni,ij,nj->n", u, W, a)
    own = torch.einsum("ni,nij,nj->n", u, V[class_of[c]], a) if strength else torch.zeros(total)
    y = torch.bernoulli(torch.sigmoid(0.35 * (common + strength * own) + torch.logit(base)[c]), generator=g)
    codes = [c, (u @ centres[0].T).argmax(1), (u @ centres[1].T).argmax(1), (a @ centres[0].T).argmax(1)]
    noisy = torch.cat([u, a], 1) @ mixing + 0.3 * torch.randn(total, 12, generator=g)
    whole = Clicks(
        torch.stack(codes, 1),
        torch.cat([logit[c][:, None], noisy], 1),
        y,
        hard[c],
        (types, CLUSTERS, CLUSTERS, CLUSTERS),
    )
    at = torch.arange(total).split([clicks, clicks // 2, total - clicks - clicks // 2])  # type: ignore[no-untyped-call]
    return dict(zip(("train", "validation", "test"), (whole.rows(part) for part in at), strict=True))


def census(folder: str) -> dict[str, Clicks]:
    """People of the census table in place of clicks: the type is the occupation, the event an income above 50,000 dollars.

    The class map comes from the first fifth of the survey of 1994, training data are its rest; those of 1995 select and test.

    Raises:
        InputError: the file is missing.
    """
    import pandas as pd

    path = Path(folder) / "census-income.test.gz"
    if not path.is_file():
        raise InputError(f"{path} is missing: rare-conversions reads the Census-Income (KDD) table there")
    names = [NAMED.get(i, str(i)) for i in range(42)]
    whole = pd.read_csv(path, names=names, skipinitialspace=True, na_values="?").drop(columns="weight")
    whole = whole.sort_values("year", kind="stable").reset_index(drop=True)
    earlier = int((whole["year"] == whole["year"].min()).sum())
    window, middle = earlier // 5, (earlier + len(whole)) // 2
    type_of, y = whole["occupation"].astype(str), (whole["income"] != "- 50000.").astype(int)
    past = y[:window].groupby(type_of).agg(["size", "sum"])
    parents = whole["major_occupation"].groupby(type_of).first()
    history = {
        str(c): History(int(past["size"].get(c, 0)), int(past["sum"].get(c, 0)), str(p)) for c, p in parents.items()
    }
    # a fifth of a year shows a few hundred people of an occupation, not the 1000 clicks that the default asks for
    rare, rate = rare_types(history, least_clicks=100), rates(history)
    fields = ["occupation", *(c for c in whole.columns if c not in ("occupation", "year", "income", *NUMBERS))]
    codes = [pd.factorize(whole[f], use_na_sentinel=False)[0] for f in fields]
    numbers = torch.tensor(whole[list(NUMBERS)].to_numpy(), dtype=torch.float32)
    history_odds = torch.logit(torch.tensor([rate[c] for c in type_of], dtype=torch.float32))
    people = Clicks(
        torch.stack([torch.tensor(c) for c in codes], 1),
        torch.cat([history_odds[:, None], torch.log1p(numbers)], 1),
        torch.tensor(y.to_numpy()).float(),
        torch.tensor([rare[c] for c in type_of]),
        tuple(int(c.max()) + 1 for c in codes),
    )
    ends = {"train": (window, earlier), "validation": (earlier, middle), "test": (middle, len(whole))}
    return {name: people.rows(torch.arange(*at)) for name, at in ends.items()}
