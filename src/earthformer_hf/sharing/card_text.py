"""Reading a card of anybody's: in time and memory that grow with its length, which is bounded."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


MAX_CARD = 1_000_000  # bytes
MAX_METADATA = 100_000  # characters

# Brackets end each attempt, so that a card of nothing but them takes linear time.
PICTURE = re.compile(r"!\[[^\[\]]*\]\(([^()\s]+)\)")
FENCE = re.compile(r" {0,3}(`{3,})(.*)")
HEADING = re.compile(r"#{1,6} ")


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, by which a short text stands for a value of any size."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*), which a card must not have")
        return super().compose_node(parent, index)


def read_card(path: Path) -> str:
    """The text of a card.

    Raises:
        ValueError: more than `MAX_CARD` bytes, or no UTF-8.
    """
    if path.stat().st_size > MAX_CARD:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a card may have {MAX_CARD:,}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as reason:
        raise ValueError(f"{path}: it is no UTF-8: {reason}") from reason


def card_metadata(text: str) -> tuple[dict[str, Any] | None, str]:
    """The metadata at the top of a card, or None if it has none, and the text below them.

    Raises:
        ValueError: no YAML, an alias, values nested too deeply, or more than `MAX_METADATA` characters.
    """
    text = text.replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return None, text
    end = text.find("\n---\n", 3)
    if end < 0:
        return None, text
    header, body = text[4 : max(end, 4)], text[end + 5 :]
    if len(header) > MAX_METADATA:
        raise ValueError(f"its metadata have {len(header):,} characters, and may have {MAX_METADATA:,}")
    try:
        data = yaml.load(header, _PlainLoader)  # noqa: S506 # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as reason:
        raise ValueError(f"its metadata are no YAML: {' '.join(str(reason).split())[:300]}") from reason
    return (data if isinstance(data, dict) else None), body


def shown_pictures(text: str) -> list[str]:
    """The pictures that a card shows, but for those of other sites."""
    return [name for name in PICTURE.findall(text) if "://" not in name]


def sections(text: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Title, lines of text, and lines of code of each section of a card. Code is what lies between two fences."""
    title, lines, code = "the beginning", list[str](), list[str]()
    fence, fenced = "", list[str]()  # that is open, and the lines since
    for line in text.splitlines():
        found = FENCE.match(line)
        if fence:
            if found and found[1].startswith(fence) and not found[2].strip():
                code += fenced
                fence, fenced = "", []
            else:
                fenced.append(line)
        elif found:
            fence = found[1]
        elif HEADING.match(line):
            yield title, lines, code
            title, lines, code = line.lstrip("# "), [], []
        else:
            lines.append(line)
    yield title, lines + fenced, code


def tables(lines: list[str]) -> Iterator[list[str]]:
    """The Markdown tables in lines of text: lines with a |, the second of them of dashes."""
    table: list[str] = []
    for line in [*lines, ""]:
        if "|" in line:
            table.append(line)
            continue
        for start in range(len(table) - 1):  # text with a | may stand above the head of a table
            if "-" in table[start + 1] and not table[start + 1].strip("-:| \t"):
                yield table[start:]
                break
        table = []


__all__ = ["card_metadata", "read_card", "sections", "shown_pictures", "tables"]
