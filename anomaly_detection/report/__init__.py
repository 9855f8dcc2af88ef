"""The report: one page of HTML that needs nothing but a browser."""

from anomaly_detection.report.page import render
from anomaly_detection.report.trend import DifferentTestImages, Trend, trends

__all__ = ["DifferentTestImages", "Trend", "render", "trends"]
