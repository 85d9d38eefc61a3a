"""Per-task gradients: Jacobians, Gramians and the gradients at a shared representation."""

from polytask.autograd.fan_out import FanOut
from polytask.autograd.gramian import gramian
from polytask.autograd.graph import leaves
from polytask.autograd.jacobian import jacobian

__all__ = ["FanOut", "gramian", "jacobian", "leaves"]
