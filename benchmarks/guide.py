"""Keep the rows of a ``polytask bench methods`` run, and write them into the guide.

    python benchmarks/guide.py OUT/results.json multimnist

takes the rows of a run into ``benchmarks/results/multimnist.json``; without arguments the guide's tables are written anew.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
GUIDE = ROOT / "docs" / "which-method.md"
KEPT = ("name", "label", "role", "delta_m_tasks", "delta_m_tasks_interval", "mean_rank", "values")


def keep(results: dict[str, Any]) -> dict[str, Any]:
    """What the guide needs of a results file."""
    return {
        "data": {k: results["data"][k] for k in ("source", "rows", "split")},
        "budget": results["budget"],
        "verdict": results["verdict"]["text"],
        "sentences": results["comparison"]["sentences"],
        "methods": [{k: m[k] for k in KEPT} for m in results["methods"]],
    }


def table(kept: dict[str, Any]) -> str:
    """The rows from best to worst, as Markdown."""
    lines = ["| | Delta_m | 95 % interval | mean rank |", "| --- | ---: | ---: | ---: |"]
    for m in sorted(kept["methods"], key=lambda m: -m["delta_m_tasks"]):
        low, high = m["delta_m_tasks_interval"]
        name = m["label"] if m["role"] == "method" else f"**{m['label']}**"
        interval = "" if m["role"] == "reference" else f"[{low:+.1f}, {high:+.1f}]"
        lines.append(f"| {name} | {m['delta_m_tasks']:+.1f} % | {interval} | {m['mean_rank']:.1f} |")
    return "\n".join(lines)


def written(guide: str) -> str:
    """The guide with every marked table as the kept results have it."""

    def fill(found: re.Match[str]) -> str:
        kept = json.loads((RESULTS / f"{found[1]}.json").read_text(encoding="utf-8"))
        return f"<!-- table {found[1]} -->\n{table(kept)}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", fill, guide, flags=re.S)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        (RESULTS / f"{sys.argv[2]}.json").write_text(json.dumps(keep(found), indent=1) + "\n", encoding="utf-8")
    GUIDE.write_text(written(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
