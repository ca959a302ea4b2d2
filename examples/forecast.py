"""Forecast rain, an ensemble of it, and El Nino with the shipped models: each script that suits the input, one by one.

    python examples/forecast.py                        # all of them, on open data or simulated weather
    python examples/forecast.py --input mine.nc        # an ensemble of its rain, or its ocean's coming months

The other scripts of this folder have options of their own; forecasts and figures go to outputs/. Rain of your own is
forecast by the command `earthformer-hf forecast`, on its own grid. Arrays (.npy) are taken for mm/h every 2 minutes at
3 km, which the command takes as options.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from earthformer_hf.data.inputs import holds_ocean, is_open_radar
from earthformer_hf.errors import DEBUG, ends_in_one_line


DEBUGGING = [DEBUG] if DEBUG in sys.argv else []
HERE = Path(__file__).parent
RAIN, OCEAN = ("forecast_radar", "forecast_prediff", "guided_forecast"), ("forecast_enso",)
OF_ANY_GRID = (
    "--model=model_cards/prediff-radar-small --out=outputs/forecast.nc --overwrite --plot=outputs/forecast.png "
    "--mean --threshold=10 --coarsen-to=3km --resample-time=10m"
).split()
OF_ARRAYS = "--units=mm/h --time-step=2m --grid-spacing=3km".split()


@ends_in_one_line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="rain (.npy, .npz, .h5, .nc and others) or ocean (.nc)")
    arguments = parser.parse_args()
    path = arguments.input
    is_ocean = path is not None and holds_ocean(path)
    if path is not None and path.suffix != ".npz" and not is_ocean and not is_open_radar(path):
        Path("outputs").mkdir(exist_ok=True)
        about = OF_ARRAYS if path.suffix == ".npy" else []
        command = ["-m", "earthformer_hf.cli", "forecast", str(path), *OF_ANY_GRID, *about]
        sys.exit(subprocess.run([sys.executable, *command, *DEBUGGING]).returncode)
    scripts, options = RAIN + OCEAN, []
    if path is not None:
        scripts, options = OCEAN if is_ocean else RAIN, ["--input", str(path)]
    for script in scripts:
        code = subprocess.run([sys.executable, str(HERE / f"{script}.py"), *options, *DEBUGGING]).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
