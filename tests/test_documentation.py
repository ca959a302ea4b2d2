"""What the documentation says works: its Python runs, its commands exist, its tables are those of the score files."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import DATA, ROOT
from typer.main import get_command

from earthformer_hf.cli import app
from earthformer_hf.data import simulated


sys.path.insert(0, str(ROOT / "docs/hooks"))
from commands import commands  # noqa: E402
from tutorials import page_of_script  # noqa: E402
from zoo import END, START, card_text, model_table, score_tables, with_table  # noqa: E402


PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "conversion/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "model_cards").glob("*/README.md"))
BLOCK = re.compile(r"(?:^<!-- (no-run|needs): (.+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SLOW = ("model_cards/prediff-radar-small/README.md",)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[tuple[str, str, str]]:
    """Marker, its words, and code of the blocks in some languages."""
    found = BLOCK.findall(page.read_text())
    return [(mark, words, code) for mark, words, language, code in found if language in languages]


def with_weights(page: Path) -> bool:
    """Whether a page is no card, or the card of a model whose weights are shipped."""
    return page.parent.parent.name != "model_cards" or any(page.parent.rglob("*.safetensors"))


def runnable() -> list:
    pages = [page for page in PAGES if blocks(page, "python") and with_weights(page)]
    marks = {page: [pytest.mark.slow] if name_of(page) in SLOW else [] for page in pages}
    return [pytest.param(page, id=name_of(page), marks=marks[page]) for page in pages]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder as a reader has it: the shipped models, a file of rain, a folder of files."""
    import xarray as xr

    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    event = simulated.rain_events(1, length=40)[0]
    axes = {"time": event["time"].astype("datetime64[ns]")}
    for name in ("y", "x"):
        axes[name] = (name, 1000.0 * np.arange(384), {"units": "m", "standard_name": f"projection_{name}_coordinate"})
    rain = event["values"].repeat(3, axis=1).repeat(3, axis=2)
    data = xr.DataArray(rain, axes, ("time", "y", "x"), "rain", {"units": "mm/h"})
    (tmp_path / "my_files").mkdir()
    for path in ("radar.nc", "my_files/rain.nc"):
        data.to_netcdf(tmp_path / path)
    monkeypatch.setenv("EARTHFORMER_HF_DATA", str(DATA.resolve()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", runnable())
def test_the_python_of_a_page_runs(page, place):
    names: dict = {"__name__": "page"}
    for mark, words, code in blocks(page, "python"):
        if mark == "needs" and words == "open data":
            if not (DATA / "radar_open_3km.h5").exists():
                pytest.skip("open radar data: set EARTHFORMER_HF_DATA")
        elif mark:
            continue
        exec(compile(code, name_of(page), "exec"), names)


def test_the_blocks_of_the_readme_and_of_the_guides_are_found():
    assert len(blocks(ROOT / "README.md", "python")) == 1 and len(blocks(ROOT / "docs/start.md", "python")) == 2
    assert len(list(command_lines())) > 25


def command_lines():
    """Every `earthformer-hf ...` in a block, with the page where it stands; continued lines are joined."""
    for page in PAGES:
        for _, _, code in blocks(page, "bash", "", "sh"):
            for line in code.replace("\\\n", " ").split("\n"):
                if line.startswith("earthformer-hf "):
                    yield page, shlex.split(line, comments=True)[1:]


def test_the_commands_exist_and_take_their_options():
    root = get_command(app)
    for page, words in command_lines():
        command, name = root, "earthformer-hf"
        while hasattr(command, "commands"):
            assert words and words[0] in command.commands, f"{name_of(page)}: {name} {words[:1]}"
            command, name, words = command.commands[words[0]], f"{name} {words[0]}", words[1:]
        try:
            command.make_context(name, list(words), **root.context_settings)
        except Exception as reason:
            pytest.fail(f"{name_of(page)}: {name} {shlex.join(words)}: {getattr(reason, 'message', reason)}")


def test_a_wrong_option_would_be_noticed():
    command = dict(commands(get_command(app)))["earthformer-hf info"]
    with pytest.raises(Exception, match="(?i)no such option"):
        command.make_context("info", ["model", "--no-such-option"])


def test_scripts_recipes_and_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        text = page.read_text()
        for path in re.findall(r"\b(?:examples|benchmarks|conversion|docs)/[\w./-]+\.(?:py|yaml|md)\b", text):
            assert (ROOT / path).exists(), f"{name_of(page)}: {path}"
        for target in re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE):
            assert target in targets, f"{name_of(page)}: make {target}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    start = (tmp_path / "site/index.html").read_text()
    elsewhere = re.findall(r'(?:src|href)="(?:https?:)?//[^"]*\.(?:js|css|woff2?)"', start)
    assert "from_pretrained" in start and not elsewhere  # what a page needs comes with it


def test_every_page_has_its_place():
    def entries(part):
        for entry in part:
            for value in entry.values() if isinstance(entry, dict) else [entry]:
                yield from entries(value) if isinstance(value, list) else [value]

    named = set(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    pages |= {f"tutorials/{path.stem}.md" for path in (ROOT / "docs/tutorials").glob("*.py")}
    assert pages <= named


def test_the_figures_are_small():
    pictures = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".svg", ".gif", ".jpg")]
    assert pictures and max(path.stat().st_size for path in pictures) < 150_000
    assert sum(path.stat().st_size for path in pictures) < 1_000_000


def test_the_readme_is_short_and_its_table_is_that_of_the_score_files():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 120
    rows = text.split(START)[1].split(END)[0].strip().splitlines()
    made = model_table(ROOT).splitlines()
    assert rows[:2] == made[:2] and len(rows) > 4
    assert set(rows) <= set(made), "python docs/hooks/zoo.py README.md"


def write_card(root: Path, name: str, scores: str | None = None) -> Path:
    folder = root / "model_cards" / name
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n\n# {name}\n\nForecasts [rain](x): more words.\n")
    if scores is not None:
        (folder / "scores.json").write_text(scores)
    return folder


def test_the_zoo_takes_old_new_and_broken_score_files(tmp_path):
    systems = {"model": {"summary": {"mse": 0.25, "csi_m": 0.5}}, "persistence": {"summary": {"csi_m": 0.125}}}
    systems["model, reachable pixels"] = {"summary": {"csi_m": 0.9}}
    write_card(tmp_path, "good", json.dumps({"protocol": {"name": "p"}, "windows": 7, "scores": systems}))
    write_card(tmp_path, "unknown", json.dumps({"scores": {"model": {"summary": {"new_score": 2.5}}}}))
    write_card(tmp_path, "old", json.dumps({"summary": 1}))
    write_card(tmp_path, "broken", "{")
    folder = write_card(tmp_path, "new")
    assert card_text(folder) == ({"license": "mit"}, "Forecasts rain")
    rows = {line.split("]")[0].removeprefix("| ["): line for line in model_table(tmp_path).splitlines()[2:]}
    assert "CSI-M **0.500**; persistence 0.125 | `p` |" in rows["good"] and "0.9" not in rows["good"]
    assert "new_score **2.5**" in rows["unknown"]
    assert all("not yet" in rows[name] for name in ("old", "broken", "new"))
    tables = score_tables(tmp_path)
    assert "7 windows" in tables and "| model | 0.25 | 0.5 |" in tables and "broken" not in tables
    text = f"a\n{START}\nold\n{END}\nb"
    assert with_table(text, "new") == f"a\n{START}\nnew\n{END}\nb"
    with pytest.raises(ValueError, match="once each"):
        with_table("no markers", "new")


def test_a_script_becomes_a_page(tmp_path):
    script = tmp_path / "rain.py"
    script.write_text("# %% [markdown]\n# # Rain\n#\n# Falls.\n\n# %%\nx = 1\n\n\n# %% [markdown]\n# ![x](y.png)\n")
    page = page_of_script(script).split("\n\n")
    assert page[0] == "# Rain" and "(rain.py)" in page[1] and page[2] == "Falls."
    assert page[-2:] == ["```python\nx = 1\n```", "![x](y.png)\n"]


def test_the_citation_names_both_papers_and_the_version():
    from earthformer_hf import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and f"[{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert [paper["url"][-10:] for paper in citation["references"]] == ["2207.05833", "2307.10422"]
