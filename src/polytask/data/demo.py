"""The table of the demonstration: real people, shipped inside statsmodels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from polytask.errors import MissingExtraError

if TYPE_CHECKING:
    import pandas as pd


TITLE = "RAND Health Insurance Experiment, first year"
TEXT = (
    "5,638 people in their first year of the RAND Health Insurance Experiment (1974-1982), which gave families insurance plans by lot; "
    "the table is in the public domain and comes with statsmodels (Cameron and Trivedi 2005). From plan, age, family, income and health "
    "at the start, four things are learnt: visits to a doctor in the year (count), whether anything was spent on medical care (binary), "
    "a physical limitation (binary) and an index of general health (regression). Labels are truly missing: one of the six sites has no "
    "health index at all, and where a limitation is unknown the source holds a mean, which is read as missing here. Families share plan, "
    "doctor and habits, so no family is cut by the split; the source names no families, and people of equal site, plan, income, "
    "schooling, family size and spending limit are taken as one. Of statsmodels' other tables, ANES 1996 (944 rows) and Fair's survey "
    "hardly predict the targets one would choose from the rest; the later years of this one repeat the health answers of the first."
)
FEATURES = {
    "coins": "coinsurance_percent",
    "mdeoff": "maximum_expense",
    "pioff": "incentive_payment",
    "xage": "age",
    "female": "female",
    "black": "black",
    "child": "child",
    "income": "income",
    "educdec": "education_years",
    "num": "family_size",
    "tookphys": "took_physical",
    "mhi": "mental_health",
    "disea": "chronic_diseases",
}
FAMILY = ("site", "plan", "income", "educdec", "num", "mdeoff")


@dataclass(frozen=True)
class DemoTable:
    """A table with its targets.

    Args:
        frame: features, targets and, where there is one, the column of groups.
        targets: names of the target columns.
        kinds: kinds that are told rather than inferred.
        groups: a column that must not be cut by a split (and is no feature), or None.
        title: a few words.
        text: what it is and why it was chosen.
    """

    frame: pd.DataFrame
    targets: tuple[str, ...]
    kinds: dict[str, str]
    groups: str | None
    title: str
    text: str


def demo_table() -> DemoTable:
    """The RAND Health Insurance Experiment: four targets of three kinds, a quarter of one of them unknown.

    One row is one person, in the first year of enrolment; money spent and visits made are never features.

    Raises:
        MissingExtraError: statsmodels, which carries the table, is not installed.
    """
    try:
        from statsmodels.datasets import randhie
    except ImportError as error:
        raise MissingExtraError("the demonstration", "demo") from error
    from importlib import resources

    from polytask.data.read import read_table

    with resources.as_file(resources.files(randhie) / "src" / "randhie.csv") as path:
        years = read_table(path)
    first = years[years["year"] == 1].reset_index(drop=True)
    frame = first[list(FEATURES)].rename(columns=FEATURES)
    frame["plan"] = np.where(first["idp"] == 1, "individual deductible", "family maximum")
    frame["site"] = "site " + first["site"].astype(str)
    # a family's members share all of these; their health and their doctor too
    frame["family"] = first.groupby(list(FAMILY), dropna=False).ngroup()
    frame["doctor_visits"] = first["mdvis"]
    frame["any_spending"] = first["binexp"]
    # whole numbers were answered; any other value is a mean put in place of a missing answer
    frame["limited"] = first["physlm"].where(first["physlm"].isin([0, 1]))
    frame["health_index"] = first["ghindx"]
    return DemoTable(frame, ("doctor_visits", "any_spending", "limited", "health_index"), {}, "family", TITLE, TEXT)
