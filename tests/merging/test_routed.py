"""Layers with routed experts: exact where they must be, and back from their folder as they went."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.errors import InputError, StorageError
from polytask.merging.routed import LowRank, RoutedLinear, forcing, recording, routed_layers, unpadded
from polytask.merging.routed_attention import RoutedAttention
from polytask.merging.routed_model import add_experts, load_routed, save_routed
from polytask.merging.routers import Arrow, Constant, LinearRouter, Prototypes, Router, Subspaces, own_mean

K, RANK, WIDTH = 3, 4, 16


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low(outputs: int, inputs: int, seed: int = 1) -> LowRank:
    return LowRank(draw(K, RANK, inputs, seed=seed), draw(K, outputs, RANK, seed=seed + 50))


def layer(router: Router, mix: Any = "outputs") -> RoutedLinear:
    torch.manual_seed(0)
    experts = low(10, WIDTH)
    return RoutedLinear(nn.Linear(WIDTH, 10).double(), experts.A, experts.B, router.double(), mix)


ROUTERS: dict[str, Router] = {
    "prototypes": Prototypes(draw(K, WIDTH, seed=3)),
    "arrow": Arrow(draw(K, WIDTH, seed=3), temperature=0.7, top_k=2),
    "arrow per example": Arrow(draw(K, WIDTH, seed=3), per="example"),
    "subspaces": Subspaces(draw(K, 2, WIDTH, seed=3), top_k=2),
    "linear": LinearRouter(draw(K, WIDTH, seed=3), draw(K, seed=4), top_k=2),
    "linear per example": LinearRouter(draw(K, WIDTH, seed=3), draw(K, seed=4), per="example"),
    "constant": Constant(draw(K, seed=3)),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("shape", [(5, WIDTH), (5, 7, WIDTH), (5, 2, 3, WIDTH)])
def test_output_is_the_formula_token_by_token(name: str, shape: tuple[int, ...]) -> None:
    routed = layer(copy.deepcopy(ROUTERS[name]))
    x = draw(*shape)
    w = routed.weights(x).expand(*shape[:-1], K)
    expected = F.linear(x, routed.weight, routed.bias)
    for t in range(K):
        expected = expected + w[..., t, None] * (x @ (routed.B[t] @ routed.A[t]).T)
    assert torch.allclose(routed(x), expected, rtol=1e-10)
    if name != "constant":
        assert torch.allclose(w.sum(-1), torch.ones(shape[:-1], dtype=torch.float64))
        assert bool((w >= 0).all())


@pytest.mark.parametrize("name", ROUTERS)
def test_mixing_parameters_has_cross_terms(name: str) -> None:
    routed = layer(copy.deepcopy(ROUTERS[name]), "parameters")
    x = draw(5, 7, WIDTH)
    w = routed.weights(x).expand(5, 7, K)
    mixed = [torch.einsum("btk,k...->bt...", w, M) for M in (routed.A, routed.B)]
    expected = F.linear(x, routed.weight, routed.bias) + torch.einsum("btor,btri,bti->bto", mixed[1], mixed[0], x)
    assert torch.allclose(routed(x), expected, rtol=1e-10)
    one = F.one_hot(torch.tensor([0, 2, 1, 1, 0]), K).double()
    exact = layer(copy.deepcopy(ROUTERS[name]))
    for each in (routed, exact):
        each.forced = one
    assert torch.allclose(routed(x), exact(x), rtol=1e-10), "one expert alone has none"


@pytest.mark.parametrize("name", [n for n in ROUTERS if "per" not in n])
def test_samples_are_routed_by_themselves(name: str) -> None:
    routed = layer(copy.deepcopy(ROUTERS[name]))
    x, others = draw(4, 6, WIDTH), draw(4, 6, WIDTH, seed=9)
    mixed = torch.cat([x[:2], 100 * others])
    assert torch.allclose(routed(mixed)[:2], routed(x)[:2], rtol=1e-12)


def test_prototypes_choose_by_the_cosine_of_the_mean_without_padding() -> None:
    P = torch.eye(K, WIDTH, dtype=torch.float64) * torch.tensor([[100.0], [1.0], [0.01]], dtype=torch.float64)
    x = torch.zeros(2, 4, WIDTH, dtype=torch.float64)
    x[0, :, 2] = 1.0
    x[1, 0, 1], x[1, 1:, 0] = 1.0, 5.0  # three tokens of padding
    assert Prototypes(P)(x).argmax(-1).tolist() == [2, 0]
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    assert Prototypes(P)(x, mask).argmax(-1).tolist() == [2, 1]
    model = add_experts(
        nn.Sequential(nn.Linear(WIDTH, 5).double()),
        ["a", "b", "c"],
        {"0.weight": low(5, WIDTH)},
        lambda *_: Prototypes(P),
    )
    with recording(model) as record, unpadded(model, mask):
        model(x)
    assert record.chosen("0").tolist() == [2, 1]
    assert record.shares("0") == {"a": 0.0, "b": 0.5, "c": 0.5}
    assert record.accuracy("b") == 0.5
    with pytest.raises(InputError, match=r"mask is for \[2, 4\] samples and tokens, and a routed layer saw \[2, 3\]"):
        own_mean(x[:, :3], mask)


def test_arrow_knows_no_sign_and_keeps_the_top() -> None:
    v, x = draw(5, WIDTH, seed=2), draw(20, WIDTH, seed=6)
    signs = torch.tensor([1.0, -1, -1, 1, -1], dtype=torch.float64)[:, None]
    w = Arrow(v, top_k=2)(x)
    assert torch.equal(w, Arrow(signs * v, top_k=2)(x))
    assert (w > 0).sum(-1).tolist() == [2] * 20
    strongest = (x @ v.T).abs().topk(2).indices.sort().values
    assert torch.equal(w.topk(2).indices.sort().values, strongest)
    assert torch.equal(Arrow(v, top_k=None)(x), Arrow(v, top_k=99)(x))


def test_a_fresh_linear_router_is_the_uniform_merge() -> None:
    routed = layer(LinearRouter.zeros(K, WIDTH))
    uniform = routed.weight + LowRank(routed.A, routed.B).delta(torch.full((K,), 1 / K, dtype=torch.float64))
    x = draw(4, 6, WIDTH)
    assert torch.allclose(routed(x), F.linear(x, uniform, routed.bias), rtol=1e-10)
    routed(x).square().sum().backward()
    trained = {n for n, p in routed.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert trained == {"weight", "bias", "router.R", "router.b"}, "experts are frozen"


def test_ranks_may_differ() -> None:
    pairs = [(draw(r, WIDTH, seed=r), draw(10, r, seed=r + 9)) for r in (1, 4, 2)]
    stacked = LowRank.stack(pairs)
    assert stacked.A.shape == (3, 4, WIDTH)
    for t, (A, B) in enumerate(pairs):
        assert torch.allclose(stacked.delta(F.one_hot(torch.tensor(t), 3).double()), B @ A)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = draw(3, 5, WIDTH).to(dtype)
    for router in ROUTERS.values():
        half = copy.deepcopy(router).to(dtype)
        exact = copy.deepcopy(half).float()
        assert half(x).dtype == dtype
        assert torch.equal(half(x), exact(x.float()).to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(half(x), exact(x.float()).to(dtype))


class Net(nn.Module):
    """An encoder of PyTorch's own and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        one = nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(one, 2)
        self.head = nn.Linear(WIDTH, 3)
        self.double().eval()

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(own_mean(self.encoder(x, src_key_padding_mask=padding), None if padding is None else ~padding))


WEIGHTS = {
    "encoder.layers.0.self_attn.in_proj_weight": (3 * WIDTH, WIDTH),
    "encoder.layers.1.self_attn.in_proj_weight": (3 * WIDTH, WIDTH),
    "encoder.layers.1.self_attn.out_proj.weight": (WIDTH, WIDTH),
    "encoder.layers.1.linear1.weight": (32, WIDTH),
}


def with_experts(model: nn.Module, size: float = 0.1) -> nn.Module:
    experts = {
        n: LowRank(low(*shape, seed=i).A, size * low(*shape, seed=i).B) for i, (n, shape) in enumerate(WEIGHTS.items())
    }
    return add_experts(model, ["a", "b", "c"], experts, lambda n, e: Prototypes(draw(K, e.A.shape[2], seed=len(n))))


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_an_encoder_with_an_expert_is_the_encoder_with_its_weights(padded: bool) -> None:
    x = draw(6, 5, WIDTH)
    padding = (torch.arange(5) >= torch.tensor([[5], [3], [4], [1], [2], [5]])) if padded else None
    model = with_experts(Net())
    experts = {n: low(*shape, seed=i) for i, (n, shape) in enumerate(WEIGHTS.items())}
    with forcing(model, None):
        assert torch.allclose(model(x, padding), Net()(x, padding), rtol=1e-9)
    for t, name in enumerate("abc"):
        plain = Net()
        for n, p in plain.named_parameters():
            if n in WEIGHTS:
                p += 0.1 * experts[n].B[t] @ experts[n].A[t]
        with forcing(model, name):
            assert torch.allclose(model(x, padding), plain(x, padding), rtol=1e-9)
        with forcing(model, torch.full((6,), t)):
            assert torch.allclose(model(x, padding), plain(x, padding), rtol=1e-9)
        assert not torch.allclose(plain(x, padding), Net()(x, padding), rtol=1e-3)


@torch.no_grad()
def test_no_sample_is_routed_by_another_or_by_padding() -> None:
    model = with_experts(Net())
    x = draw(6, 5, WIDTH)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4], [1], [2], [5]])
    alone = torch.cat([model(x[i : i + 1], padding[i : i + 1]) for i in range(6)])
    assert torch.allclose(model(x, padding), alone, rtol=1e-9)
    first = routed_layers(model)["encoder.layers.0.self_attn.in_proj"]
    with recording(model) as record:
        model(x, padding)
    own = torch.stack([x[i, : int((~padding[i]).sum())].mean(0) for i in range(6)])
    expected = F.cosine_similarity(own[:, None], first.router.get_buffer("prototypes")[None], dim=-1).argmax(-1)
    assert torch.equal(record.chosen("encoder.layers.0.self_attn.in_proj"), expected)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (5,)])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "heads"])
@torch.no_grad()
def test_attention_is_pytorch_s(batch_first: bool, shape: tuple[int, ...], masks: str) -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(WIDTH, 4, batch_first=batch_first).double().eval()
    ours = RoutedAttention(plain)
    x, memory = draw(*shape, WIDTH), draw(*shape[:-1], 7, WIDTH, seed=2)
    if not batch_first and len(shape) == 2:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    batch = shape[:-1]
    for query, key in ((x, x), (x, memory)):
        S = 5 if key is x else 7
        given: dict[str, Any] = {}
        if masks == "bool":
            given = {
                "attn_mask": torch.ones(5, S).triu(1).bool(),
                "key_padding_mask": (draw(*batch, S) > 0.5) & (torch.arange(S) > 0),
            }
        elif masks == "float":
            given = {"attn_mask": draw(5, S, seed=5), "key_padding_mask": draw(*batch, S)}
        elif masks == "heads":
            given = {"attn_mask": draw(4 * (batch[0] if batch else 1), 5, S, seed=5)}
        for more in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            expected, found = (m(query, key, key, **given, **more) for m in (plain, ours))
            for e, f in zip(expected, found, strict=True):
                assert (e is None and f is None) or torch.allclose(e, f, rtol=1e-9)


def test_a_routed_model_survives_its_folder(tmp_path: Path) -> None:
    model = with_experts(Net())
    for router, name in ((LinearRouter(draw(K, WIDTH), draw(K), top_k=2), "0"), (Constant(draw(K)), "1")):
        routed = routed_layers(model)[f"encoder.layers.{name}.self_attn.in_proj"]
        routed.router, routed.mix = router.double(), "parameters"
    save_routed(model, tmp_path / "routed")
    assert {p.name for p in (tmp_path / "routed").iterdir()} == {
        "model.safetensors",
        "experts.safetensors",
        "routing.json",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["routed"], "nothing is left beside it"
    back = load_routed(tmp_path / "routed", Net(seed=1))
    x = draw(6, 5, WIDTH)
    assert torch.equal(back(x), model(x))
    for name in ("a", None):
        with forcing(model, name), forcing(back, name):
            assert torch.equal(back(x), model(x))
    again = {n: m.mix for n, m in routed_layers(back).items()}
    assert again == {n: m.mix for n, m in routed_layers(model).items()}
    # the base alone is a plain checkpoint under its own names
    from safetensors.torch import load_file

    plain = Net(seed=1)
    plain.load_state_dict(load_file(tmp_path / "routed" / "model.safetensors"))
    with forcing(model, None):
        assert torch.allclose(plain(x), model(x), rtol=1e-9)


def damage(folder: Path, case: str) -> nn.Module:
    if case == "routing":
        (folder / "routing.json").unlink()
    elif case == "json":
        (folder / "routing.json").write_text("[1]")
    elif case == "cut":
        file = folder / "experts.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
    elif case == "expert":
        said = json.loads((folder / "routing.json").read_text())
        said["layers"][0]["weight"] = "head.weight"
        (folder / "routing.json").write_text(json.dumps(said))
    elif case == "shape":
        model = Net()
        model.head = nn.Linear(WIDTH, 4)
        return model
    elif case == "name":
        model = Net()
        del model.head
        return model
    return Net()


BROKEN = {
    "routing": (StorageError, "there is no routing.json in"),
    "json": (InputError, "does not describe a model with experts"),
    "cut": (StorageError, "experts.safetensors is cut short within the tensor"),
    "expert": (InputError, "does not hold the experts of head.weight"),
    "shape": (InputError, r"head.weight has shape \[3, 16\] in .*model.safetensors and \[4, 16\] in the model given"),
    "name": (InputError, "the model given has no tensor head.weight, which .*model.safetensors has"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders(tmp_path: Path, case: str) -> None:
    save_routed(with_experts(Net()), tmp_path / "routed")
    model = damage(tmp_path / "routed", case)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    kind, message = BROKEN[case]
    with pytest.raises(kind, match=message):
        load_routed(tmp_path / "routed", model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items()), "nothing was half loaded"


def test_what_cannot_be_routed() -> None:
    one = {"0.weight": low(5, WIDTH)}

    def put(names: list[str], experts: dict[str, LowRank], model: nn.Module | None = None) -> None:
        add_experts(model or nn.Sequential(nn.Linear(WIDTH, 5)), names, experts, lambda *_: Constant(torch.ones(K)))

    for names in ([], ["a", "a", "b"]):
        with pytest.raises(InputError, match="experts need names, each its own"):
            put(names, one)
    with pytest.raises(InputError, match=r"0\.weight has 3 experts, and 2 are named"):
        put(["a", "b"], one)
    with pytest.raises(InputError, match=r"1\.weight is not the weight of a linear layer"):
        put(["a", "b", "c"], {"1.weight": low(5, WIDTH)})
    with pytest.raises(InputError, match=r"0\.bias is not the weight"):
        put(["a", "b", "c"], {"0.bias": low(5, WIDTH)})
    with pytest.raises(InputError, match=r"do not fit a \[5, 16\] layer"):
        put(["a", "b", "c"], {"0.weight": low(6, WIDTH)})
    with pytest.raises(InputError, match="the model has no routed layer"):
        routed_layers(nn.Linear(2, 2))
    model = add_experts(nn.Sequential(nn.Linear(WIDTH, 5)), ["a", "b", "c"], one, lambda *_: Constant(torch.ones(K)))
    with pytest.raises(InputError, match="there is no expert 'd'; there are a, b, c"), forcing(model, "d"):
        pass
    with pytest.raises(InputError, match="there is no routed layer '7'"), forcing(model, {"7": torch.ones(K)}):
        pass
    with pytest.raises(InputError, match="takes no experts"):
        RoutedAttention(nn.MultiheadAttention(WIDTH, 4, kdim=8))


def test_saving_refuses_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        save_routed(with_experts(Net()), tmp_path)
