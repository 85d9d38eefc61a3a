"""What learning several tasks together is judged by: gains over single-task references, ranks, and their intervals."""

from polytask.metrics.bootstrap import Interval, affordable_replicates, draw_seeds, interval, over_seeds
from polytask.metrics.delta_m import DeltaM, delta_m, mean_over_metrics, mean_over_tasks, relative_gain
from polytask.metrics.normalised import normalised_score
from polytask.metrics.ranks import mean_rank, ranks
from polytask.metrics.replicates import draw_counts, replicates
from polytask.metrics.simultaneous import simultaneous_intervals

__all__ = [
    "DeltaM",
    "Interval",
    "affordable_replicates",
    "delta_m",
    "draw_counts",
    "draw_seeds",
    "interval",
    "mean_over_metrics",
    "mean_over_tasks",
    "mean_rank",
    "normalised_score",
    "over_seeds",
    "ranks",
    "relative_gain",
    "replicates",
    "simultaneous_intervals",
]
