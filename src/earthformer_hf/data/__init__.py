"""Data sets as tables of events, and windows of past and future from events.

An *event* is a stretch of frames that belong together, a dict:

- `id` (str), and `time` (T,) datetime64, rising;
- `values` (T, H, W) or (T, H, W, C) in stored units, missing values as the source codes them;
- `geo`, a dict that says where it lies;
- `observed` (T, H, W) bool, where the source masks values beside coding them as missing;
- `covariates` (T, H, W, K) float32, known drivers such as weather, in the model's range;
- `series`, a dict of names and numbers (T,) or (T, ...) that describe whole frames, such as an index or an energy.

The last three are there only where a source has them. `values`, `observed` and `covariates` may be arrays, or anything
that has a shape and reads frames when it is sliced along time: [`~earthformer_hf.data.frames.LazyFrames`].

```
files --load_dataset(name)--> table of events --prepare--> parquet, pushed to a hub --datasets.load_dataset--> table
                                    |                                                                            |
                                    +---------------------- windows(table, ...) ---------------------------------+
```

| name | file | frames |
|---|---|---|
| "sevir", "sevir-lr" | `sevir.py` | radar or satellite images of storms, every 5 or 10 minutes |
| "icar-enso" | `icar_enso.py` | sea-surface temperature of climate models, monthly |
| "earthnet2021", "earthnet2021x" | `earthnet.py` | Sentinel-2 images every 5 days, clouds masked; the weather |
| "nbody-mnist", "moving-mnist" | `nbody_mnist.py`, `moving_mnist.py` | digits that move, generated or published |
| "open-radar", "open-sst" | `open_radar.py`, `open_sst.py` | open radar mosaics; observed sea-surface temperature |
| "folder" | `folder.py` | a user's own files |

`events.py`: what all sources share; `frames.py`: frames that wait in their files; `guards.py`: files from outside,
checked before they are opened, in a child process that runs `file_checks.py`; `gridded_file.py`: one file of a user;
`hosted.py`: tables that hold their frames, to share or to train from; `windows.py`: what a model is given;
`inputs.py`: what the examples forecast.
"""

from .events import load_dataset
from .folder import from_folder
from .windows import TrainingWindows, Windows, windows


__all__ = ["TrainingWindows", "Windows", "from_folder", "load_dataset", "windows"]
