"""Keep what came of comparisons of merging methods, and write it into the guides.

    python benchmarks/merge_guide.py REPORT/results.json vit

takes a run of ``polytask merge compare``, with the ``candidates`` that lie beside it, into ``benchmarks/results/merges.json``; without
arguments the tables of the guides are written anew, those of ``benchmarks/adaptive.py`` too.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from polytask.training.merges.summary import Replicates

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
GUIDES = (ROOT / "docs" / "merging.md", ROOT / "docs" / "merge-compare.md")
KEPT = (
    "name",
    "label",
    "role",
    "normalised",
    "mean_accuracy",
    "difference",
    "difference_by_seed",
    "accuracy",
    "chosen",
    "trials",
    "seconds",
    "statistic_seconds",
)


def keep(file: Path) -> dict[str, Any]:
    """What the guides need of a results file and of the candidates beside it."""
    results = json.loads(file.read_text(encoding="utf-8"))
    also = beside_base(results, file.parent / "candidates")
    return {
        "budget": results["budget"],
        "tasks": results["tasks"],
        "verdict": results["verdict"]["text"],
        "left_out": results["left_out"],
        "candidates": [{k: c[k] for k in KEPT} | also[c["name"]] for c in results["candidates"]],
        "interference": results["interference"],
    }


def beside_base(results: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Of every candidate, how far it is from the base with the experts' heads, and its normalised accuracy in each lineage."""
    names, seeds = [c["name"] for c in results["candidates"]], results["budget"]["seeds"]
    stored = [[load_file(folder / f"{n}_seed-{s}.safetensors") for s in seeds] for n in names]
    hits = {t["name"]: np.array([[own[t["name"]] for own in lines] for lines in stored]) for t in results["tasks"]}
    drawn, expert, base = Replicates(hits), names.index("experts"), names.index("base")
    accuracy = np.stack([h.mean(2) for h in hits.values()])
    lineages = (accuracy / accuracy[:, [expert]]).mean(0)
    return {
        n: {"over_base": drawn.difference(i, base, expert).to_json(), "lineages": lineages[i].round(4).tolist()}
        for i, n in enumerate(names)
    }


def points(found: dict[str, float], sign: str = "") -> str:
    return f"{100 * found['mean']:{sign}.1f} [{100 * found['low']:{sign}.1f},\u00a0{100 * found['high']:{sign}.1f}]"


def comparison(kept: dict[str, Any]) -> list[str]:
    """Candidates from best to worst on test rows."""
    lines = [
        "| | % of the experts' accuracy | against task arithmetic, points | ahead of it in lineages | against the base, points "
        "| s a merge |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for c in sorted(kept["candidates"], key=lambda c: -c["normalised"]["mean"]):
        reference = c["role"] in ("reference", "baseline")
        name = f"**{c['label']}**" if reference else f"`{c['name']}`"
        if c["role"] not in ("reference", "baseline", "method"):
            name += f", {c['role']}"
        share = f"{100 * c['normalised']['mean']:.1f}" if c["name"] == "experts" else points(c["normalised"])
        against, ahead = "", ""
        if c["name"] not in ("experts", "task_arithmetic"):
            against = points(c["difference"], "+")
            ahead = f"{sum(d > 0 for d in c['difference_by_seed'])} of {len(c['difference_by_seed'])}"
        gained = "" if c["role"] == "reference" else points(c["over_base"], "+")
        whole = c["seconds"] + c["statistic_seconds"]
        seconds = "" if c["role"] == "reference" else f"{whole:.0f}" if whole >= 9.5 else f"{whole:.1g}"
        lines.append(f"| {' | '.join([name, share, against, ahead, gained, seconds])} |")
    return lines


def learning(kept: dict[str, Any]) -> list[str]:
    """Merges as ``benchmarks/adaptive.py`` judged them, in its order."""
    lines = [
        "| | learned from | % of the experts' accuracy | entropy | cross-entropy | most frequent answer |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for r in kept["rows"]:
        shares = [f"{100 * r[k]:.1f}" for k in ("normalised",)] + [f"{r[k]:.2f}" for k in ("entropy", "cross_entropy")]
        lines.append(f"| {r['name']} | {r['learned_from']} | {' | '.join(shares)} | {100 * r['most_frequent']:.0f} % |")
    return lines


TABLES = {"merges": comparison, "adaptive": learning}


def written(guide: str) -> str:
    """The guide with every marked table as the kept results have it."""

    def fill(found: re.Match[str]) -> str:
        kept = json.loads((RESULTS / f"{found[1]}.json").read_text(encoding="utf-8"))[found[2]]
        said = [f"*{kept['verdict']}*", ""] if "verdict" in kept else []
        return "\n".join([f"<!-- table {found[1]} {found[2]} -->", *said, *TABLES[found[1]](kept), "<!-- end -->"])

    return re.sub(r"<!-- table (\w+) (\w+) -->\n.*?<!-- end -->", fill, guide, flags=re.S)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        file = RESULTS / "merges.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        kept[sys.argv[2]] = keep(Path(sys.argv[1]))
        file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    for document in GUIDES:
        document.write_text(written(document.read_text(encoding="utf-8")), encoding="utf-8")
