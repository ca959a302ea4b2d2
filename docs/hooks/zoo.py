"""Tables of the models: from the cards' metadata, the weights' headers and the score files, nothing typed by hand.

python docs/hooks/zoo.py README.md        # writes the table anew between the two markers of a file
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open


START, END = "<!-- models: made by docs/hooks/zoo.py -->", "<!-- end of models -->"

# headline scores, those first that say most of a system -> name and format
SCORES = {
    "fair_crps": ("fair CRPS", "{:.4f}"),
    "c_nino34_m": ("Nino3.4 skill", "{:.3f}"),
    "earthnetscore": ("EarthNetScore", "{:.3f}"),
    "csi_m": ("CSI-M", "{:.3f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "mse": ("MSE", "{:.3g}"),
    "mae": ("MAE", "{:.3g}"),
}


def cards(root: Path) -> list[Path]:
    """The model folders that have a card."""
    return sorted(card.parent for card in (root / "model_cards").glob("*/README.md"))


def card_text(folder: Path) -> tuple[dict[str, Any], str]:
    """The metadata of a card, and what its model does in one sentence."""
    _, header, body = (folder / "README.md").read_text().split("---\n", 2)
    first = next(part for part in body.strip().split("\n\n") if not part.startswith(("#", "!", "<")))
    sentence = re.split(r":\s|\.\s|\.$", " ".join(first.split()), maxsplit=1)[0]
    return yaml.safe_load(header) or {}, re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", sentence)


def parameters(folder: Path) -> dict[str, int]:
    """Numbers in the weights of each part of a model; empty without weights."""
    counts: dict[str, int] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118  no mapping
        part = path.parent.name if path.parent != folder else "model"
        counts[part] = counts.get(part, 0) + sum(_product(shape) for shape in shapes)
    return counts


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def score_file(folder: Path) -> dict[str, Any] | None:
    """A model's score file; None if there is none, or one without summaries."""
    try:
        document = json.loads((folder / "scores.json").read_text())
        summaries = {system: dict(entries["summary"]) for system, entries in document["scores"].items()}
        return document if summaries else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def summaries_of(document: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """System -> headline score -> value; scores of a part of the pixels are left out."""
    scores = document["scores"].items()
    return {system: entries["summary"] for system, entries in scores if "reachable" not in system}


def shown(name: str, value: float | None) -> str:
    return "-" if value is None else SCORES.get(name, ("", "{:.4g}"))[1].format(value)


def first_score(document: dict[str, Any]) -> str:
    """The model's most telling score beside those of the others, in a line."""
    summaries = summaries_of(document)
    system = "model" if "model" in summaries else next(iter(summaries))
    known = [name for name in SCORES if summaries[system].get(name) is not None] or [*summaries[system]]
    if not known:
        return "no score"
    name = known[0]
    others = {other: values.get(name) for other, values in summaries.items() if other != system}
    others = [f"{other} {shown(name, value)}" for other, value in others.items() if value is not None]
    text = f"{SCORES.get(name, (name,))[0]} **{shown(name, summaries[system][name])}**"
    return f"{text}; {', '.join(others)}" if others else text


def model_table(root: Path, link: Callable[[str], str] = "model_cards/{}/README.md".format) -> str:
    """All models: what they forecast, how large they are, what was measured here.

    Args:
        root: of the repository.
        link: from a model's name to where its name leads.
    """
    lines = ["| model | what it does | parameters | measured here | protocol |", "|---|---|---|---|---|"]
    folders = cards(root)
    for folder in sorted(folders, key=lambda each: (not parameters(each), each.name)):  # those with weights first
        _, sentence = card_text(folder)
        size = " + ".join(f"{count:,}" for count in parameters(folder).values()) or "convert the official files"
        document = score_file(folder)
        score, protocol = "not yet; published numbers are in the card", ""
        if document is not None:
            score, protocol = first_score(document), f"`{document.get('protocol', {}).get('name', '')}`"
        lines.append(f"| [{folder.name}]({link(folder.name)}) | {sentence} | {size} | {score} | {protocol} |")
    return "\n".join(lines)


def score_tables(root: Path) -> str:
    """For each model with a score file, all headline scores of all systems."""
    parts = []
    for folder in cards(root):
        document = score_file(folder)
        if document is None:
            continue
        summaries = summaries_of(document)
        names = list(dict.fromkeys(name for values in summaries.values() for name in values))
        protocol = document.get("protocol", {}).get("name", "unknown")
        facts = [f"Protocol `{protocol}`", f"{document.get('windows', '?')} windows"]
        facts += [f"{document.get('independent_events', '?')} independent event(s)"]
        lines = [f"### {folder.name}", "", ", ".join(facts) + ".", ""]
        lines += [f"| system | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for system, values in summaries.items():
            row = " | ".join(f"{values[name]:.4g}" if values.get(name) is not None else "-" for name in names)
            lines.append(f"| {system} | {row} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def with_table(text: str, table: str) -> str:
    """A text with another table between its two markers.

    Raises:
        ValueError: it has no markers.
    """
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"the text must hold {START!r} and {END!r} once each.")
    before, rest = text.split(START)
    return f"{before}{START}\n{table}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    text = file.read_text()
    made = with_table(text, model_table(Path(__file__).resolve().parents[2]))
    if made != text:
        file.write_text(made)

__all__ = [
    "END",
    "START",
    "card_text",
    "cards",
    "model_table",
    "parameters",
    "score_file",
    "score_tables",
    "with_table",
]
