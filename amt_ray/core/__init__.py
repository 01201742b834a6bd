"""The science: torch, timm and torchvision only; knows neither Ray, MLflow nor pydantic."""
