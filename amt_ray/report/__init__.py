"""Reads MLflow, compares runs and writes one self-contained page. Knows neither Ray nor torch."""
