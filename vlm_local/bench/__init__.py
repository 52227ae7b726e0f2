"""Measurements. Each gives the lines that its command prints for people, and the fields of its JSON object."""

from typing import Any

Measured = tuple[list[str], dict[str, Any]]
