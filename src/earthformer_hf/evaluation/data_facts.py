"""What the numbers of a protocol's data are, as its events say, and whether a model fits them."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from transformers.utils import logging

from ..data import Windows
from ..data.events import SOURCES, Events, builder_of
from ..data.measures import UNKNOWN, DataFacts, alike, common_step, spacing_of, step_of
from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from .protocols import Protocol


logger = logging.get_logger(__name__)
OCEAN_GRID = (24, 48)  # rows and columns of the maps that have a Nino3.4 index
SMALLEST_SSIM = 6  # pixels: beyond the border the window of 11 x 11 sees a mirrored half of itself


def facts_of(windows: Windows, protocol: Protocol) -> DataFacts:
    """The facts of the events that have windows, see [`facts_of_events`]."""
    return facts_of_events(_headers(windows), protocol)


def facts_of_events(headers: Iterable[tuple[str, Any, dict[str, Any]]], protocol: Protocol) -> DataFacts:
    """What events say of their numbers.

    What `feature_extractor` of the protocol states comes first; then what the events say (their times, and `geo`);
    units also come from the source. Nothing else does: files of one source may differ in step and spacing.

    Args:
        headers: id, time and `geo` of each event.

    Raises:
        ValueError: events of several units, time steps or grid spacings, two of them by name.
    """
    known = list(headers)
    common = common_step([time for _, time, _ in known])
    found: dict[str, tuple[str, str]] = {}  # field -> value and event
    for name, time, geo in known:
        said = {"units": str(geo.get("units", UNKNOWN)), "grid_spacing": spacing_of(geo)}
        said["time_step"] = step_of(time, geo, common, protocol.frame_stride)
        for field, value in said.items():
            if value == UNKNOWN:
                continue
            first, event = found.setdefault(field, (value, name))
            if alike(field, first, value) is False:
                raise ValueError(
                    f"`dataset`: the events of a protocol must have one {field.replace('_', ' ')}, got {first} in "
                    f"{event!r} and {value} in {name!r}; choose by its options."
                )
    facts = {field: value for field, (value, _) in found.items()}
    if protocol.dataset in SOURCES:
        units = builder_of(protocol.dataset).facts_of(protocol.options).units
        facts = ({} if units == "the files'" else {"units": units}) | facts
    names = ("units", "time_step", "grid_spacing")
    facts |= {name: str(protocol.feature_extractor[name]) for name in names if name in protocol.feature_extractor}
    return DataFacts(**facts)


def _headers(windows: Windows) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
    """Id, time and `geo` of the events that have windows, without their frames."""
    events: Any = windows.events
    used = np.unique(windows.index[:, 0]).tolist()
    if isinstance(events, Events):
        table = events.table.select_columns(["id", "time", "geo"])
        for row in (table[index] for index in used):
            yield row["id"], np.array(row["time"], "datetime64[s]"), json.loads(row["geo"])
    else:
        for event in (events[index] for index in used):
            yield str(event["id"]), np.asarray(event.get("time", ())), event.get("geo", {})


def check_scores(windows: Windows, facts: DataFacts, protocol: Protocol) -> None:
    """Refuse what a protocol asks of data that cannot have it; the size of the maps is that of the first window.

    Raises:
        ValueError: blocks that are larger than the maps, a score of other maps, or events without the key of `geo`, or
            the series, that the protocol names.
    """
    name, shape = f"of {protocol.name!r}", windows.raw(0).shape[1:]
    size = f"maps of {' x '.join(map(str, shape))}"
    side = min(shape[:2])
    if "contingency" in protocol.scores and side < max(protocol.pools, default=1):
        raise ValueError(f"`pools` {name} must be at most {side} for {size}, got {protocol.pools}.")
    if "ssim" in protocol.scores and side < SMALLEST_SSIM:
        raise ValueError(f"`scores` {name}: 'ssim' needs at least {SMALLEST_SSIM} pixels a side, got {size}.")
    if "earthnet" in protocol.scores and shape[2:] != (4,):
        raise ValueError(f"`scores` {name}: 'earthnet' is of maps (H, W, 4), got {size}.")
    if "nino34" in protocol.scores and (shape != OCEAN_GRID or facts.time_step not in ("1M", UNKNOWN)):
        raise ValueError(
            f"`scores` {name}: 'nino34' is of monthly maps of {OCEAN_GRID[0]} x {OCEAN_GRID[1]}, see `OpenSst`, got "
            f"{size} with a time step of {facts.time_step}."
        )
    series = windows.events[int(windows.index[0, 0])].get("series", {})
    if "nino34" in protocol.scores and protocol.index_series not in (None, *series):
        raise ValueError(f"`index_series` {name} must be one of {[*series]}, got {protocol.index_series!r}.")
    if protocol.independent != "id" and not protocol.independent[:1].isdigit():
        keys = {key for _, _, geo in _headers(windows) for key in geo}
        if protocol.independent not in keys:
            raise ValueError(
                f"`independent` {name} must be 'id', a length of time such as '1D', or a key of the events' `geo`: "
                f"{sorted(keys)}, got {protocol.independent!r}."
            )


def check_model(extractor: EarthformerFeatureExtractor, facts: DataFacts, protocol: Protocol) -> None:
    """Refuse a model of other numbers than the data's; what cannot be compared is logged.

    Args:
        extractor: of the model.
        facts: of the data.

    Raises:
        ValueError: another unit, another time step, or a grid spacing that is off by more than 10 %.
    """
    different = []
    for field in ("units", "time_step", "grid_spacing"):
        of_model, of_data = getattr(extractor, field), getattr(facts, field)
        same, words = alike(field, of_model, of_data), field.replace("_", " ")
        if same is None:
            logger.warning(f"{words} of the model and of the data are not compared: {of_model!r} and {of_data!r}.")
        elif not same:
            different.append(f"{words} {of_model!r} and not {of_data!r}")
    if different:
        raise ValueError(f"`model` does not fit the data of {protocol.name!r}: its {', its '.join(different)}.")


__all__ = ["check_model", "check_scores", "facts_of", "facts_of_events"]
