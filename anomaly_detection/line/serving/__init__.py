"""Detectors behind HTTP: verdicts on pictures that are sent, their drift and their corrections."""
