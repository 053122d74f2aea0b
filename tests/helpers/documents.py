"""Code blocks, inline code and tables of the documents: README.md and docs/."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from checkout import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclasses.dataclass(frozen=True)
class Block:
    """A code block.

    Args:
        language: the first word of the fence.
        text: the code, without indentation that all of its lines share with the fence.
        line: where the code begins in its document, from 1.
        not_run: why it cannot run in a test, as readers see it in the block's title; empty if it can.
        slow: whether it takes so long that only the slow tests run it.
        hidden: the setup of a page's examples, in a comment that readers do not see.
    """

    language: str
    text: str
    line: int
    not_run: str = ""
    slow: bool = False
    hidden: bool = False


_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?P<attributes>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)
_SETUP = re.compile(r"^<!-- setup of the examples\n(?P<text>.*?)-->$", re.M | re.S)


def blocks(document: Path) -> list[Block]:
    """All code blocks of a document in order, the setup of its examples included."""
    text = document.read_text()
    found = []
    for match in _FENCE.finditer(text):
        reason = re.search(r'title="not run: ([^"]+)"', match["attributes"])
        before = text[: match.start()].rstrip().rsplit("\n", 1)[-1]
        code = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.M)
        line = text.count("\n", 0, match.start()) + 2
        slow = before.strip() == "<!-- slow -->"
        found.append(Block(match["language"], code, line, reason[1] if reason else "", slow))
    for match in _SETUP.finditer(text):
        found.append(Block("python", match["text"], text.count("\n", 0, match.start()) + 2, hidden=True))
    return sorted(found, key=lambda block: block.line)


def commands(document: Path) -> list[str]:
    """Every command of a document, one a line: those of its shell blocks and those in inline code."""
    found = []
    for block in blocks(document):
        if block.language == "sh":
            joined = block.text.replace("\\\n", " ")
            found += [line.split(" #")[0].strip() for line in joined.splitlines()]
    starts = ("make ", "int8compile ", "python -m ", "python tests/", "INT8COMPILE_")
    found += [code for code in inline_code(document) if code.startswith(starts) and " " in code]
    return [command for command in found if command and not command.startswith("#")]


def inline_code(document: Path) -> list[str]:
    """What stands between single backticks, on one line or over two, outside of code blocks and comments."""
    text = re.sub(r"<!--.*?-->", "", _FENCE.sub("", document.read_text()), flags=re.S)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def first_column(document: Path) -> set[str]:
    """The names in code in the first column of a document's tables."""
    rows = re.findall(r"^\| ([^|]+) \|", document.read_text(), flags=re.M)
    return {name for cell in rows for name in re.findall(r"`([^`]+)`", cell)}
