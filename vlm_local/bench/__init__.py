"""Measurements. What a command shows of one are lines for people and the fields of a JSON object."""

from typing import Any

Measured = tuple[list[str], dict[str, Any]]
