"""What one training step of a method costs, beside a plain step and beside other libraries."""

from polytask.benchmark.contenders import Contender, Key, ours, read_beside
from polytask.benchmark.steps import bench_steps
from polytask.benchmark.workload import TRUNKS, Workload

__all__ = ["TRUNKS", "Contender", "Key", "Workload", "bench_steps", "ours", "read_beside"]
