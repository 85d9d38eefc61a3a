"""Routers: which of a layer's low-rank experts an input is sent to, and with what weight.

A router maps the input of one layer to weights: of shape (experts,) when they depend on no input, (batch, experts) when a sample decides
as a whole, (batch, ..., experts) when each token decides for itself. Layers decide independently of one another, samples too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.errors import InputError

Decider = Literal["token", "example"]


class Router(nn.Module, ABC):
    """What gives the weights of a layer's experts.

    Attributes:
        kind: its name in files.
        options: what beside its tensors makes it, JSON-ready; a router is made anew by ``type(router)(**tensors, **options)``.
        one_a_sample: whether a sample always gets a single expert with weight 1, so that the others need not be computed.
    """

    kind: ClassVar[str]
    one_a_sample: ClassVar[bool] = False
    options: dict[str, Any]

    @abstractmethod
    def weigh(self, x: Float[Tensor, "batch ... inputs"], mask: Bool[Tensor, "batch tokens"] | None) -> Tensor:
        """The weights; ``x`` is float32 or wider."""

    def forward(
        self, x: Float[Tensor, "batch ... inputs"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "... experts"]:
        """The weights of the experts, in the input's dtype, computed in float32 or wider even under autocast.

        Args:
            x: the layer's input; the first axis counts samples.
            mask: True at tokens that are no padding.
        """
        with torch.autocast(x.device.type, enabled=False):
            return self.weigh(x.to(torch.promote_types(x.dtype, torch.float32)), mask).to(x.dtype)


class Prototypes(Router):
    r"""Each sample to the expert whose prototype its mean input resembles most (ESM++, Li et al., 2026, arXiv:2606.19164).

    .. math:: w = \operatorname{onehot} \arg\max_t \frac{\langle q, p_t \rangle}{\lVert q \rVert \lVert p_t \rVert}, \qquad
        q = \text{mean of the sample's own tokens}

    Args:
        prototypes: :math:`p_t`, shape (experts, inputs).
    """

    kind = "prototypes"
    one_a_sample = True

    def __init__(self, prototypes: Float[Tensor, "experts inputs"]) -> None:
        super().__init__()
        self.register_buffer("prototypes", prototypes.detach().clone())
        self.options = {}

    def weigh(self, x: Float[Tensor, "batch ... inputs"], mask: Bool[Tensor, "batch tokens"] | None) -> Tensor:
        q = own_mean(x, mask)
        p = F.normalize(self.get_buffer("prototypes").to(q.dtype), dim=-1)
        nearest = (q @ p.T).argmax(-1)  # the length of q changes no order
        return F.one_hot(nearest, len(p)).to(q.dtype)


class Arrow(Router):
    r"""Each token to the experts whose update it excites most (Ostapenko et al., ICML 2024, arXiv:2405.11157); needs no training.

    .. math:: w = \operatorname{softmax}_{\text{top } k} \frac{|v_t^\top x|}{\tau}

    with :math:`v_t` the first right singular vector of the expert's update, so that no sign matters.

    Args:
        prototypes: :math:`v_t`, shape (experts, inputs).
        temperature: :math:`\tau`.
        top_k: how many experts share an input; all of them when omitted.
        per: whether each ``token`` decides, or an ``example`` as a whole by its mean.
    """

    kind = "arrow"

    def __init__(
        self,
        prototypes: Float[Tensor, "experts inputs"],
        temperature: float = 1.0,
        top_k: int | None = 4,
        per: Decider = "token",
    ) -> None:
        super().__init__()
        self.register_buffer("prototypes", prototypes.detach().clone())
        self.options = _checked(len(prototypes), temperature, top_k, per)

    def weigh(self, x: Float[Tensor, "batch ... inputs"], mask: Bool[Tensor, "batch tokens"] | None) -> Tensor:
        x = own_mean(x, mask) if self.options["per"] == "example" else x
        q = (x @ self.get_buffer("prototypes").to(x.dtype).T).abs() / self.options["temperature"]
        return softmax_of_top(q, self.options["top_k"])


class Subspaces(Router):
    r"""Each token to the experts whose leading input directions hold most of it (SMILE, Tang et al., 2024, arXiv:2408.10174).

    .. math:: w = \operatorname{softmax}_{\text{top } k} \lVert V_t^\top x \rVert_2

    Args:
        V: :math:`V_t^\top`, shape (experts, directions, inputs); rows of zeros where an expert has fewer.
        top_k: how many experts share an input; all of them when omitted.
    """

    kind = "subspaces"

    def __init__(self, V: Float[Tensor, "experts directions inputs"], top_k: int | None = 1) -> None:
        super().__init__()
        self.register_buffer("V", V.detach().clone())
        checked = _checked(len(V), 1.0, top_k, "token")
        self.options = {"top_k": checked["top_k"]}

    def weigh(self, x: Float[Tensor, "batch ... inputs"], mask: Bool[Tensor, "batch tokens"] | None) -> Tensor:  # noqa: ARG002
        V = self.get_buffer("V").to(x.dtype)
        held = F.linear(x, V.flatten(0, 1)).view(*x.shape[:-1], *V.shape[:2])
        return softmax_of_top(held.norm(dim=-1), self.options["top_k"])


class LinearRouter(Router):
    r"""A learned linear map of the input; with zeros, where training starts, all experts weigh the same.

    .. math:: w = \operatorname{softmax}_{\text{top } k} \frac{R x + b}{\tau}

    Args:
        R: shape (experts, inputs), trained.
        b: shape (experts,), trained.
        temperature: :math:`\tau`.
        top_k: how many experts share an input; all of them when omitted.
        per: whether each ``token`` decides, or an ``example`` as a whole by its mean.
    """

    kind = "linear"

    def __init__(
        self,
        R: Float[Tensor, "experts inputs"],
        b: Float[Tensor, " experts"],
        temperature: float = 1.0,
        top_k: int | None = None,
        per: Decider = "token",
    ) -> None:
        super().__init__()
        self.R, self.b = (nn.Parameter(t.detach().clone()) for t in (R, b))
        self.options = _checked(len(R), temperature, top_k, per)

    @classmethod
    def zeros(cls, experts: int, inputs: int, **options: Any) -> Self:
        """The router that training starts from."""
        return cls(torch.zeros(experts, inputs), torch.zeros(experts), **options)

    def weigh(self, x: Float[Tensor, "batch ... inputs"], mask: Bool[Tensor, "batch tokens"] | None) -> Tensor:
        x = own_mean(x, mask) if self.options["per"] == "example" else x
        q = F.linear(x, self.R.to(x.dtype), self.b.to(x.dtype)) / self.options["temperature"]
        return softmax_of_top(q, self.options["top_k"])


class Constant(Router):
    """The same weights for every input: experts merged, yet still by name.

    Args:
        coefficients: shape (experts,), trained if anybody trains them.
    """

    kind = "constant"

    def __init__(self, coefficients: Float[Tensor, " experts"]) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(coefficients.detach().clone())
        self.options = {}

    def weigh(self, x: Float[Tensor, "batch ... inputs"], mask: Bool[Tensor, "batch tokens"] | None) -> Tensor:  # noqa: ARG002
        return self.coefficients.to(x.dtype)


KINDS: dict[str, type[Router]] = {r.kind: r for r in (Prototypes, Arrow, Subspaces, LinearRouter, Constant)}


def own_mean(
    x: Float[Tensor, "batch ... inputs"], mask: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch inputs"]:
    """The mean over each sample's own tokens, padding left out.

    Raises:
        InputError: a mask for another number of tokens.
    """
    if x.ndim < 3:
        return x
    tokens = x.flatten(1, -2)
    if mask is None:
        return tokens.mean(1)
    if mask.shape != tokens.shape[:2]:
        raise InputError(
            f"the mask is for {list(mask.shape)} samples and tokens, and a routed layer saw {list(tokens.shape[:2])}"
        )
    kept = mask.to(tokens.dtype)[..., None]
    return (tokens * kept).sum(1) / kept.sum(1).clamp_min(1)


def softmax_of_top(q: Float[Tensor, "... experts"], k: int | None) -> Float[Tensor, "... experts"]:
    """The softmax over the k largest, zero elsewhere; it sums to 1."""
    if k is None or k >= q.shape[-1]:
        return q.softmax(-1)
    top, where = q.topk(k, dim=-1)
    return torch.zeros_like(q).scatter(-1, where, top.softmax(-1))


def _checked(experts: int, temperature: float, top_k: int | None, per: str) -> dict[str, Any]:
    if not temperature > 0:
        raise InputError(f"the temperature of a router is above 0, not {temperature}")
    if top_k is not None and not top_k >= 1:
        raise InputError(f"a router sends an input to at least 1 of {experts} experts, not to {top_k}")
    if per not in ("token", "example"):
        raise InputError(f"a router decides per 'token' or per 'example', not per {per!r}")
    return {"temperature": temperature, "top_k": top_k, "per": per}
