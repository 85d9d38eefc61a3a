"""The losses of several tasks, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from polytask.errors import InputError

Losses = Mapping[str, Tensor] | Sequence[Tensor] | Tensor


def named_losses(losses: Losses) -> dict[str, Tensor]:
    """Losses by name, each a scalar.

    Raises:
        InputError: anything else than scalars with graph, each given once.
    """
    if isinstance(losses, Mapping):
        named = dict(losses)
    elif isinstance(losses, Tensor) and losses.ndim != 1:
        raise InputError(
            f"a tensor of losses has shape (tasks,), not {tuple(losses.shape)}; name the losses in a dict or give a list"
        )
    elif isinstance(losses, str) or not isinstance(losses, Iterable):
        raise InputError(f"losses are given in a dict, a sequence or a tensor, not as {type(losses).__name__}")
    else:
        named = {str(i): loss for i, loss in enumerate(losses)}
    if not named:
        raise InputError("there is no loss to differentiate")
    seen: dict[int, str] = {}
    for name, loss in named.items():
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"the loss of task {name!r} must be a scalar tensor, not {what}")
        if loss.is_complex():
            raise InputError(f"the loss of task {name!r} is complex, and only real numbers can be made small")
        if not loss.requires_grad:
            raise InputError(
                f"the loss of task {name!r} has no graph: no parameter that requires gradients leads to it"
            )
        if id(loss) in seen:
            raise InputError(f"the same loss was given for the tasks {seen[id(loss)]!r} and {name!r}")
        seen[id(loss)] = name
    return {n: loss if loss.ndim == 0 else loss.reshape(()) for n, loss in named.items()}
