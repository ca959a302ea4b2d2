"""What is imported when: seconds that a user waits before anything happens."""

import json
import subprocess
import sys

import pytest
from tiny import ROOT

import earthformer_hf


HEAVY = ["diffusers", "datasets", "pandas", "h5py", "xarray", "matplotlib", "distributed", "fastapi", "pysteps"]
LOADED = "import json, sys; print(json.dumps([name for name in {names} if name in sys.modules]))"


def loaded(code: str, names: list[str]) -> list[str]:
    command = [sys.executable, "-c", f"{code}\n{LOADED.format(names=names)}"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def test_the_package_loads_nothing_but_the_classes_that_are_registered():
    assert loaded("import earthformer_hf", ["torch", *HEAVY]) == ["torch"]


@pytest.mark.parametrize("words", [["--help"], ["forecast", "--help"], ["data", "info", "--help"]])
def test_help_loads_no_library(words):
    code = (
        f"import sys; sys.argv = ['/bin/earthformer-hf', *{words}]\n"
        "from earthformer_hf.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    )
    assert loaded(code, ["torch", "transformers", "numpy", *HEAVY]) == []


def test_each_name_is_there():
    for name in earthformer_hf.__all__:
        assert getattr(earthformer_hf, name) is not None and name in dir(earthformer_hf)
    with pytest.raises(AttributeError, match="has no attribute 'Earthfomer'"):
        earthformer_hf.Earthfomer  # noqa: B018
