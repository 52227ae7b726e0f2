"""Reads the project's documents: fenced blocks, the commands in them, and what is said of running them.

A block whose commands a test cannot run stands below an HTML comment with the reason:
`<!-- not run: REASON -->` for programs of others, `<!-- only parsed: REASON -->` for our own that take too long.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = [".venv/bin/python", "-m", "vlm_local"]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "deploy/*.md", "checkpoints/*.md", "checkpoints/tiny/*.md")
    for path in ROOT.glob(pattern)
)
_BLOCK = re.compile(r"(?:<!-- (not run|only parsed): ([^\n]+?) -->\n+)?^```(\w*)\n(.*?)^```$", re.S | re.M)
_INLINE = re.compile(r"`(\.venv/bin/python -m vlm_local [^`]+)`")


@dataclass(frozen=True)
class Block:
    """kept: "" for a block that is run, "not run" or "only parsed"."""

    document: Path
    line: int
    language: str
    text: str
    kept: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    def list_commands(self) -> list[list[str]]:
        """Words of each command of a bash block, without settings of variables before it."""
        commands = []
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                command, words = words[:end], words[end + 1 :]
                commands.append(list(dropwhile(lambda word: re.match(r"[A-Z_]+=", word), command)))
        return commands


def list_blocks(document: Path) -> list[Block]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [
        Block(document, text.count("\n", 0, match.start(3)) + 1, match[3], match[4], match[1] or "")
        for match in _BLOCK.finditer(text)
    ]


def list_inline_commands(document: Path) -> Iterator[list[str]]:
    """Words of the commands of ours that stand in backticks within a sentence."""
    text = _BLOCK.sub("", (ROOT / document).read_text(encoding="utf-8"))
    for match in _INLINE.finditer(text):
        yield shlex.split(" ".join(match[1].split()))
