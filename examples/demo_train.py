"""Two minutes of training that survive being killed, scored beside forecasts without a network: `make demo-train`.

Trains examples/configs/earthformer_radar_tiny.yaml from random weights for a few dozen steps, on real radar if it is
there, else on simulated rain; kills that with SIGKILL at its first checkpoint; goes on with the same command; scores
the result; writes its card. What two minutes teach does not beat persistence.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np

from earthformer_hf import EarthformerFeatureExtractor, sharing
from earthformer_hf.data import open_radar, simulated
from earthformer_hf.errors import ends_in_one_line


HERE = Path(__file__).parent
FILE = "radar_open_3km.h5"


def simulated_radar(path: Path):
    """A file in the layout of the open radar data that holds simulated rain; its codes are their own proxy codes."""
    extractor = EarthformerFeatureExtractor(**open_radar.OpenRadar.FACTS.feature_extractor)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        rates = open_radar.rain_rate(np.arange(256).astype("uint8"))
        file["vil_lut"] = extractor.from_physical(np.nan_to_num(rates)).round().astype("uint8")
        for n, event in enumerate(simulated.rain_events(4, length=36, size=160)):
            group = file.create_group(f"mrms_simulated_{n}")
            group["code"] = open_radar.stored_code(event["values"])
            group["time"] = np.array([str(time.astype("datetime64[s]")) for time in event["time"]], "S19")
            split = ("train", "train", "val", "test")[n]
            group[f"tiles_{split}"] = np.array([(0, 0), (0, 32), (32, 0), (32, 32)], "int32")
            group.attrs.update(tile_size=128, dt_minutes=2)


@ends_in_one_line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of the training")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="for model, card and scores")
    arguments = parser.parse_args()
    environment = dict(os.environ)
    data = Path(environment.get("EARTHFORMER_HF_DATA", "../shared/data"))
    if not (data / FILE).exists():
        data = arguments.output_dir / "simulated"
        simulated_radar(data / FILE)
        print("no open radar data here: the rain is simulated, and scores only show that all of it runs")
    environment["EARTHFORMER_HF_DATA"] = str(data)
    output = arguments.output_dir / "model"
    command = [sys.executable, str(HERE / "train_earthformer.py"), "--output_dir", str(output)]
    command += ["--recipe", str(HERE / "configs/earthformer_radar_tiny.yaml"), "--max_steps", str(arguments.steps)]
    command += ["--eval_every", str(arguments.steps), "--save_every", "10", "--eval_stride", "48"]

    checkpoint = output / "checkpoints/last/progress.json"
    training = subprocess.Popen(command, env=environment)
    while training.poll() is None and not checkpoint.exists():
        time.sleep(0.5)
    if training.poll() is None:
        training.send_signal(signal.SIGKILL)
        training.wait()
        print(f"\nkilled with SIGKILL after {checkpoint.read_text()}; now the same command again", flush=True)
    subprocess.run(command, env=environment, check=True)
    score = [sys.executable, "-m", "earthformer_hf.cli", "evaluate", "--model", str(output), "--output", str(output)]
    subprocess.run(score, env=environment, check=True)
    subprocess.run(command, env=environment, check=True)  # nothing is left to train: the card, now with its scores
    problems = sharing.check(output)
    print(f"{output / 'README.md'}: {problems or 'fine'}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
