"""What a recipe leaves behind: ``evidence.json``, a page for people, figures."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytask import __version__
from polytask.errors import StorageError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Evidence:
    """The table, the claim, whether it held.

    Attributes:
        recipe: the recipe's name.
        paper: where the system was published.
        claim: what is claimed, in one sentence.
        holds: whether every check was met.
        seeds: the seeds that ran.
        rows: one an arm and seed: ``arm``, ``seed``, every measure, and the ``candidate`` chosen where there was a choice.
        reference: the figures of the specification or the paper that ours stand beside, quoted as theirs.
        domain: the recipe's folder.
        quick: whether small settings were used: such evidence shows that a recipe runs, and proves nothing.
        options: the settings of the run.
        arms: name, label and role of each.
        measures: name, text and direction of each.
        summary: for each arm the mean over seeds of every measure, with its 95 % interval.
        checks: the parts of the claim, each with its numbers.
        figures: files beside ``evidence.json``.
        seconds: what it took.
        error: why it did not run, where it did not.
        polytask: the version that made it.
    """

    recipe: str
    paper: str
    claim: str
    holds: bool
    seeds: list[int]
    rows: list[dict[str, Any]]
    reference: str
    domain: str = ""
    quick: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    arms: list[dict[str, str]] = field(default_factory=list)
    measures: list[dict[str, Any]] = field(default_factory=list)
    summary: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    polytask: str = __version__

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, the documented keys first."""
        return asdict(self)

    @classmethod
    def read(cls, folder: Path | str) -> Evidence:
        """Read back what :meth:`write` wrote.

        Raises:
            StorageError: no ``evidence.json`` there, or not one of ours.
        """
        path = Path(folder) / "evidence.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{f.name: found[f.name] for f in fields(cls) if f.name in found})
        except (OSError, ValueError, TypeError) as reason:
            raise StorageError(f"{path} cannot be read as evidence: {reason}") from reason

    def write(self, folder: Path, figures: Mapping[str, str] | None = None) -> None:
        """Write ``evidence.json``, ``evidence.md`` and the figures; the folder appears whole or not at all.

        Raises:
            StorageError: it cannot be written.
        """
        self.figures = sorted(figures or {})
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                (beside / "evidence.json").write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
                (beside / "evidence.md").write_text(self.markdown() + "\n", encoding="utf-8")
                for name, svg in (figures or {}).items():
                    (beside / name).write_text(svg, encoding="utf-8")
                beside.chmod(0o755)
                os.replace(beside, folder)
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)
                raise
        except OSError as reason:
            raise StorageError(f"the evidence of {self.recipe} cannot be written to {folder}: {reason}") from reason

    @property
    def outcome(self) -> str:
        """In two words: ``holds``, ``does not hold``, ``did not run``."""
        if self.error is not None:
            return "did not run"
        return "holds" if self.holds else "does not hold"

    def cells(self) -> list[list[str]]:
        """The summary as text: a line an arm, its label, then each measure's mean with half the width of its interval."""
        labels = {a["name"]: a["label"] for a in self.arms}
        return [[labels[line["arm"]], *(_spread(line[m["name"]]) for m in self.measures)] for line in self.summary]

    def table(self) -> Table:
        """The summary for a terminal."""
        from rich.table import Table

        table = Table(
            title=f"{self.recipe}: mean over {len(self.seeds)} seeds ± half the 95 % interval", title_justify="left"
        )
        table.add_column("arm")
        for measure in self.measures:
            table.add_column(measure["name"] + _arrow(measure["higher_is_better"]), justify="right")
        for line, arm in zip(self.cells(), self.arms, strict=True):
            table.add_row(*line, style="bold" if arm["role"] == "method" else None)
        return table

    def markdown(self, level: int = 1, figures: str = "") -> str:
        """The page for people.

        Args:
            level: of the heading.
            figures: put before the figures' names, where the page lies elsewhere.
        """
        lines = [f"{'#' * level} {self.recipe}: {self.outcome}", "", f"**Claim** ({self.paper}). {self.claim}", ""]
        if self.error is not None:
            return "\n".join([*lines, f"It did not run: {self.error}"])
        if self.quick:
            lines += [
                "**A quick look** with small settings: it shows that the recipe runs, and decides nothing about the claim.",
                "",
            ]
        lines += [f"- {'✓' if c['holds'] else '✗'} {c['text']}" for c in self.checks]
        lines += ["", f"Mean over {len(self.seeds)} seeds ± half the 95 % interval:", ""]
        heads = ["arm", *(m["name"] + _arrow(m["higher_is_better"]) for m in self.measures)]
        lines += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        lines += ["| " + " | ".join(line) + " |" for line in self.cells()]
        lines += ["", *(f"- `{m['name']}`: {m['text']}" for m in self.measures)]
        lines += ["", f"**To compare with.** {self.reference}"]
        lines += [f"\n![{self.recipe}: {Path(name).stem}]({figures}{name})" for name in self.figures]
        lines += ["", f"{self.seconds:.0f} s, polytask {self.polytask}."]
        return "\n".join(lines)


def _arrow(higher_is_better: bool | None) -> str:
    return "" if higher_is_better is None else " ↑" if higher_is_better else " ↓"


def _spread(value: Mapping[str, float | None]) -> str:
    from polytask.report.numbers import decimals_for, plain

    low, high, mean = value["low"], value["high"], value["mean"]
    decimals = max(decimals_for(low, high, mean), decimals_for(None, None, mean))
    if low is None or high is None:
        return plain(mean, decimals)
    return f"{plain(mean, decimals)} ± {plain((high - low) / 2, decimals)}"
