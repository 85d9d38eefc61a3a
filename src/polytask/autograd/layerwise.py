"""The exact Gramian of parameter gradients, layer by layer, without ever holding the Jacobian.

Plain backward passes come one task after another, so the gradients of one layer for all tasks are together only once the whole K x P
Jacobian is held. Here the graph is walked once with K cotangents side by side: at each parameter all K gradients are at hand at the same
moment, their inner products are added to the Gramian, and they are let go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polytask.autograd.coordinates import flat, shaped
from polytask.autograd.gramian import gramian, products

Lanes = list[Tensor | None]

# how much of |X|^2 |D|^2 must survive in |X'D|^2 for the product form to keep four digits in float32
SURVIVING = 1e-3
# how far a walk may be from the engine, relative to gradients of norm 1
AGREEMENT = 1e-3
# numbers held at once where the weight matrix is smaller: 4 MB in float32
SLICE = 2**20
# a product with a triangular matrix is taken in so many bands
BANDS = 4


class UnsupportedGraphError(RuntimeError):
    """The graph holds a node that cannot be run by itself; take the Jacobian instead."""


@dataclass
class Layer:
    """What tells the gradients of one parameter for the tasks that reach it.

    Attributes:
        parameter: a leaf of the graph.
        present: positions of the tasks.
        D: their gradients, shape (present, ...); for a linear layer's weight the cotangents of its output, (present, examples, outputs).
        X: the linear layer's input, shape (examples, inputs); None for other parameters.
    """

    parameter: Tensor
    present: list[int]
    D: Tensor
    X: Tensor | None = None

    def combination(self, w: Float[Tensor, " tasks"]) -> Tensor:
        """sum_k w_k g_k."""
        mixed = torch.tensordot(w[self.present].to(self.D), self.D, 1)
        gradient: Tensor = mixed if self.X is None else mixed.T @ self.X
        return shaped(flat(gradient), self.parameter)


class LayerwiseGradients:
    """Gradients of several losses as their Gramian and, where that is little to hold, what their combinations are made of.

    Attributes:
        gramian: inner products, shape (tasks, tasks), float64.
    """

    def __init__(self, gramian: Float[Tensor, "tasks tasks"], layers: list[Layer] | None) -> None:
        self.gramian = gramian
        self._layers = layers

    def combination(self, w: Float[Tensor, " tasks"]) -> Iterator[tuple[Tensor, Tensor]] | None:
        """Each parameter that a loss reaches with its sum_k w_k g_k, once, one after another; None where too much would have been held."""
        if self._layers is None:
            return None
        layers, self._layers = self._layers[::-1], None
        return ((layer.parameter, layer.combination(w)) for layer in iter(_popped(layers), None))

    def agrees_with_engine(self, losses: Sequence[Float[Tensor, ""]], parameters: Sequence[Tensor]) -> bool:
        """Whether one backward pass of the engine, for a sum of the losses, finds what was found here.

        The engine calls hooks on tensors of the graph and a walk does not: where hooks change gradients the two differ.

        Cost: one backward pass; what is held stays.
        """
        norms = self.gramian.diagonal().sqrt()
        w = torch.where(norms > 0, 1 / norms, 0.0)
        total = (w.to(losses[0]) * torch.stack(list(losses))).sum()
        found = torch.autograd.grad(total, list(parameters), retain_graph=True, allow_unused=True)
        if self._layers is None:
            square = sum(float(flat(g).double().square().sum()) for g in found if g is not None)
            return abs(square - float(w @ self.gramian @ w)) <= AGREEMENT * len(w) ** 2
        engine = {id(p): g for p, g in zip(parameters, found, strict=True) if g is not None}
        with torch.no_grad():
            return all(
                float((flat(layer.combination(w)) - flat(g)).norm())
                <= AGREEMENT * (float(flat(g).norm()) + 0.1 * len(w))
                for layer in self._layers
                if (g := engine.get(id(layer.parameter))) is not None
            )


def _popped(layers: list[Layer]) -> Callable[[], Layer | None]:
    return lambda: layers.pop() if layers else None


def layerwise_gramian(
    losses: Sequence[Float[Tensor, ""]], parameters: Sequence[Tensor]
) -> Float[Tensor, "tasks tasks"]:
    """The Gramian of :func:`layerwise_gradients` alone."""
    return layerwise_gradients(losses, parameters, 0).gramian


def layerwise_gradients(
    losses: Sequence[Float[Tensor, ""]], parameters: Sequence[Tensor], hold: int
) -> LayerwiseGradients:
    r"""Inner products :math:`C_{kl} = \sum_p \langle \nabla_p L_k, \nabla_p L_l\rangle` of exact parameter gradients.

    Linear layers with input X (examples x in) and cotangents D_k (examples x out) never form their K weight gradients where

    .. math:: \langle X^\top D_k, X^\top D_l\rangle = \langle D_k, (XX^\top) D_l\rangle

    is cheaper and not endangered by cancellation; nor for a combination, which is :math:`(\sum_k w_k D_k)^\top X`.

    Args:
        losses: K scalars with graph; the graph is kept.
        parameters: the tensors differentiated with respect to, leaves of the graph.
        hold: how many numbers may be held for combinations; beyond, they are let go.

    Returns:
        C, shape (K, K), and the means of combinations. Cost: K backward passes (less for linear layers with few examples); memory of K
        cotangents at the widest cut of the graph, of K gradients of one layer, and of what is held.

    Raises:
        UnsupportedGraphError: a node that refuses to run outside the engine; hooks on intermediate tensors are not called.
    """
    walk = _Walk(losses, {id(p) for p in parameters}, hold)
    with torch.no_grad():
        return LayerwiseGradients(walk.run(), walk.held)


def streaming_pays(losses: Sequence[Float[Tensor, ""]], parameters: Sequence[Tensor]) -> bool:
    """Whether most parameters sit in linear layers whose weight gradients need not be formed, at six tenths of the cost or less.

    Args:
        losses: K scalars with graph.
        parameters: the tensors differentiated with respect to.

    Returns:
        A rule of shapes alone: the same model and batch size give the same answer on every machine. Cost: one visit a node.
    """
    sizes = {id(p): p.numel() for p in parameters}
    walk = _Walk(losses, set(sizes), 0)
    covered = 0
    for node, needed in walk.needed.items():
        linear = _Linear.match(node, walk.wanted, walk.readers) if needed else None
        if linear is not None and linear.saves(walk.K):
            covered += linear.X.shape[1] * linear.outputs
    return 2 * covered > sum(sizes.values())


class _Walk:
    def __init__(self, losses: Sequence[Tensor], wanted: set[int], hold: int) -> None:
        self.wanted = wanted
        self.held: list[Layer] | None = [] if hold else None
        self.room = hold
        self.K = len(losses)
        self.C = torch.zeros(self.K, self.K, dtype=torch.float64, device=losses[0].device)
        self.needed: dict[Any, bool] = {}
        self.waiting: dict[Any, int] = {}
        self.lanes: dict[Any, dict[int, Lanes]] = {}
        self.roots: list[Any] = [loss.grad_fn for loss in losses]
        for root in self.roots:
            self._mark(root)
        for node, needed in self.needed.items():
            if needed:
                for child, _ in node.next_functions:
                    if child is not None and self.needed[child]:
                        self.waiting[child] = self.waiting.get(child, 0) + 1
        self.readers = dict(self.waiting)
        for k, (root, loss) in enumerate(zip(self.roots, losses, strict=True)):
            self._slot(root, loss.output_nr)[k] = torch.ones_like(loss)

    def _mark(self, root: Any) -> None:
        """Which nodes lead to a wanted parameter, children before parents."""
        stack = [(root, False)]
        while stack:
            node, expanded = stack.pop()
            if expanded:
                self.needed[node] = id(getattr(node, "variable", None)) in self.wanted or any(
                    self.needed[c] for c, _ in node.next_functions if c is not None
                )
            elif node not in self.needed:
                stack.append((node, True))
                stack.extend((c, False) for c, _ in node.next_functions if c is not None and c not in self.needed)

    def _slot(self, node: Any, output: int) -> Lanes:
        return self.lanes.setdefault(node, {}).setdefault(output, [None] * self.K)

    def run(self) -> Tensor:
        ready = [n for n in dict.fromkeys(self.roots) if self.needed[n] and not self.waiting.get(n)]
        while ready:
            node = ready.pop()
            arrived = self.lanes.pop(node, {})
            if hasattr(node, "variable"):
                if 0 in arrived:
                    self._add(node.variable, arrived[0])
                continue
            linear = _Linear.match(node, self.wanted, self.readers)
            if arrived:
                for place, lanes in (linear or _Any(node)).backward(arrived, self):
                    self._pass_on(node.next_functions[place], lanes)
            finished = linear.consumed if linear else ()
            for child, _ in node.next_functions:
                if child is not None and self.needed[child] and child not in finished:
                    self.waiting[child] -= 1
                    if not self.waiting[child]:
                        ready.append(child)
        return (self.C + self.C.T) / 2

    def _pass_on(self, edge: tuple[Any, int], lanes: Lanes) -> None:
        child, output = edge
        if child is None or not self.needed[child]:
            return
        slot = self._slot(child, output)
        for k, g in enumerate(lanes):
            if g is None:
                continue
            g = _fitted(g, child, output)
            before = slot[k]
            slot[k] = g if before is None else before + g

    def _add(self, parameter: Tensor, lanes: Lanes) -> None:
        """Take the gradients of one parameter into the Gramian."""
        present = [k for k, g in enumerate(lanes) if g is not None]
        if present:
            rows = torch.stack([flat(g) for g in lanes if g is not None])
            self.add(gramian(rows), Layer(parameter, present, rows))

    def add(self, C: Tensor, layer: Layer) -> None:
        """Add the inner products of the tasks present to the Gramian, and hold their gradients while there is room."""
        at = torch.tensor(layer.present)
        self.C[at[:, None], at] += C
        self.room -= layer.D.numel()
        if self.room < 0:
            self.held = None
        elif self.held is not None:
            self.held.append(layer)


def _fitted(g: Tensor, child: Any, output: int) -> Tensor:
    """What the engine does between two nodes: sum over broadcast dimensions, cast to the forward dtype."""
    variable = getattr(child, "variable", None)
    meta = variable if variable is not None else child._input_metadata[output]
    if g.shape != meta.shape:
        g = g.sum_to_size(tuple(meta.shape))
    return g if g.dtype == meta.dtype else g.to(meta.dtype)


class _Any:
    """Any node, run once a task."""

    consumed: tuple[Any, ...] = ()

    def __init__(self, node: Any) -> None:
        self.node = node
        self.call: Callable[..., Any] = node.apply if hasattr(node, "apply") else node

    def backward(self, arrived: dict[int, Lanes], walk: _Walk) -> list[tuple[int, Lanes]]:
        count = max(len(self.node._input_metadata), max(arrived) + 1)
        found: list[tuple[int, Lanes]] = [(i, [None] * walk.K) for i in range(len(self.node.next_functions))]
        for k in range(walk.K):
            gradients = [arrived[i][k] if i in arrived else None for i in range(count)]
            if all(g is None for g in gradients):
                continue
            try:
                outputs = self.call(*gradients)
            except (RuntimeError, TypeError, NotImplementedError) as error:
                raise UnsupportedGraphError(f"{type(self.node).__name__}: {error}") from error
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            for (_, lanes), g in zip(found, outputs, strict=False):
                lanes[k] = g
        return found


class _Linear:
    """x W' + b with leaves W and b: one product for the cotangents of all tasks, no weight gradient kept."""

    def __init__(self, node: Any, bias: bool) -> None:
        self.X: Tensor = node._saved_mat1 if bias else node._saved_self
        self.WT: Tensor | None = node._saved_mat2  # None where the input needs no gradient
        self.outputs: int = node._input_metadata[0].shape[1]
        self.place = 1 if bias else 0
        self.node, self.bias = node, bias
        self.consumed = (node.next_functions[self.place + 1][0],)
        self.weight: Tensor = self.consumed[0].next_functions[0][0].variable

    @classmethod
    def match(cls, node: Any, wanted: set[int], readers: dict[Any, int]) -> _Linear | None:
        name = type(node).__name__
        if name not in ("AddmmBackward0", "MmBackward0"):
            return None
        bias = name == "AddmmBackward0"
        transpose = node.next_functions[2 if bias else 1][0]
        if type(transpose).__name__ != "TBackward0" or readers.get(transpose) != 1:
            return None
        if id(getattr(transpose.next_functions[0][0], "variable", None)) not in wanted:
            return None
        # a weight used twice has one gradient, the sum over its uses: it must meet itself before it is squared
        if readers.get(transpose.next_functions[0][0]) != 1 or (
            bias and (node._saved_alpha != 1 or node._saved_beta != 1)
        ):
            return None
        return cls(node, bias)

    def backward(self, arrived: dict[int, Lanes], walk: _Walk) -> list[tuple[int, Lanes]]:
        present = [k for k, g in enumerate(arrived[0]) if g is not None]
        D = torch.stack([g for g in arrived[0] if g is not None])
        walk.add(self._weight_gramian(D), Layer(self.weight, present, D, self.X))
        found: list[tuple[int, Lanes]] = []
        if self.bias:
            found.append((0, _scatter(present, D.sum(1), walk.K)))
        below = self.node.next_functions[self.place][0]
        if below is not None and walk.needed[below] and self.WT is not None:
            found.append((self.place, _scatter(present, D @ self.WT.T, walk.K)))
        return found

    def direct_cost(self, K: int) -> int:
        """Multiplications to form K weight gradients and their inner products."""
        (N, i), o = self.X.shape, self.outputs
        return K * N * i * o + K * K * i * o

    def product_cost(self, K: int) -> int:
        """Multiplications to get the same inner products from X and the cotangents."""
        (N, i), o = self.X.shape, self.outputs
        return N * N * i + K * N * N * o * (BANDS + 1) // (2 * BANDS) + K * K * N * o

    def saves(self, K: int) -> bool:
        """Whether inner products from X and the cotangents, and one weight gradient for the combination, cost much less than K."""
        one = self.X.numel() * self.outputs
        return 10 * (self.product_cost(K) + one) <= 6 * self.direct_cost(K)

    def _weight_gramian(self, D: Float[Tensor, "tasks examples outputs"]) -> Float[Tensor, "tasks tasks"]:
        K, _, o = D.shape
        i = self.X.shape[1]
        if self.product_cost(K) < self.direct_cost(K):
            flat = D.reshape(K, -1)
            half = products(_upper(self.X @ self.X.T, D).reshape(K, -1), flat)
            C = half + half.T
            bound = SURVIVING * self.X.double().square().sum() * torch.linalg.vector_norm(flat, dim=1).double() ** 2
            if bool((C.diagonal() >= bound).all()):
                return C
        C = torch.zeros(K, K, dtype=torch.float64, device=D.device)
        # all K gradients of a slice of the outputs at a time: never more than one weight matrix in all, unless that is small
        width = max(1, max(o * i, SLICE) // (K * i))
        for start in range(0, o, width):
            piece = D[:, :, start : start + width].transpose(1, 2) @ self.X
            C += gramian(piece.flatten(1))
        return C


def _upper(
    S: Float[Tensor, "examples examples"], D: Float[Tensor, "tasks examples outputs"]
) -> Float[Tensor, "tasks examples outputs"]:
    """U D for S = U + U', U upper triangular: of a symmetric form <D_k, S D_l> one half tells the other."""
    U = S.triu()
    U.diagonal().mul_(0.5)
    result, width = torch.empty_like(D), -(-len(S) // BANDS)
    for start in range(0, len(S), width):
        result[:, start : start + width] = U[start : start + width, start:] @ D[:, start:]
    return result


def _scatter(present: list[int], values: Tensor, K: int) -> Lanes:
    lanes: Lanes = [None] * K
    for k, v in zip(present, values.unbind(), strict=True):
        lanes[k] = v
    return lanes
