"""Plots of a category's results, and the report: an HTML page that needs only a browser."""

from anomaly_detection.report.advice import advice_lines, next_steps
from anomaly_detection.report.page import facts_script, render
from anomaly_detection.report.trend import DifferentTestImages, Trend, trends

__all__ = [
    "DifferentTestImages",
    "Trend",
    "advice_lines",
    "facts_script",
    "next_steps",
    "render",
    "trends",
]
