"""What is common to methods that keep experts in one model and send inputs to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor, nn

    from polytask.registry import Method


class Routing(ABC):
    """A way of adding low-rank experts and their routers to a model.

    Attributes:
        statistic: which statistic of each expert it needs, if any.
        static: the merger of the model that experts are added to, unless another one is.
        static_options: that merger's.
    """

    method: ClassVar[Method]
    statistic: ClassVar[str | None]
    static: ClassVar[str]
    static_options: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def route(
        self,
        model: nn.Module,
        experts: Mapping[str, Mapping[str, Tensor]],
        statistics: Sequence[Mapping[str, Tensor]],
    ) -> nn.Module:
        """Add experts to a model in place, and return it."""
