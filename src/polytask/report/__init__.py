"""What people look at: the HTML report of a run, and its tables for the terminal."""

from polytask.report.contest import contest_table, write_contest_html
from polytask.report.costs import steps_markdown, steps_table
from polytask.report.explanation import explain
from polytask.report.merges import write_merge_html
from polytask.report.merges_table import merges_table
from polytask.report.page import write_html
from polytask.report.tables import methods_table, verdict_table

__all__ = [
    "contest_table",
    "explain",
    "merges_table",
    "methods_table",
    "steps_markdown",
    "steps_table",
    "verdict_table",
    "write_contest_html",
    "write_html",
    "write_merge_html",
]
