"""The tutorials run from beginning to end and arrive where they say: in a figure, and in numbers with a meaning."""

import os
import re
import subprocess
import sys

import pytest
from tiny import ROOT


# tutorial -> its figures
FIGURES = {
    "nowcast": ["nowcast"],
    "fine_tune": ["fine_tune"],
    "ensemble": ["ensemble", "ranks"],
    "el_nino": ["el_nino"],
}
pytestmark = pytest.mark.slow


def run(name: str, place) -> str:
    """What a tutorial prints, run in a folder that holds the shipped models."""
    (place / "model_cards").symlink_to(ROOT / "model_cards")
    data = os.environ.get("EARTHFORMER_HF_DATA", str(ROOT.parent / "shared/data"))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "EARTHFORMER_HF_DATA": data}
    script = ROOT / "docs/tutorials" / f"{name}.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd=place)
    assert result.returncode == 0, result.stderr
    for figure in FIGURES[name]:
        path = place / f"outputs/tutorial_{figure}.png"
        assert path.read_bytes().startswith(b"\x89PNG") and 5_000 < path.stat().st_size < 150_000
        assert (ROOT / f"docs/tutorials/images/{figure}.png").exists()
    return result.stdout


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, text
    return [float(value) for value in found.groups()]


def test_every_tutorial_is_run():
    assert {path.stem for path in (ROOT / "docs/tutorials").glob("*.py")} == set(FIGURES)


def test_nowcast_your_own_netcdf(tmp_path):
    output = run("nowcast", tmp_path)
    model, persistence = numbers(r"error: model ([\d.]+) mm/h, persistence ([\d.]+)", output)
    assert model < persistence
    assert "coarsen_to='3 km'" in output.splitlines()[0]  # the refusal names what would work


def test_fine_tune_on_a_new_radar(tmp_path):
    output = run("fine_tune", tmp_path)
    (before,) = numbers(r"model before ([\d.]+)", output)
    (after,) = numbers(r"model after ([\d.]+)", output)
    assert after < before
    assert (tmp_path / "outputs/my-radar/model.safetensors").exists()


def test_an_ensemble_its_calibration_and_knowledge_alignment(tmp_path):
    output = run("ensemble", tmp_path)
    crps, ratio = numbers(r"fair CRPS ([\d.]+), spread-skill ratio ([\d.]+)", output)
    assert 0 < crps < 0.05 and 0.2 < ratio < 1.5
    asked_less, less = numbers(r"-2 sigma: mean intensity asked ([\d.]+), got ([\d.]+)", output)
    asked_more, more = numbers(r"\+2 sigma: mean intensity asked ([\d.]+), got ([\d.]+)", output)
    assert less < more and abs(more - asked_more) < 0.5 * (asked_more - asked_less)


def test_el_nino_with_a_plume(tmp_path):
    output = run("el_nino", tmp_path)
    hindcasts, skill, persistence = numbers(r"(\d+) hindcasts: skill (-?[\d.]+), persistence (-?[\d.]+)", output)
    assert hindcasts > 40 and -1 <= skill <= 1
    if "simulated" not in output:
        assert skill > 0.5 > persistence
