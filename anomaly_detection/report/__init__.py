"""Plots of a category's results, and the report: one HTML page that needs only a browser."""

from anomaly_detection.report.page import render
from anomaly_detection.report.trend import DifferentTestImages, Trend, trends

__all__ = ["DifferentTestImages", "Trend", "render", "trends"]
