"""What a method is given by hand, outside a training step: losses, gradients or their Gramian, checked before it learns from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polytask.errors import InputError

# how far entries that rounding alone sets apart may differ, relative to the norms they belong to
ROUNDING = 1e-3


def given_jacobian(jacobian: Any) -> Float[Tensor, "tasks coordinates"]:
    """J as a matrix of real floating-point numbers.

    Raises:
        InputError: no tensor, complex, without tasks, or no matrix.
    """
    J = _real(jacobian, "Jacobian")
    if J.ndim != 2:
        raise InputError(f"a Jacobian has one row a task, not shape {tuple(J.shape)}")
    if not len(J):
        raise InputError("a Jacobian without rows has no task to balance")
    return J


def given_gramian(gramian: Any) -> Float[Tensor, "tasks tasks"]:
    r"""C as a square matrix with :math:`C_{ij} = C_{ji}` and :math:`C_{ij}^2 \le C_{ii} C_{jj}`, as inner products have them.

    Raises:
        InputError: no tensor, complex, without tasks, not square, or what no inner products can be; entries that are not finite pass.
    """
    C = _real(gramian, "Gramian")
    if C.ndim != 2 or C.shape[0] != C.shape[1]:
        raise InputError(f"a Gramian is square, not of shape {tuple(C.shape)}")
    if not len(C):
        raise InputError("a Gramian without rows has no task to balance")
    wide = C.detach().double()
    diagonal = wide.diagonal()
    if bool((diagonal < 0).any()):
        i = int(diagonal.argmin())
        raise InputError(
            f"a Gramian's diagonal holds squared lengths, and entry ({i}, {i}) is {float(diagonal[i]):.4g}"
        )
    kind = torch.finfo(C.dtype)
    length = (diagonal + kind.tiny).sqrt()  # a square that fell to zero may belong to a row whose products did not
    bound = length[:, None] * length
    slack = max(ROUNDING, 8 * kind.eps)
    if bool(((wide - wide.T).abs() > slack * bound).any()):
        i, j = _worst((wide - wide.T).abs() / bound)
        raise InputError(
            f"a Gramian is symmetric, and entries ({i}, {j}) and ({j}, {i}) are {float(wide[i, j]):.4g} and {float(wide[j, i]):.4g}"
        )
    if bool((wide.abs() > (1 + slack) * bound).any()):
        i, j = _worst(wide.abs() / bound)
        raise InputError(
            f"this is no Gramian: no two vectors have the inner product {float(wide[i, j]):.4g} and the squared lengths "
            f"{float(diagonal[i]):.4g} and {float(diagonal[j]):.4g} of rows {i} and {j}"
        )
    return C


def given_losses(losses: Any, names: Sequence[str]) -> Float[Tensor, " tasks"]:
    """The losses of the tasks named, detached.

    Raises:
        InputError: no numbers, another number of them than tasks, or one that is not finite.
    """
    if not isinstance(losses, Tensor):
        try:
            losses = torch.as_tensor(losses)
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"losses= holds one number a task, and was given as {type(losses).__name__}") from None
    values = _real(losses, "vector of losses").detach()
    if values.shape != (len(names),):
        raise InputError(f"losses= holds one number for each of {len(names)} tasks, not shape {tuple(values.shape)}")
    bad = torch.nonzero(~torch.isfinite(values)).flatten().tolist()
    if bad:
        raise InputError(f"the loss of task {names[bad[0]]!r} is {float(values[bad[0]])}")
    return values


def refuse_negative(losses: Mapping[str, float]) -> None:
    """Name a task whose loss has no logarithm; one of 0 counts as the least positive number.

    Raises:
        InputError: where there is one.
    """
    for name, value in losses.items():
        if value < 0:
            raise InputError(
                f"the loss of task {name!r} is {value:.4g}, and log_losses takes logarithms of positive ones"
            )


def refuse_nonfinite(names: Sequence[str], finite: Iterable[bool]) -> None:
    """Name the tasks whose gradients are not finite.

    Raises:
        InputError: where there are some.
    """
    bad = [n for n, ok in zip(names, finite, strict=True) if not ok]
    if bad:
        raise InputError(f"the gradients of {', '.join(bad)} are not finite")


def refuse_preference(preference: Any) -> None:
    """Whether a preference vector holds positive numbers.

    Raises:
        InputError: where it does not.
    """
    try:
        values = np.asarray(
            [*(preference.values() if isinstance(preference, Mapping) else preference)], dtype=np.float64
        )
    except (TypeError, ValueError):
        values = np.zeros(0)
    if values.ndim != 1 or not len(values) or not (np.isfinite(values) & (values > 0)).all():
        raise InputError(f"a preference vector holds one positive number a task, not {preference!r}")


def _real(value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(f"a {what} is a tensor, not of type {type(value).__name__}")
    if value.is_complex():
        raise InputError(f"a {what} is real, not {value.dtype}: torch.view_as_real makes two numbers of one")
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


def _worst(excess: Tensor) -> tuple[int, int]:
    i, j = divmod(int(torch.nan_to_num(excess, nan=-1.0, posinf=-1.0).argmax()), len(excess))
    return i, j
