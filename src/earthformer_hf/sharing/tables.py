"""Tables of numbers as Markdown, aligned so that they read the same in a terminal and in a card."""

import re
from collections.abc import Mapping
from typing import Any


def text_table(rows: Mapping[str, Mapping[str, Any]], header: str = "system") -> str:
    """Rows of numbers under the names of their columns.

    Args:
        rows: row name -> column name -> number, text, or None. Columns are in the order in which they first appear.
            A column that a row lacks is left blank; None and NaN are "undefined".
        header: of the row names.

    Returns:
        A Markdown table without a line break at its end: integers with commas, other numbers to four digits.

    Example:

    ```python
    >>> print(text_table({"model": {"csi_m": 0.38812, "pixels": 12000}, "persistence": {"csi_m": None}}))
    | system      |     csi_m | pixels |
    |-------------|----------:|-------:|
    | model       |    0.3881 | 12,000 |
    | persistence | undefined |        |

    ```
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[header, *columns]]
    lines += [[name, *(format_number(row.get(column, "")) for column in columns)] for name, row in rows.items()]
    lines = [[re.sub(r"(?<!\\)\|", r"\|", " ".join(cell.split())) for cell in cells] for cells in lines]
    widths = [max(3, *map(len, cells)) for cells in zip(*lines)]

    def joined(first: str, *others: str) -> str:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        return f"| {' | '.join(cells)} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([joined(*lines[0]), f"|{rule}|", *(joined(*line) for line in lines[1:])])


def format_number(value: Any) -> str:
    """An integer with commas, another number to four digits, "undefined" for None and NaN; text as it is."""
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return "undefined"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


__all__ = ["format_number", "text_table"]
