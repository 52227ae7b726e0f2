"""Figures of the reports as SVG text. They are made without pyplot, whose state is global."""

import io
from typing import Any

from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # the browser's own letters: small and selectable
    "svg.hashsalt": "vlm-local",  # the same figure is the same text
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def render_svg(figure: Figure) -> str:
    """An <svg> element to put into a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
