"""What every part of the configuration is, and how it says what is wrong."""

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A configuration that breaks a rule; the message is one line for the user."""


class InfeasiblePointError(ConfigError):
    """A point of a search whose values are sound, but not together."""


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
