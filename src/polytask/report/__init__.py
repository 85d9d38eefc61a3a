"""What people look at: the HTML report of a run, and its tables for the terminal."""

from polytask.report.explanation import explain
from polytask.report.merges import write_merge_html
from polytask.report.merges_table import merges_table
from polytask.report.page import write_html
from polytask.report.tables import methods_table, verdict_table

__all__ = ["explain", "merges_table", "methods_table", "verdict_table", "write_html", "write_merge_html"]
