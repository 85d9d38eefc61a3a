"""Multi-head attention whose projections can have experts."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.errors import InputError
from polytask.merging.routed import RoutedLinear


class RoutedAttention(nn.Module):
    """What :class:`torch.nn.MultiheadAttention` computes, with the stacked input projection as a linear layer that experts can join.

    Samples stand on the first axis throughout, whatever layout the caller has: a sample is routed by its own tokens alone, padding
    left out, and no expert sees another sample's.

    Args:
        attention: the module whose place it takes; parameters are shared with it.

    Raises:
        InputError: keys or values of another width, extra bias rows, added zeros.
    """

    _qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer from its fused path, which knows no experts

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise InputError("attention with keys of another width, bias_k or add_zero_attn takes no experts")
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        stacked = nn.Linear(self.embed_dim, 3 * self.embed_dim, device="meta")
        stacked.weight, stacked.bias = attention.in_proj_weight, attention.in_proj_bias
        self.in_proj: nn.Linear | RoutedLinear = stacked
        self.out_proj: nn.Linear | RoutedLinear = attention.out_proj
        self.train(attention.training)

    @property
    def in_proj_weight(self) -> Tensor:
        """The stacked projections of queries, keys and values."""
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        """Their biases."""
        return self.in_proj.bias

    def forward(
        self,
        query: Float[Tensor, "..."],
        key: Float[Tensor, "..."],
        value: Float[Tensor, "..."],
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`torch.nn.MultiheadAttention.forward`; a causal hint without its mask is refused there too."""
        if is_causal and attn_mask is None:
            raise InputError("attention that is causal needs its attn_mask")
        single = query.ndim == 2
        if single and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        alone = query is key is value
        first = self._batch_first(query)
        others = (first, first) if alone else (self._batch_first(key), self._batch_first(value))
        q, k, v = self._projected(first, *others, key_padding_mask)
        mask = _joined(attn_mask, key_padding_mask, q)
        if need_weights:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            attention = (scores if mask is None else scores + mask).softmax(-1)
            attention = F.dropout(attention, self.dropout, self.training)
            mixed = attention @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        out = self._restored(self.out_proj(mixed.transpose(1, 2).flatten(2)), single)
        if not need_weights:
            return out, None
        attention = attention.mean(1) if average_attn_weights else attention
        return out, attention[0] if single else attention

    def _projected(
        self,
        query: Float[Tensor, "batch length width"],
        key: Float[Tensor, "batch length width"],
        value: Float[Tensor, "batch length width"],
        padding: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values, shape (batch, heads, length, width / heads)."""
        if query is key is value:
            parts = self._in_proj(query, padding).chunk(3, -1)
        else:
            several = ((query, None), (key, padding), (value, padding))
            parts = tuple(self._in_proj(x, pad).chunk(3, -1)[i] for i, (x, pad) in enumerate(several))
        return tuple(p.view(*p.shape[:2], self.num_heads, -1).transpose(1, 2) for p in parts)

    def _in_proj(self, x: Float[Tensor, "batch length width"], padding: Tensor | None) -> Tensor:
        routed = self.in_proj
        if padding is None or not isinstance(routed, RoutedLinear) or routed.mask is not None:
            projected: Tensor = routed(x)
            return projected
        routed.mask = ~padding if padding.dtype == torch.bool else padding >= 0
        try:
            projected = routed(x)
        finally:
            routed.mask = None
        return projected

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _restored(self, x: Float[Tensor, "batch length width"], single: bool) -> Tensor:
        if single:
            return x[0]
        return x if self.batch_first else x.transpose(0, 1)


def _joined(
    attn_mask: Tensor | None, padding: Tensor | None, q: Float[Tensor, "batch heads length width"]
) -> Tensor | None:
    """Both masks as one that is added to the scores, shape (batch or 1, heads or 1, length or 1, keys)."""
    joined: Tensor | None = None
    if attn_mask is not None:
        spread = attn_mask.view(*q.shape[:2], *attn_mask.shape[1:]) if attn_mask.ndim == 3 else attn_mask
        joined = _added(spread, q.dtype)
    if padding is not None:
        row = _added(padding, q.dtype)[:, None, None]
        joined = row if joined is None else joined + row
    return joined


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
    return mask.to(dtype)
