"""Words of others in a Markdown table."""

import re
from typing import Any

from vlm_local.errors import DataError
from vlm_local.plain import hide_secrets

_NAME = re.compile(r"[\w .,/:+%()=~@-]{1,120}")


def check_name(name: Any) -> str:
    """A name that others gave, to be shown. An address is shown as code, so that nobody is led to it."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DataError(
            f"{name!r:.200} is no name for a row: expected at most 120 letters, digits, spaces and any of "
            ". , / : + % ( ) = ~ @ - _"
        )
    return f"`{hide_secrets(name)}`" if "//" in name or "www." in name or "@" in name else name


def escape_cell(cell: str) -> str:
    """Words that cannot end a cell or become markup; what is in backticks is code already."""
    marks = r"([|\\])" if cell.startswith("`") else r"([|\\*_<>\[\]`!&~])"
    return re.sub(marks, r"\\\1", cell)
