"""Plots of a category's results, and the report: an HTML page that needs only a browser."""

from anomaly_detection.report.page import facts_script, render
from anomaly_detection.report.trend import DifferentTestImages, Trend, trends

__all__ = ["DifferentTestImages", "Trend", "facts_script", "render", "trends"]
