"""Fenced blocks of a Markdown page, with the marker that stands before them.

A block is run by a test when the line before it is ``<!-- test -->`` (shell) or, in ``docs/client.md``, unless it is
``<!-- no test: why -->`` (Python). ``<!-- test: cluster -->`` says that the page starts agents, and
``<!-- test: file=NAME -->`` that the block is the text of a file that a later block uses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(
    r"^(?:<!-- (?P<marker>(?:no )?test(?:: ?(?P<options>[^>]*?))?) -->\n+)?"
    r"^```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block; ``line`` is that of its first line of text, from 1."""

    page: Path
    line: int
    language: str
    text: str
    marker: str
    options: dict[str, str]

    @property
    def tested(self) -> bool:
        return self.marker.startswith("test")

    def commands(self) -> str:
        """The block as a script: of a ``console`` block the lines after ``$``, without what they print."""
        if self.language != "console":
            return self.text
        lines, open_line = [], False
        for line in self.text.splitlines():
            if line.startswith("$ ") or open_line:
                lines.append(line.removeprefix("$ ").removeprefix("> "))
                open_line = line.endswith("\\")
        return "\n".join(lines) + "\n"


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        pairs = [option.strip().partition("=") for option in (match["options"] or "").split(",") if option.strip()]
        found.append(
            Block(
                page=page,
                line=text.count("\n", 0, match.start("text")) + 1,
                language=match["language"],
                text=match["text"],
                marker=match["marker"] or "",
                options={name: value for name, _, value in pairs},
            )
        )
    return found
