"""Folders and hub repositories: complete or absent, the same bytes each time, loadable with this package and without.

The round trips run in two client processes (`hub_client.py`) against a hub in memory (`local_hub.py`).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_client import GROUPS
from local_hub import LocalHub


def client(hub: LocalHub, work: Path, group: str) -> dict[str, str]:
    environment = hub.environment(work / f"home-{group}")
    script = Path(__file__).with_name("hub_client.py")
    result = subprocess.run(
        [sys.executable, script, group, work], env=environment, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr
    return json.loads((work / f"{group}.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    work = tmp_path_factory.mktemp("hub")
    with LocalHub() as hub:
        return client(hub, work, "with_package") | client(hub, work, "without_package")


@pytest.mark.parametrize("check", [f.__name__ for group in GROUPS.values() for f in group])
def test_round_trip(results, check):
    assert results[check] == "passed", results[check]
