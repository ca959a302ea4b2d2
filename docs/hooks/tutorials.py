"""Tutorials as pages: a Python script in the percent format (`# %%` code, `# %% [markdown]` text) becomes Markdown."""

import re
from pathlib import Path


CELL = re.compile(r"^# %%(.*)$", re.MULTILINE)


def page_of_script(path: Path) -> str:
    """The page of a tutorial: its text, its code, and where the script is."""
    parts = CELL.split(path.read_text())
    cells = []
    for kind, body in zip(parts[1::2], parts[2::2]):
        body = body.strip("\n")
        if "[markdown]" in kind:
            cells.append("\n".join(re.sub(r"^# ?", "", line) for line in body.split("\n")))
        elif body:
            cells.append(f"```python\n{body}\n```")
    title, _, text = "\n\n".join(cells).partition("\n")
    where = f"*This page is the script [`docs/tutorials/{path.name}`]({path.name}), which the tests run.*"
    return f"{title}\n\n{where}\n{text}\n"


__all__ = ["page_of_script"]
