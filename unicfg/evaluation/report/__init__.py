"""The report of a study: one page with its figures, what they show as tables, and the pictures."""

from unicfg.evaluation.report.page import write_report

__all__ = ["write_report"]
