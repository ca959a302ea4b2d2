"""Score a model under a named protocol, beside forecasts without a neural network.

python examples/evaluate.py --model model_cards/earthformer-radar-tiny --output outputs/radar
python examples/evaluate.py --model model_cards/earthformer-sst-small
python examples/evaluate.py --model model_cards/prediff-radar-tiny     # ensembles: half an hour on two cores
python examples/evaluate.py --protocol radar-open                      # the baselines alone
torchrun --nproc_per_node 2 examples/evaluate.py --model ...           # each process forecasts its share

`--output` is a folder for `scores.json` and the figures. `earthformer-hf evaluate` is the same.
"""

import argparse
import shlex
import sys
from pathlib import Path

from earthformer_hf.evaluation.protocols import PROTOCOLS
from earthformer_hf.evaluation.reports import run_protocol


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder, or <your-namespace>/<name>")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), help="default: the one that the model names")
    parser.add_argument("--data_dir", type=Path, help="default: EARTHFORMER_HF_DATA, or ../shared/data")
    parser.add_argument("--ensemble_size", type=int, default=8)
    parser.add_argument("--num_inference_steps", type=int, default=20, help="of a pipeline")
    parser.add_argument("--max_windows", type=int, help="a quick look at so many windows")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    try:
        text = run_protocol(**vars(arguments), command=shlex.join(["python", *sys.argv]))
    except (ValueError, OSError) as reason:
        raise SystemExit(f"error: {reason}") from reason
    if text is not None:
        print(text)


if __name__ == "__main__":
    main()
