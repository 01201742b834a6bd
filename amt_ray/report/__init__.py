"""Reads MLflow, compares runs and writes one self-contained page. Knows neither Ray nor torch."""

import amt_ray.address  # noqa: F401  (MLflow's settings, before MLflow is imported)
