"""Data sets as tables of events, and windows of past and future from events.

An *event* is a stretch of frames that belong together, a dict:

- `id` (str), and `time` (T,) datetime64, rising;
- `values` (T, H, W) or (T, H, W, C) in stored units, missing values as the source codes them;
- `geo`, a dict that says where it lies;
- `observed` (T, H, W) bool, where the source masks values beside coding them as missing;
- `covariates` (T, H, W, K) float32, known drivers such as weather, in the model's range;
- `series`, a dict of names and numbers (T,) or (T, ...) that describe whole frames, such as an index or an energy.

The last three are there only where a source has them. `values`, `observed` and `covariates` may be arrays, or anything
that has a shape and reads frames when it is sliced along time: [`~earthformer_hf.data.events.LazyFrames`].

```
files --load_dataset(name)--> table of events --prepare--> parquet, pushed to a hub --datasets.load_dataset--> table
                                    |                                                                            |
                                    +---------------------- windows(table, ...) ---------------------------------+
```
"""

from .events import load_dataset
from .windows import TrainingWindows, Windows, windows


__all__ = ["TrainingWindows", "Windows", "load_dataset", "windows"]
