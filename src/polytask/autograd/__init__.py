"""Per-task gradients: Jacobians, Gramians and the gradients at a shared representation."""

from polytask.autograd.coordinates import apart, coordinates, flat, number_type, shaped
from polytask.autograd.directional import directional_derivatives
from polytask.autograd.fan_out import Copies, FanOut, Junction, LinearHeads
from polytask.autograd.gramian import gramian
from polytask.autograd.graph import leaves
from polytask.autograd.jacobian import jacobian
from polytask.autograd.layerwise import LayerwiseGradients, layerwise_gradients, layerwise_gramian
from polytask.autograd.named_losses import Losses, named_losses
from polytask.autograd.partition import Group, Parameters, Shared, partition
from polytask.autograd.probing import probe, shape_key
from polytask.autograd.processes import DisjointGradients, Processes, SlicedGradients
from polytask.autograd.task_gradients import DenseGradients, LinearGradients, TaskGradients
from polytask.autograd.workspace import Workspace

__all__ = [
    "Copies",
    "DenseGradients",
    "DisjointGradients",
    "FanOut",
    "Group",
    "Junction",
    "LayerwiseGradients",
    "LinearGradients",
    "LinearHeads",
    "Losses",
    "Parameters",
    "Processes",
    "Shared",
    "SlicedGradients",
    "TaskGradients",
    "Workspace",
    "apart",
    "coordinates",
    "directional_derivatives",
    "flat",
    "gramian",
    "jacobian",
    "layerwise_gradients",
    "layerwise_gramian",
    "leaves",
    "named_losses",
    "number_type",
    "partition",
    "probe",
    "shape_key",
    "shaped",
]
