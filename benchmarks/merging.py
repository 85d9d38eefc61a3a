"""Time and memory of merging eight ViT-B/32-sized checkpoints (88 M parameters each, float32) from disk to disk.

    python benchmarks/merging.py                         # all figures; writes 3.2 GB under the temporary directory, and removes them
    python benchmarks/merging.py --method ties --layers 2   # a first look

Every merge runs in a process of its own. Its memory is the peak of resident memory above what the process held after a merge of tiny
models, so that interpreter and libraries do not count (Linux only); beside it stands the bound, T + 2 times the largest tensor.
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
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from polytask.merging import Merger, Place
from polytask.merging.esm import ESM
from polytask.merging.on_disk import MergePlan
from polytask.merging.safetensors_file import Spec, Writer
from polytask.merging.tsv_m import TSVM

ROUNDS = 3
FREE = Place("w")
METHODS = ("average", "task_arithmetic", "ties", "dare_ties", "tsv_m")
CONFIG = {
    "architectures": ["CLIPVisionModel"],
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "projection_dim": 512,
}
ONE_MERGE = """
import json, sys, time
from pathlib import Path
import torch
from polytask.merging import merge
from polytask.merging.on_disk import MergePlan, write
folder, method, experts = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
small = {"w": torch.randn(300, 200)}
merge(small, [small] * experts, method)
def resident(what):
    return next(1024 * int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(what))
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
before = resident("VmRSS")
started = time.perf_counter()
plan = MergePlan([folder / f"expert{t}" for t in range(experts)], folder / "base", method)
write(plan, folder / "merged", overwrite=True)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "bytes": resident("VmHWM") - before}))
"""


def layout(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the vision half of CLIP ViT-B/32."""
    yield "vision_model.embeddings.class_embedding", (768,)
    yield "vision_model.embeddings.patch_embedding.weight", (768, 3, 32, 32)
    yield "vision_model.embeddings.position_embedding.weight", (50, 768)
    for name in ("pre_layrnorm", "post_layernorm"):
        yield from ((f"vision_model.{name}.{p}", (768,)) for p in ("weight", "bias"))
    for i in range(layers):
        block = f"vision_model.encoder.layers.{i}."
        sizes = {f"self_attn.{k}_proj": (768, 768) for k in ("q", "k", "v", "out")}
        for name, (rows, columns) in (sizes | {"mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}).items():
            yield f"{block}{name}.weight", (rows, columns)
            yield f"{block}{name}.bias", (rows,)
        yield from ((f"{block}layer_norm{k}.{p}", (768,)) for k in (1, 2) for p in ("weight", "bias"))


def make_models(folder: Path, experts: int, layers: int) -> dict[str, Spec]:
    """A base and experts that moved a little, most of it in few directions, as fine-tuning does."""
    specs = {name: Spec(shape, "float32") for name, shape in sorted(layout(layers))}
    for model in ["base", *(f"expert{t}" for t in range(experts))]:
        (folder / model).mkdir()
        (folder / model / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
        generator = torch.Generator().manual_seed(0)
        moves = torch.Generator().manual_seed(1 + (int(model[6:]) if model != "base" else 0))
        with Writer(folder / model / "model.safetensors", specs) as writer:
            for name, spec in specs.items():
                weight = 0.03 * torch.randn(spec.shape, generator=generator)
                writer.add(name, weight if model == "base" else weight + moved(spec.shape, moves))
    return specs


def moved(shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    noise = 1e-3 * torch.randn(shape, generator=g)
    if len(shape) == 2:
        noise += 2e-4 * torch.randn(shape[0], 16, generator=g) @ torch.randn(16, shape[1], generator=g)
    return noise


def one_merge(folder: Path, method: str, experts: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", ONE_MERGE, str(folder), method, str(experts)], stdout=subprocess.PIPE, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def full_svds(D: torch.Tensor) -> torch.Tensor:
    """TSV-M as it is written in the paper."""
    k = min(D.shape[1:]) // len(D)
    U, s, V = zip(*(torch.linalg.svd(d, full_matrices=False) for d in D), strict=True)
    P, _, Q = torch.linalg.svd(torch.cat([u[:, :k] for u in U], 1), full_matrices=False)
    R, _, T = torch.linalg.svd(torch.cat([v[:k] for v in V]), full_matrices=False)
    return P @ Q @ torch.diag(torch.cat([x[:k] for x in s])) @ R @ T


class TSVMByFormula(TSVM):
    """TSV-M as it is written in the paper, in the place of ours."""

    def update_matrix(self, W0: torch.Tensor, D: torch.Tensor, place: Place) -> torch.Tensor:  # noqa: ARG002
        return full_svds(D)


class ESMByFormula(ESM):
    """ESM as it is written in the paper, in the place of ours; it takes activations for statistics."""

    def layer(self, D: torch.Tensor, statistics: Sequence[torch.Tensor]) -> torch.Tensor:
        return esm_by_full_svds(D, statistics)


def in_turns(
    ours: Merger, formula: Merger, D: torch.Tensor, place: Place = FREE, activations: Place = FREE
) -> tuple[torch.Tensor, float, float, float]:
    """Our result, and medians over rounds: our CPU seconds, the formula's, their ratio; libraries are loaded before."""

    def merged(merger: Merger, at: Place) -> torch.Tensor:
        return merger.merge(torch.zeros(D.shape[1:]), D.clone(), at)

    first, rounds = merged(ours, place), []
    merged(formula, activations)
    for _ in range(ROUNDS):
        started = time.process_time()
        merged(ours, place)
        between = time.process_time()
        merged(formula, activations)
        rounds.append((between - started, time.process_time() - between))
    times = [statistics.median(x) for x in zip(*rounds, strict=True)]
    return first, *times, statistics.median(a / b for a, b in rounds)


def tsv_m_against_full_svds(experts: int) -> list[tuple[str, float, float, float, float]]:
    """(shape, our CPU seconds, the formula's in float32, their ratio, our relative error), for one matrix of each shape."""
    found = []
    for shape in ((768, 768), (3072, 768), (768, 3072)):
        g = torch.Generator().manual_seed(0)
        D = torch.stack([moved(shape, g) for _ in range(experts)])
        ours, *seconds = in_turns(TSVM(), TSVMByFormula(), D)
        # what the formula gives in float32 is itself off: nearly equal singular values at the cut
        exact = full_svds(D.double())
        error = float((ours - exact).norm() / exact.norm())
        found.append((f"{shape[0]} x {shape[1]}", *seconds, error))
    return found


def esm_by_full_svds(D: torch.Tensor, X: list[torch.Tensor], p: float = 2, q: float = 0.15) -> torch.Tensor:
    """ESM's formula for one layer as it is written in the paper, on activations."""

    def polar(M: torch.Tensor) -> torch.Tensor:
        P, S, Q = torch.linalg.svd(M, full_matrices=False)
        return P @ Q * S.mean()

    k = D.shape[1] // len(D)
    U, V = [], []
    norm = D.flatten(1).norm(dim=1)
    for delta, x, nu in zip(D, X, norm / norm.mean(), strict=True):
        _, s, vh = torch.linalg.svd(x @ delta.T, full_matrices=False)
        w = (s[:k].square() / s[:k].square().mean()) ** q
        w = w / w.mean()
        U.append(vh[:k].T * w)
        V.append(vh[:k] @ delta * w[:, None] * nu**p)
    right = torch.cat(V)
    c = right.norm(dim=0)
    return polar(torch.cat(U, 1)) @ polar(right * (c / c.mean()) ** p) * 2


def esm_against_full_svds(
    experts: int, shapes: tuple[tuple[int, int], ...] = ((768, 768), (3072, 768), (768, 3072)), rows: int = 1600
) -> list[tuple[str, float, float, float, float]]:
    """As :func:`tsv_m_against_full_svds`; the inputs are those of 32 images of 50 tokens, gathering them is not counted on either side."""
    found = []
    for shape in shapes:
        g = torch.Generator().manual_seed(0)
        D = torch.stack([moved(shape, g) for _ in range(experts)])
        mixing = torch.randn(shape[1], shape[1], generator=g) / shape[1] ** 0.5
        X = [torch.randn(rows, shape[1], generator=g) @ mixing for _ in range(experts)]
        ones = [torch.cat([x, torch.ones(rows, 1)], 1).double() for x in X]
        S = [z.T @ z for z in ones]
        ours, *seconds = in_turns(ESM(), ESMByFormula(), D, Place("w", statistics=S), Place("w", statistics=X))
        exact = esm_by_full_svds(D.double(), [x.double() for x in X])
        error = float((ours - exact).norm() / exact.norm())
        found.append((f"{shape[0]} x {shape[1]}", *seconds, error))
    return found


def seven_billion(folder: Path) -> None:
    """What it takes to plan a merge of four models with Llama-2-7B's layout: headers over files with holes in place of weights."""
    shapes = {"model.embed_tokens.weight": (32000, 4096), "lm_head.weight": (32000, 4096), "model.norm.weight": (4096,)}
    for i in range(32):
        block = f"model.layers.{i}."
        shapes |= {f"{block}self_attn.{k}_proj.weight": (4096, 4096) for k in "qkvo"}
        shapes |= {f"{block}mlp.{k}_proj.weight": (11008, 4096) for k in ("gate", "up")}
        shapes |= {f"{block}mlp.down_proj.weight": (4096, 11008), f"{block}input_layernorm.weight": (4096,)}
        shapes |= {f"{block}post_attention_layernorm.weight": (4096,)}
    specs = {name: Spec(shape, "bfloat16") for name, shape in shapes.items()}
    for t in range(5):
        with Writer(folder / f"seven{t}.safetensors", specs) as writer:
            writer.stream.truncate(writer.total)
    paths = [folder / f"seven{t}.safetensors" for t in range(5)]
    started = time.perf_counter()
    plan = MergePlan(paths[1:], paths[0], "ties")
    print(f"plan of {sum(s.elements for s in specs.values()) / 1e9:.2f} G parameters, 4 experts: ", end="")
    print(f"{plan.bytes / 1e9:.1f} GB, peak {plan.peak_bytes / 1e9:.1f} GB, {time.perf_counter() - started:.2f} s")
    command = [sys.executable, "-m", "polytask", "merge", *map(str, paths), "--method", "ties", "--dry-run"]
    pairs = [(wall(command), wall([sys.executable, "-c", "import torch"])) for _ in range(ROUNDS)]
    whole, torch_alone = (statistics.median(x) for x in zip(*pairs, strict=True))
    print(f"the whole command: {whole:.2f} s; importing torch alone takes {torch_alone:.2f} s")


def wall(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="*", default=list(METHODS))
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12, help="fewer for a first look")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="polytask-merging-") as name:
        folder = Path(name)
        seven_billion(folder)
        specs = make_models(folder, options.experts, options.layers)
        largest = 4 * max(s.elements for s in specs.values())
        bound = (options.experts + 2) * largest
        print(f"{sum(s.elements for s in specs.values()) / 1e6:.1f} M parameters, {options.experts} experts, ", end="")
        print(f"largest tensor {largest / 1e6:.1f} MB, bound {bound / 1e6:.1f} MB, {torch.get_num_threads()} thread(s)")
        print(f"{'method':18}{'seconds':>9}{'peak MB':>9}{'of bound':>10}")
        for method in options.method:
            found = one_merge(folder, method, options.experts)
            print(
                f"{method:18}{found['seconds']:9.1f}{found['bytes'] / 1e6:9.1f}{found['bytes'] / bound:10.2f}",
                flush=True,
            )
        for method, compare in (("tsv_m", tsv_m_against_full_svds), ("esm", esm_against_full_svds)):
            for shape, ours, theirs, ratio, error in compare(options.experts):
                times = f"{ours:.2f} s, full SVDs {theirs:.2f} s, ratio {ratio:.2f}"
                print(f"{method} {shape}: {times}, relative error {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
