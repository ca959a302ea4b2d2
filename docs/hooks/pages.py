"""What is made while the documentation is built (a hook of mkdocs).

Cards, CONTRIBUTING.md and other files of the repository become pages where they are; tutorials are turned from scripts
into pages; the tables of models, scores, protocols and commands come from the things themselves. A link to any other
file of the repository takes that file into the site, so that every link can be checked without a network.
"""

import posixpath
import re
from pathlib import Path

from commands import command_page
from mkdocs.structure.files import File
from protocols import protocol_table
from tutorials import page_of_script
from zoo import cards, model_table, score_tables


DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^ *```")

# page -> the file of the repository that it shows
ORIGINS = {
    "benchmarks.md": ROOT / "benchmarks/README.md",
    "changelog.md": ROOT / "CHANGELOG.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "security.md": ROOT / "SECURITY.md",
    "guides/convert.md": ROOT / "conversion/README.md",
}
ORIGINS |= {f"zoo/{folder.name}.md": folder / "README.md" for folder in cards(ROOT)}
PLACES = {path: page for page, path in ORIGINS.items()} | {ROOT / "README.md": "index.md"}

# marker of a page -> what takes its place
MADE = {
    "<!-- table of models -->": lambda: model_table(ROOT, lambda name: f"zoo/{name}.md"),
    "<!-- tables of scores -->": lambda: score_tables(ROOT),
    "<!-- table of protocols -->": protocol_table,
    "<!-- the command -->": command_page,
}


def on_files(files, config):
    """Add the pages that are files elsewhere, and those of the tutorials."""
    for page, path in ORIGINS.items():
        text = re.sub(r"\A---\n.*?\n---\n", "", path.read_text(), flags=re.DOTALL)  # the metadata of a card
        files.append(File.generated(config, page, content=text))
    for script in sorted((DOCS / "tutorials").glob("*.py")):
        files.append(File.generated(config, f"tutorials/{script.stem}.md", content=page_of_script(script)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fill in what is made, and let links to files of the repository lead to their place in the site."""
    for marker, made in MADE.items():
        if marker in markdown:
            markdown = markdown.replace(marker, made())
    here = page.file.src_uri
    origin = ORIGINS.get(here, DOCS / here)

    def linked(match: re.Match) -> str:
        before, target, after = match.groups()
        path = (origin.parent / target).resolve()
        if re.match(r"[a-z]+:", target) or not path.is_relative_to(ROOT) or not path.exists():
            return match[0]  # elsewhere, or missing, of which mkdocs warns
        if path in PLACES:
            uri = PLACES[path]
        elif path.is_relative_to(DOCS):
            uri = path.relative_to(DOCS).as_posix()
        elif path.is_dir():
            return match[0]
        else:
            uri = f"repository/{path.relative_to(ROOT).as_posix()}"
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
        return before + posixpath.relpath(uri, posixpath.dirname(here) or ".") + after

    lines, in_code = [], False
    for line in markdown.split("\n"):
        if FENCE.match(line):
            in_code = not in_code
        lines.append(line if in_code else LINK.sub(linked, line))
    return "\n".join(lines)
