"""The same merges by polytask and by mergekit: one YAML file, one set of sharded files, results compared number by number.

    python -m venv mk && mk/bin/pip install torch==2.13.0 mergekit==0.1.5      # an environment of its own
    python benchmarks/mergekit.py mk/bin/python                                # 8 x 88 M parameters, float32; 4 GB of disk, removed again
    python benchmarks/mergekit.py mk/bin/python --layers 2 --repeats 1         # a first look

Models have Llama's layout, which mergekit knows. TIES is compared as it is. DARE draws at random, and no two programs draw alike: at
density 1 nothing is dropped and the results must be equal; the time is measured at density 0.5 too, where they cannot be.
Seconds are those of the merge alone and, beside them, those of the whole process with its imports; the two programs take turns, and the
median of the repeats is printed. Memory is the peak of resident memory above what the process held when it began to merge (Linux only).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml

from merging import moved
from polytask.merging.checkpoint import open_checkpoint
from polytask.merging.safetensors_file import Spec, Writer, index_of, shards

WIDTH, INNER, VOCABULARY = 768, 2048, 4096
SHARD = 100_000_000
WANTED = {"difference": 1e-6, "seconds": 0.7, "memory": 1.0}
CASES: dict[str, tuple[str, float, bool]] = {
    "ties": ("ties", 0.2, True),
    "dare_ties, nothing dropped": ("dare_ties", 1.0, True),
    "dare_ties": ("dare_ties", 0.5, False),
}
"""Method, density, and whether the results must be equal."""

MEASURED = """
import json, os, sys, time
from pathlib import Path
config, folder = Path(sys.argv[1]), Path(sys.argv[2])
def resident(what):
    return next(1024 * int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(what))
{imports}
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
before, started = resident("VmRSS"), time.perf_counter()
{merge}
print("\\n" + json.dumps({{"seconds": time.perf_counter() - started, "bytes": resident("VmHWM") - before}}))
"""
OURS = MEASURED.format(
    imports="from polytask.merging.config import read_config\nfrom polytask.merging.on_disk import write\nimport polytask.registry\n"
    "list(polytask.registry.methods('merging'))",
    merge="write(read_config(config), folder)",
)
THEIRS = MEASURED.format(
    imports="import yaml\nfrom mergekit.config import MergeConfiguration\nfrom mergekit.merge import run_merge\n"
    "from mergekit.options import MergeOptions",
    merge="run_merge(MergeConfiguration.model_validate(yaml.safe_load(config.read_text())), str(folder), "
    "MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))",
)


def layout(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama whose head is its embedding."""
    yield "model.embed_tokens.weight", (VOCABULARY, WIDTH)
    for i in range(layers):
        block = f"model.layers.{i}."
        yield from ((f"{block}self_attn.{k}_proj.weight", (WIDTH, WIDTH)) for k in "qkvo")
        yield from ((f"{block}mlp.{k}_proj.weight", (INNER, WIDTH)) for k in ("gate", "up"))
        yield f"{block}mlp.down_proj.weight", (WIDTH, INNER)
        yield from ((f"{block}{k}_layernorm.weight", (WIDTH,)) for k in ("input", "post_attention"))
    yield "model.norm.weight", (WIDTH,)


def config_of(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def make_models(folder: Path, experts: int, layers: int) -> dict[str, Spec]:
    """A base and experts that moved a little from it, in shards."""
    specs = {name: Spec(shape, "float32") for name, shape in layout(layers)}
    files = shards(specs, SHARD)
    for model in ("base", *(f"expert{t}" for t in range(experts))):
        (folder / model).mkdir()
        (folder / model / "config.json").write_text(json.dumps(config_of(layers)))
        if len(files) > 1:
            total = sum(4 * s.elements for s in specs.values())
            (folder / model / "model.safetensors.index.json").write_text(index_of(files, total))
        weights = torch.Generator().manual_seed(0)
        moves = torch.Generator().manual_seed(1 + (int(model[6:]) if model != "base" else 0))
        for file, inside in files.items():
            with Writer(folder / model / file, inside) as writer:
                for name, spec in inside.items():
                    weight = 0.03 * torch.randn(spec.shape, generator=weights)
                    writer.add(name, weight if model == "base" else weight + moved(spec.shape, moves))
    return specs


def write_yaml(folder: Path, method: str, density: float, experts: int) -> Path:
    entries = [
        {"model": str(folder / f"expert{t}"), "parameters": {"weight": 1.0, "density": density}} for t in range(experts)
    ]
    said = {
        "models": entries,
        "merge_method": method,
        "base_model": str(folder / "base"),
        "parameters": {"normalize": True},
        "dtype": "float32",
    }
    file = folder / f"{method}-{density}.yml"
    file.write_text(yaml.safe_dump(said))
    return file


def run(python: str, script: str, config: Path, out: Path) -> dict[str, float]:
    """One merge in a process of its own."""
    subprocess.run(["rm", "-rf", str(out)], check=True)
    started = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [python, "-c", script, str(config), str(out)], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{python} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found | {"whole": time.perf_counter() - started}


def difference(folder: Path, specs: dict[str, Spec], experts: int, density: float) -> tuple[float, int]:
    """The largest difference between the two results, and how many entries are left out of it.

    Left out are entries that, in some expert, tie with the last one that trimming keeps: mergekit keeps an arbitrary choice of them,
    polytask all. Differences of float32 weights are coarse enough for a few such ties in every large tensor.
    """
    ours, theirs = open_checkpoint(folder / "ours"), open_checkpoint(folder / "theirs")
    assert set(ours.specs) == set(theirs.specs) == set(specs), "the results do not hold the same tensors"
    base, models = open_checkpoint(folder / "base"), [open_checkpoint(folder / f"expert{t}") for t in range(experts)]
    largest, ties = 0.0, 0
    for name, spec in specs.items():
        apart = (ours.read(name) - theirs.read(name)).abs().flatten()
        tied = torch.zeros(len(apart), dtype=torch.bool)
        if density < 1 and bool((apart > WANTED["difference"]).any()):
            W0, kept = base.read(name), int(density * spec.elements)
            for model in models:
                size = (model.read(name) - W0).abs().flatten()
                tied |= size == size.kthvalue(len(size) - kept + 1).values
        ties += int((tied & (apart > WANTED["difference"])).sum())
        largest = max(largest, float(apart[~tied].max()))
    return largest, ties


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="of the environment that has mergekit")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12, help="fewer for a first look")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="polytask-mergekit-") as name:
        folder = Path(name)
        specs = make_models(folder, options.experts, options.layers)
        sizes = [4 * s.elements for s in specs.values()]
        bound = (options.experts + 2) * max(sizes) + sum(sizes)
        print(
            f"{sum(sizes) / 4e6:.1f} M parameters, {options.experts} experts; allowed memory: base + (T + 2) x largest tensor = "
            f"{bound / 1e6:.0f} MB; {os.environ['OMP_NUM_THREADS']} thread(s), median of {options.repeats}"
        )
        print(f"{'':28}{'merge s':>16}{'process s':>16}{'peak MB':>14}{'ratio':>7}{'largest difference':>20}")
        for case, (method, density, equal) in CASES.items():
            config = write_yaml(folder, method, density, options.experts)
            found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
            for _ in range(options.repeats):
                found["ours"].append(run(sys.executable, OURS, config, folder / "ours"))
                found["theirs"].append(run(options.python, THEIRS, config, folder / "theirs"))
            ours, theirs = (
                {k: statistics.median(r[k] for r in found[who]) for k in ("seconds", "whole", "bytes")}
                for who in ("ours", "theirs")
            )
            apart = "drawn at random"
            if equal:
                largest, ties = difference(folder, specs, options.experts, density)
                apart = f"{largest:.1e}" + (f" but {ties} ties" if ties else "")
            print(
                f"{case:28}{ours['seconds']:8.1f}{theirs['seconds']:8.1f}{ours['whole']:8.1f}{theirs['whole']:8.1f}"
                f"{ours['bytes'] / 1e6:7.0f}{theirs['bytes'] / 1e6:7.0f}{ours['seconds'] / theirs['seconds']:7.2f}{apart:>20}",
                flush=True,
            )
        print(
            f"wanted: ratio <= {WANTED['seconds']}, difference <= {WANTED['difference']:.0e}, our memory <= {bound / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main()
