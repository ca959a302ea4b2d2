"""Forecast rain, an ensemble of it, and El Nino with the shipped models: each script that suits the input, one by one.

    python examples/forecast.py                        # all of them, on open data or simulated weather
    python examples/forecast.py --input mine.nc        # the rain's or the ocean's, by what the file holds

The other scripts of this folder have options of their own; the figures go to outputs/.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from earthformer_hf.data.inputs import holds_ocean
from earthformer_hf.errors import DEBUG, ends_in_one_line


DEBUGGING = [DEBUG] if DEBUG in sys.argv else []
HERE = Path(__file__).parent
RAIN, OCEAN = ("forecast_radar", "forecast_prediff", "guided_forecast"), ("forecast_enso",)


@ends_in_one_line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="rain (.npy, .npz, .h5, .nc and others) or ocean (.nc)")
    arguments = parser.parse_args()
    scripts, options = RAIN + OCEAN, []
    if arguments.input is not None:
        scripts, options = OCEAN if holds_ocean(arguments.input) else RAIN, ["--input", str(arguments.input)]
    for script in scripts:
        code = subprocess.run([sys.executable, str(HERE / f"{script}.py"), *options, *DEBUGGING]).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
