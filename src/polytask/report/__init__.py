"""What people look at: the HTML report of a run, and its tables for the terminal."""

from polytask.report.explanation import explain
from polytask.report.page import write_html
from polytask.report.tables import methods_table, verdict_table

__all__ = ["explain", "methods_table", "verdict_table", "write_html"]
