"""Statistics of an expert's inputs, layer by layer."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from polytask.errors import InputError
from polytask.merging import gather_fisher, gather_gramians, gramian, input_mean, merge, rows, second_moment


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def augmented(X: Tensor) -> Tensor:
    ones = torch.cat([X.reshape(-1, X.shape[-1]).double(), torch.ones(X[..., 0].numel(), 1).double()], 1)
    return ones.T @ ones


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


def test_gramians_are_of_the_layer_s_inputs() -> None:
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2)).train()
    batches = [numbers(8, 3, 5, seed=s) for s in range(3)]
    found = gather_gramians(net, batches)
    X = torch.cat(batches).view(-1, 5)
    assert set(found) == {"0.weight", "2.weight"}
    assert close(found["0.weight"], augmented(X), 1e-12)
    assert close(found["2.weight"], augmented(net[:2](X).detach()), 1e-12)
    assert net.training
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(InputError, match="no batch"):
        gather_gramians(net, [])


def test_one_tensor_carries_three_statistics() -> None:
    X = numbers(40, 5)
    S = gather_gramians(nn.Linear(5, 2), X.split(7))["weight"]
    assert S.dtype == torch.float64
    assert close(gramian(S), X.T.double() @ X.double(), 1e-12)
    assert close(second_moment(S), X.T.double() @ X.double() / 40, 1e-12)
    assert close(input_mean(S), X.double().mean(0), 1e-12)
    assert rows(S) == 40


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_s_stacked_weight_and_its_output(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, dropout=0.1)
    X = numbers(3, 5, 8)
    found = gather_gramians(layer, [X])
    assert set(found) == {f"{n}" for n, p in layer.named_parameters() if p.ndim == 2}
    assert close(found["self_attn.in_proj_weight"], augmented(X), 1e-12)
    # the heads' outputs, written out
    turned = X if batch_first else X.transpose(0, 1)
    q, k, v = (layer.self_attn.in_proj_bias + turned @ layer.self_attn.in_proj_weight.T).chunk(3, -1)
    q, k, v = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (q, k, v))
    heads = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert close(found["self_attn.out_proj.weight"], augmented(heads.detach()))
    assert rows(found["linear1.weight"]) == 15


def test_attention_across_two_inputs_counts_both() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    q, kv = numbers(2, 3, 8), numbers(2, 4, 8, seed=1)
    found = gather_gramians(attention, [{"query": q, "key": kv, "value": kv}])
    assert close(found["in_proj_weight"], augmented(q) + augmented(kv), 1e-12)
    apart = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    k, v = numbers(2, 4, 6, seed=1), numbers(2, 4, 4, seed=2)
    found = gather_gramians(apart, [(q, k, v)])
    for name, x in (("q_proj_weight", q), ("k_proj_weight", k), ("v_proj_weight", v)):
        assert close(found[name], augmented(x), 1e-12)


class Tokens(nn.Module):
    """Layers that see tokens, flattened tokens, and pooled sentences."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.each, self.flat, self.pooled = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 1)
        self.twin = nn.Linear(4, 4)
        self.twin.weight = self.each.weight
        self.back = nn.Linear(4, 11, bias=False)
        self.back.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.each(self.embedding(input_ids))
        self.flat(x.flatten(0, 1))
        turned = x.transpose(0, 1)
        self.attention(turned, turned, turned, key_padding_mask=attention_mask == 0)
        self.back(self.twin(x))
        out: Tensor = self.pooled(x[:, 0])
        return out


@pytest.mark.parametrize("length", [5, 3])
def test_padding_does_not_count(length: int) -> None:
    model = Tokens()
    ids = torch.randint(11, (3, length), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * length, [1] * 2 + [0] * (length - 2), [1] * (length - 1) + [0]])
    found = gather_gramians(model, [{"input_ids": ids, "attention_mask": mask}])
    real = int(mask.sum())
    x = model.each(model.embedding(ids)).detach()[mask.bool()]
    assert {n: rows(S) for n, S in found.items()} == {
        "each.weight": 2 * real,
        "flat.weight": real,
        "pooled.weight": 3,
        "attention.in_proj_weight": real,
        "attention.out_proj.weight": real,
    }
    assert close(found["flat.weight"], augmented(x))
    assert close(found["attention.in_proj_weight"], augmented(x))
    # one weight, two layers; and a weight that is an embedding has none
    assert close(found["each.weight"], augmented(model.embedding(ids).detach()[mask.bool()]) + augmented(x))


def gpt2(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)).double()


def as_linear(model: GPT2LMHeadModel) -> nn.Module:
    """The same function with ``nn.Linear`` in the place of ``Conv1D``."""
    model = deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":
            linear = nn.Linear(*module.weight.shape).double()
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
            model.set_submodule(name, linear)
    return model


@pytest.mark.parametrize("method", ["regmean", "esm", "bmm", "regmean_pp"])
@pytest.mark.filterwarnings("ignore:.*led away")
def test_weights_kept_the_other_way_round_are_merged_as_those_of_linear_layers(method: str) -> None:
    models = [gpt2(s) for s in range(3)]
    turned = {n for n, m in models[0].named_modules() if type(m).__name__ == "Conv1D"}
    assert len(turned) == 4
    assert (models[0].transformer.h[0].attn.c_proj.weight.shape) == (8, 8)  # whose shape does not tell
    ids = {e: [{"input_ids": torch.randint(20, (6, 8))} for _ in range(2)] for e in ("a", "b")}
    states, linear = [[f(m).state_dict() for m in models] for f in (lambda m: m, as_linear)]
    found = merge(states[0], dict(zip("ab", states[1:], strict=True)), method, model=models[0], inputs=ids)
    expected = merge(
        linear[0], dict(zip("ab", linear[1:], strict=True)), method, model=as_linear(models[0]), inputs=ids
    )
    for n, v in expected.items():
        own = found[n].T if n.removesuffix(".weight") in turned else found[n]
        assert torch.allclose(own, v, rtol=1e-9, atol=1e-11), n
    named = {n.removesuffix(".T"): n.endswith(".T") for n in gather_gramians(models[0], ids["a"])}
    assert named == {f"{n}.weight": True for n in turned}


def test_what_no_statistic_can_be_gathered_of_is_said() -> None:
    with pytest.raises(InputError, match="no Gramian was gathered"):
        gather_gramians(nn.LayerNorm(4), [numbers(3, 4)])
    with pytest.raises(InputError, match=r"a classifier with logits \(examples, classes\), not \[3, 5, 2\]"):
        gather_fisher(nn.Linear(4, 2), [numbers(3, 5, 4)])
