"""A protocol for other data than the published ones: a YAML file with the fields of [`Protocol`].

earthformer-hf evaluate --new-protocol mine.yaml     # a template, commented line by line
earthformer-hf evaluate --protocol mine.yaml --data-dir my_files
"""

import datetime
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..configuration_earthformer import nearest_name
from .forecasters import data_extractor
from .protocols import PROTOCOLS, Protocol


TEMPLATE = """\
# What is forecast from your own data, and how it is scored. Two score files compare if all fields agree.
#   earthformer-hf evaluate --protocol {path} --data-dir MY_FILES --output scores
#   earthformer-hf evaluate --protocol {path} --data-dir MY_FILES --output scores --model MY_MODEL
name: {name}
source: own data                  # who scores like this; for the reader

# -- the data ---------------------------------------------------------------------------------------------------------
dataset: folder                   # your NetCDF, HDF5, GeoTIFF, GRIB, Zarr or .npy files; or open-radar, sevir-lr, ...;
                                  # or a folder that `earthformer-hf data prepare` wrote
options:                          # of the data set; of a folder those of `FolderConfig`, such as
  # variable: rain                # where a file holds several
  # pattern: "*.nc"               # which files
  # series: "radar_(.+?)_"        # what tells series apart, besides subfolders
  # time_tolerance: 45s           # by how much scan times jitter
  # crop: [0, 256, 0, 256]        # first row, end row, first column, end column
  # tile: [128, 128]              # cut into tiles; each is an event, and not independent of its neighbours
  # coarsen: 3                    # average squares of 3 x 3 pixels
  # keep_bad: true                # go on without files that cannot be read, each with its reason
  fractions: [0.8, 0.1, 0.1]      # of the frames for train, val and test, in the order of time
split: test                       # what is scored
independent: id                   # what is drawn for intervals: id, each event, but all tiles of one map together; or
                                  # a key of their `geo`, such as file; or, of a long record, a length of time such as
                                  # 1D: only windows of two days are independent
feature_extractor: {{}}             # what the files do not say of their numbers, such as
                                  # {{units: mm/h, grid_spacing: 1 km, missing_value: -1, valid_range: [0, 300]}}

# -- windows ----------------------------------------------------------------------------------------------------------
context_length: 4                 # frames that a forecast sees
prediction_length: 6              # frames that it forecasts
window_stride: 1                  # frames from the start of a window to that of the next
frame_stride: 1                   # 2 takes every other frame

# -- scores -----------------------------------------------------------------------------------------------------------
scores: [contingency, errors, fss, spectrum]   # also ssim; of ensembles: ensemble, ranks, probabilities
thresholds: [0.1, 1, 5, 10]       # in the units of the data
value_range: 1.0                  # above 0; values are divided by it before errors are taken
pools: [4]                        # widths of blocks whose maxima are counted too; at most that of the maps
neighbourhoods: [1, 5, 11]        # odd widths, in pixels, of the fractions skill score
# wet_threshold: 0.1              # ranks and chances are counted also where it is reached
average: pooled                   # or: per lead
ensemble: mean                    # deterministic scores of an ensemble are of its mean, or of each member
missing: values that were not observed enter no score

# -- forecasts without a neural network -------------------------------------------------------------------------------
# persistence; last clear value; dressed persistence (an ensemble); of rain (mm/h, mm, dBZ), with pysteps:
# extrapolation, s-prog, anvil, steps (an ensemble)
baselines: [persistence, extrapolation]
"""


def write_template(path: str | Path) -> None:
    """Write a protocol to fill in.

    Raises:
        ValueError: the file is there already.
    """
    path = Path(path)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE.format(path=path, name=path.stem))
    except FileExistsError:
        raise ValueError(f"`new_protocol`: {path} is there already, and is not overwritten.") from None


def load_protocol(path: str | Path) -> Protocol:
    """The protocol that a YAML file states. `name` may be left out for that of the file, and `source`.

    Raises:
        ValueError: no such file, or no YAML; a field that a protocol has not, with the nearest one; a value of another
            type; or a protocol that cannot be. Each names the file.
    """
    import yaml

    path = Path(path)
    try:
        stated = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"`protocol`: {path} does not exist; `earthformer-hf evaluate --new-protocol {path}` writes a template."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as reason:
        raise ValueError(f"`protocol`: {path}: {reason}") from reason
    if not isinstance(stated, dict):
        raise ValueError(f"`protocol`: {path} must hold the fields of a protocol, got {type(stated).__name__}.")
    known = {field.name: field for field in fields(Protocol)}
    types = get_type_hints(Protocol)
    values: dict[str, Any] = {"name": path.stem, "source": f"own protocol {path.name}"}
    for name, value in stated.items():
        if name not in known:
            nearest = nearest_name(str(name), known, cutoff=0.0)
            raise ValueError(f"`protocol`: {path} has an unknown field {name!r}; did you mean {nearest!r}?")
        if value is None and known[name].default_factory is not MISSING:  # an empty block
            continue
        values[name] = _as_type(value, types[name], f"`protocol`: {path}: `{name}`")
    if missing := [name for name, field in known.items() if name not in values and _is_required(field)]:
        raise ValueError(f"`protocol`: {path} must state {', '.join(missing)}.")
    try:
        protocol = Protocol(**values)
        extractor = data_extractor(protocol)
        if protocol.physical_thresholds:
            extractor.from_physical(protocol.physical_thresholds)
    except ValueError as reason:
        raise ValueError(f"`protocol`: {path}: {reason}") from reason
    return protocol


def _is_required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _as_type(value: Any, kind: Any, what: str) -> Any:
    """A value of YAML as a field of that type takes it: a list as a tuple, a whole number where any is meant."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:  # X | None
        return None if value is None else _as_type(value, next(each for each in inner if each is not NoneType), what)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{what} must be a list, got {value!r}.")
        return tuple(_as_type(each, inner[0], what) for each in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{what} must be names with values, got {value!r}.")
        return {str(name): _plain(each) for name, each in value.items()}
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, int | float if kind is float else kind):
        raise ValueError(f"{what} must be {words[kind]}, got {value!r}.")
    return float(value) if kind is float else value


def _plain(value: Any) -> Any:
    """Lists of YAML as tuples, and its dates as text."""
    if isinstance(value, list):
        return tuple(map(_plain, value))
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return value.isoformat() if isinstance(value, datetime.date) else value


def find_protocol(name: str | None) -> Protocol:
    """The protocol of a name in `PROTOCOLS`, or of a YAML file.

    Raises:
        ValueError: neither.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    if name is not None and (name.endswith((".yaml", ".yml")) or Path(name).is_file()):
        return load_protocol(name)
    raise ValueError(f"`protocol` must be one of {sorted(PROTOCOLS)}, or a .yaml file, got {name!r}.")


__all__ = ["find_protocol", "load_protocol", "write_template"]
