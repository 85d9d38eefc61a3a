"""What surrounds a run: random generators, deterministic algorithms, Ctrl-C, devices and processes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from polytask.errors import InputError
from polytask.training.checkpoint import generator_states, restore_generators
from polytask.training.config import TrainConfig
from polytask.training.data import TaskData, TrainingData

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextlib.contextmanager
def own_generators(seed: int) -> Iterator[None]:
    """Random numbers and algorithms that depend on the seed alone; the caller's generators stay as they were."""
    from accelerate.utils import set_seed
    from torch.utils import deterministic

    settings: Any = deterministic
    before, fill = generator_states(), settings.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    # unlike use_deterministic_algorithms this does not import the compiler, which takes seconds
    torch.set_deterministic_debug_mode("warn")
    settings.fill_uninitialized_memory = False  # costs time and changes no result
    set_seed(seed)
    try:
        yield
    finally:
        restore_generators(before)
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill


class Interruption:
    """Turns the first Ctrl-C into a flag that is read between steps; the second one interrupts at once.

    Attributes:
        asked: whether Ctrl-C came.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # python hands signals to no other
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def accelerator_for(config: TrainConfig) -> Accelerator:
    """Devices, precision and processes as ``accelerate launch`` and the settings have them.

    Raises:
        InputError: a device or a precision that this machine does not have.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not has.get(config.device, True):
        raise InputError(f"device {config.device!r} was asked for, and there is none")
    if config.precision == "fp16" and (config.device == "cpu" or not has["cuda"]):
        raise InputError("precision 'fp16' needs a GPU: take 'bf16' on this device")
    # one process may train several times, with another precision or device each time
    AcceleratorState._reset_state(
        reset_partial_state=torch.cuda.is_available() and not torch.distributed.is_initialized()
    )
    # a task may be absent from a process's batch, and its head then gets no gradient there
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(mixed_precision=config.precision, cpu=config.device == "cpu", kwargs_handlers=[unused])


def placed(data: TrainingData, accelerator: Accelerator) -> TrainingData:
    """Rows in memory on the device; of a loader, under several processes, this process's share."""
    if isinstance(data, TaskData):
        return data.to(accelerator.device)
    if accelerator.num_processes > 1 and isinstance(data, torch.utils.data.DataLoader):
        sharded: TrainingData = accelerator.prepare_data_loader(data)
        return sharded
    return data
