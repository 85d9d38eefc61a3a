"""The k-th largest magnitude among many numbers, exactly, without sorting or copying them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polytask.merging.base import pieces
from polytask.merging.matching import dtype_name, torch_dtype

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

PIECE = 1 << 19
FEW = 1 << 16
DIGIT = 16
WORDS = {"float32": ("int32", 0x7FFFFFFF), "float64": ("int64", 0x7FFFFFFFFFFFFFFF)}


class Census:
    """Finds the k-th largest magnitude of numbers that arrive in pieces, in a few rounds over all of them.

    The bit patterns of non-negative floating-point numbers are ordered as the numbers are: each round counts one 16-bit digit, the
    highest first, of those numbers that share the digits found so far. Two rounds for float32, four for float64; 512 KB of memory.

    Args:
        dtype: float32 or float64.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        word, self.mask = WORDS[dtype_name(dtype)]
        self.word = torch_dtype(word)
        self.shift = 8 * dtype.itemsize - DIGIT
        self.prefix = 0
        self.started = False
        self.counts = torch.zeros(1 << DIGIT, dtype=torch.int64)

    @property
    def done(self) -> bool:
        """Whether every digit is known."""
        return self.shift < 0

    @property
    def total(self) -> int:
        """How many numbers this round has counted."""
        return int(self.counts.sum())

    def see(self, x: Float[Tensor, "..."]) -> None:
        """Count some numbers; each round must be shown all of them."""
        for piece in pieces(x, PIECE):
            bits = piece.view(self.word) & self.mask
            if self.started:
                bits = bits[(bits >> (self.shift + DIGIT)) == self.prefix]
            self.counts += torch.bincount((bits >> self.shift) & ((1 << DIGIT) - 1), minlength=1 << DIGIT)

    def end_round(self, k: int) -> int:
        """Fix one more digit of the k-th largest; returns the k that the next round looks for."""
        above = self.counts.flip(0).cumsum(0)
        position = int(torch.searchsorted(above, k))
        digit = (1 << DIGIT) - 1 - position
        rest = k - (int(above[position - 1]) if position else 0)
        self.prefix, self.started = (self.prefix << DIGIT) | digit, True
        self.shift -= DIGIT
        self.counts.zero_()
        return rest

    @property
    def value(self) -> float:
        """The k-th largest magnitude, once :attr:`done`."""
        return float(torch.tensor(self.prefix, dtype=self.word).view(self.dtype))


def kth_largest_magnitude(x: Float[Tensor, "..."], k: int) -> float:
    """The k-th largest of \\|x\\|, k from 1 to the number of elements.

    Cost: two passes of counting (float32), scratch memory independent of the size of x.
    """
    if x.numel() <= FEW:
        return float(x.reshape(-1).abs().kthvalue(x.numel() - k + 1).values)
    census = Census(x.dtype)
    while not census.done:
        census.see(x)
        k = census.end_round(k)
    return census.value
