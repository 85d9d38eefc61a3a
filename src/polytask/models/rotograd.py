"""RotoGrad: gradient homogenization in multitask learning (Javaloy and Valera, ICLR 2022, arXiv:2103.02631)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polytask.errors import InputError
from polytask.models.base import HardSharing
from polytask.registry import register


@register(
    "rotograd",
    family="models",
    paper="arXiv:2103.02631",
    needs="representation gradients",
    aliases=("RotoGrad",),
)
class RotoGrad(HardSharing):
    r"""Let each head read the representation through a rotation of its own, learnt so that the tasks' gradients agree on it.

    Head k reads :math:`r_k = R_k z` and sends back :math:`g_k = R_k^\top \nabla_{r_k} L_k`, a row for each example. Within the ordinary
    backward pass each rotation receives, in place of its task's loss, the gradient of

    .. math:: -\langle \hat v R_k^\top, \nabla_{r_k} L_k \rangle, \qquad \hat v \propto \sum_k g_k / \lVert g_k \rVert, \quad
        \lVert \hat v \rVert = 1, \quad R_k = \exp(A_k - A_k^\top)

    which among rotations is the paper's :math:`\lVert v R_k^\top - \nabla_{r_k} L_k \rVert^2`, at the scale of the other gradients; and the
    trunk receives gradients of one length,

    .. math:: \sum_k \frac{C}{\lVert g_k \rVert}\, g_k, \quad C = \sum_k \alpha_k \lVert g_k \rVert, \quad
        \alpha_k \propto \lVert g_k \rVert / \lVert g_k^0 \rVert ,

    with :math:`g_k^0` those of the first steps. Heads are trained by their losses as ever. Rotations lead a Stackelberg game that the
    network follows: it converges where their learning rate falls faster than the network's, for which ``decay`` is there. ::

        model = RotoGrad(trunk, heads, size=64)
        optimizer = torch.optim.Adam(model.groups(lr=1e-3))
        ...
        polytask.backward(losses, balancer="equal", features=model.features)   # or sum(losses).backward(), or polytask.train
        optimizer.step()

    Any balancing method at representation level sees the gradients turned and scaled. Where gradients are taken loss by loss
    (``level="exact"``, evaluation mode) the tasks never meet in one pass: nothing is scaled then and no rotation learns.

    Args:
        trunk: maps inputs to z.
        heads: {task: module mapping z to (batch, outputs)}.
        size: d, how many features of z, the first ones, are rotated.
        axis: of z that holds the features: 1 in (batch, features, ...), -1 in (batch, tokens, features).
        scale: bring the gradients to one length; without, they are turned only.
        burn_in: backward passes after which :math:`g_k^0` is taken (and until then those of the first pass).

    Raises:
        InputError: fewer than 1 feature to rotate, or more than there are, at the first forward pass.

    Cost: a d x d matrix exponential and its backward a task, a product of (batch, d) and (d, d) a head. As its authors' program has it.
    """

    initial: Tensor
    passes: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        heads: Mapping[str, nn.Module],
        size: int,
        *,
        axis: int = 1,
        scale: bool = True,
        burn_in: int = 20,
    ) -> None:
        super().__init__(trunk, heads)
        if size < 1 or burn_in < 0:
            raise InputError(f"rotograd takes size > 0 and burn_in >= 0, not {size} and {burn_in}")
        self.size, self.axis, self.scale, self.burn_in = size, axis, scale, burn_in
        self.rotations = nn.ParameterList(torch.zeros(size, size) for _ in heads)  # A_k; all heads begin unturned
        self.register_buffer("initial", torch.full((len(heads),), torch.nan))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def rotation(self, name: str) -> Float[Tensor, "size size"]:
        """R of a task, orthogonal, with graph."""
        A = self.rotations[self._names.index(name)]
        R: Tensor = torch.linalg.matrix_exp(A.triu(1) - A.triu(1).T)
        return R

    def forward(self, inputs: Any, tasks: Collection[str] | None = None) -> dict[str, Tensor]:
        names = [n for n in self._names if tasks is None or n in tasks]
        self.features.clear()
        z = self.trunk(inputs)
        if z.shape[self.axis] < self.size:
            raise InputError(f"rotograd turns {self.size} features, the representation has {z.shape[self.axis]}")
        copies = self.fan_out(z, names)
        each = [copies[n].movedim(self.axis, -1) for n in names]
        rotations = [self.rotation(n) for n in names]
        if self.training and torch.is_grad_enabled():
            at = [self._names.index(n) for n in names]
            turned = _Turn.apply(self, at, *each, *rotations)  # type: ignore[no-untyped-call]
        else:
            turned = [_rotate(x, R.detach()) for x, R in zip(each, rotations, strict=True)]
        return {
            n: self.heads[self._names.index(n)](r.movedim(-1, self.axis)) for n, r in zip(names, turned, strict=True)
        }

    def task_parameters(self, name: str) -> Iterator[nn.Parameter]:
        yield from super().task_parameters(name)
        yield self.rotations[self._names.index(name)]

    def groups(self, lr: float, rotation_lr: float | None = None, decay: float = 0.999) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: the network, then the rotations with a learning rate of their own and no weight decay.

        Args:
            lr: of the network.
            rotation_lr: of the rotations at first, a tenth of the network's when omitted.
            decay: what it is multiplied by at every step. ``polytask.train`` does so; in a loop of one's own,
                ``LambdaLR(optimizer, [lambda t: 1.0, lambda t: 0.999**t])``.
        """
        turning = {id(p) for p in self.rotations.parameters()}
        network = [p for p in self.parameters() if id(p) not in turning]
        rate = lr / 10 if rotation_lr is None else rotation_lr
        mine = {"params": list(self.rotations.parameters()), "lr": rate, "weight_decay": 0.0, "decay": decay}
        return [{"params": network, "lr": lr}, mine]

    @torch.no_grad()
    def lengths(self, at: list[int], norms: Float[Tensor, " tasks"]) -> Float[Tensor, " tasks"]:
        """What the gradients of the tasks are to be multiplied by to have one length, given theirs; counts as a pass."""
        first = self.initial[at]
        due = torch.isfinite(norms) & (torch.isnan(first) | (self.passes == self.burn_in))
        renewed = torch.where(due, norms.to(first), first)
        self.initial[at] = renewed
        self.passes += 1
        pace = norms / renewed.to(norms).clamp_min(torch.finfo(norms.dtype).tiny)
        alpha = pace / pace.sum().clamp_min(torch.finfo(norms.dtype).tiny)
        return torch.where(norms > 0, (alpha @ norms) / norms, 0.0)


def _rotate(x: Float[Tensor, "*shape features"], R: Float[Tensor, "size size"]) -> Float[Tensor, "*shape features"]:
    """R x for the first features of every row; the others as they are."""
    d = len(R)
    R = R.to(x.dtype)
    return x @ R.T if x.shape[-1] == d else torch.cat([x[..., :d] @ R.T, x[..., d:]], -1)


class _Turn(torch.autograd.Function):
    """Several rotated views; its backward sees the gradients of all tasks at once."""

    @staticmethod
    def forward(ctx: Any, model: RotoGrad, at: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        K = len(at)
        views, rotations = tensors[:K], tensors[K:]
        ctx.save_for_backward(*rotations)
        ctx.set_materialize_grads(False)
        ctx.model, ctx.at = model, at
        return tuple(_rotate(x, R) for x, R in zip(views, rotations, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rotations, K = ctx.saved_tensors, len(ctx.at)
        present = [k for k in range(K) if gradients[k] is not None]
        g = {k: _rotate(gradients[k], rotations[k].T) for k in present}  # type: ignore[arg-type]
        turning: list[Tensor | None] = [None] * K
        if len(present) > 1:
            norms = torch.stack([torch.linalg.vector_norm(g[k], dtype=rotations[k].dtype) for k in present])
            v = common_direction([g[k] for k in present], norms)
            for k in present:
                turning[k] = rotation_gradient(rotations[k], g[k], v)
            if ctx.model.scale:
                factors = ctx.model.lengths([ctx.at[k] for k in present], norms)
                g = {k: f.to(g[k].dtype) * g[k] for k, f in zip(present, factors, strict=True)}
        return None, None, *(g.get(k) for k in range(K)), *turning


def common_direction(g: Sequence[Float[Tensor, "*shape"]], norms: Float[Tensor, " tasks"]) -> Float[Tensor, "*shape"]:
    """The sum of gradients of several tasks brought to one length, itself of length 1; zeros where they cancel.

    Args:
        g: the gradients of each task.
        norms: their lengths, shape (tasks,).
    """
    v = sum(torch.where(n > 0, x.to(norms) / n, 0.0) for x, n in zip(g, norms, strict=True))
    assert isinstance(v, Tensor)
    length = v.norm()
    return torch.where(length > torch.finfo(v.dtype).eps, v / length, 0.0)


def rotation_gradient(
    R: Float[Tensor, "size size"], g: Float[Tensor, "*shape features"], v: Float[Tensor, "*shape features"]
) -> Float[Tensor, "size size"]:
    r"""The gradient with respect to R of :math:`-\langle v R^\top, g R_0^\top \rangle` at :math:`R = R_0`, v and g held.

    Args:
        R: :math:`R_0`, orthogonal.
        g: a task's gradients at the unturned representation.
        v: where they should point.
    """
    d = len(R)
    return -R @ g[..., :d].reshape(-1, d).to(R.dtype).T @ v[..., :d].reshape(-1, d).to(R.dtype)
