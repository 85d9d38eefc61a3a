"""Tables: reading files, telling targets apart, splitting rows, encoding features, and the table of the demonstration."""

from polytask.data.demo import DemoTable, demo_table
from polytask.data.encode import TableEncoder, TableInputs
from polytask.data.read import read_table
from polytask.data.split import Split, split_rows
from polytask.data.targets import encode_targets, fit_scales, infer_tasks

__all__ = [
    "DemoTable",
    "Split",
    "TableEncoder",
    "TableInputs",
    "demo_table",
    "encode_targets",
    "fit_scales",
    "infer_tasks",
    "read_table",
    "split_rows",
]
