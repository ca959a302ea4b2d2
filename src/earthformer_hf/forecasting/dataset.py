"""A forecast as an `xarray.Dataset` by the CF conventions, 1.11 (https://cfconventions.org)."""

import datetime
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.file_times import parsed_step
from ..data.measures import UNKNOWN, parsed_spacing
from .grids import Grid, interpolated
from .observations import Observations


if TYPE_CHECKING:
    from xarray import Dataset


UNITS_OF_STEPS = {"s": "seconds", "m": "minutes", "h": "hours", "D": "days", "W": "weeks", "M": "months", "Y": "years"}
FLAG_MEANINGS = "reliable inflow_from_beyond_the_coverage"


@dataclass(frozen=True)
class Products:
    """What a forecast consists of; see [`~earthformer_hf.forecasting.forecast`]."""

    members: bool = True
    mean: bool = False
    percentiles: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()
    grid: str = "input"
    neighbourhood: str | None = None

    def check(self, of_ensembles: bool, ensemble_size: int) -> None:
        """
        Raises:
            ValueError: products that cannot be, or none.
        """
        if self.grid not in ("input", "model"):
            raise ValueError(f"`grid` must be 'input' or 'model', got {self.grid!r}.")
        if not all(0 <= each <= 100 for each in self.percentiles):
            raise ValueError(f"`percentiles` must lie within 0..100, got {list(self.percentiles)}.")
        if not isinstance(ensemble_size, int) or ensemble_size < 1:
            raise ValueError(f"`ensemble_size` must be a whole number of at least 1, got {ensemble_size!r}.")
        wanted = {"mean": self.mean, "percentiles": self.percentiles, "thresholds": self.thresholds}
        asked = [name for name, value in wanted.items() if value]
        if asked and not of_ensembles:
            raise ValueError(f"`{asked[0]}` is of an ensemble; this model makes one forecast.")
        if self.neighbourhood is not None:
            if not self.thresholds:
                raise ValueError("`neighbourhood` is of chances; ask for `thresholds`.")
            self.radius()
        if not self.members and not asked:
            raise ValueError("`members=False` leaves nothing; ask for `mean`, `percentiles` or `thresholds`.")

    def radius(self) -> float:
        """Of the neighbourhood, in kilometres; 0 of none.

        Raises:
            ValueError: no distance.
        """
        if self.neighbourhood is None:
            return 0.0
        amount, unit = parsed_spacing(self.neighbourhood)
        if unit != "km" or amount <= 0:
            raise ValueError(f"`neighbourhood` must be a distance such as '10 km', got {self.neighbourhood!r}.")
        return amount

    def count(self, size: int, length: int) -> int:
        """How many maps they are."""
        each = size * self.members + self.mean + len(self.percentiles) + len(self.thresholds)
        return each * length + (size + 1) * len(self.thresholds) + 2 * size


def forecast_dataset(
    values: np.ndarray,
    observations: Observations,
    context: Any,
    units: str,
    nowcaster: Any,
    products: Products,
    inflow: np.ndarray | None,
    settings: dict[str, Any],
) -> "Dataset":
    """The forecast with its coordinates, products and attributes.

    Args:
        values: (E, T, h, w) on the model's grid, in `units`.
        observations: from which it was made.
        context: see [`~earthformer_hf.forecasting.forecast.Context`].
        nowcaster: that made it.
        products: that are wanted.
        inflow: (T, h, w) of what comes from beyond the coverage; None of what does not move.
        settings: to be told, such as the seed.
    """
    import xarray

    on_input = products.grid == "input" and context.factor != 1
    grid = observations.grid if on_input else context.grid
    missing = context.missing if on_input or context.factor == 1 else ~context.observed[-1]
    name = "rainfall_rate" if units == "mm/h" else observations.name
    cell = _cell(grid) if products.neighbourhood else None
    arrays = _products(values, products, context.factor if on_input else 1.0, missing, cell)
    dataset = xarray.Dataset(coords=_coordinates(grid, observations, nowcaster, values.shape[1]))
    spatial = grid.names
    attributes = {"units": "mm h-1" if units == "mm/h" else units} | _grid_mapping(dataset, grid)
    described = _described(name, attributes, products)
    for kind, array in arrays.items():
        variable, dims, attrs, coordinates = described[kind]
        dataset = dataset.assign_coords(coordinates)
        if kind == "members" and not nowcaster.makes_ensembles:
            array, dims = array[0], dims[1:]
        dataset[variable] = ((*dims, *spatial), array, attrs)
        dataset[variable].encoding = {"zlib": True, "complevel": 1, "_FillValue": np.float32(np.nan)}
    if "members" in arrays and nowcaster.makes_ensembles:
        realization = np.arange(len(values), dtype="int32")
        dataset = dataset.assign_coords(realization=("realization", realization, {"standard_name": "realization"}))
    if inflow is not None:
        flag = _flags(inflow, context.factor if on_input else 1.0, grid.shape)
        attrs = {
            "standard_name": "quality_flag",
            "flag_values": np.array([0, 1], "int8"),
            "flag_meanings": FLAG_MEANINGS,
            **_grid_mapping(dataset, grid),
        }
        dataset["quality_flag"] = (("lead_time", *spatial), flag, attrs)
        dataset["quality_flag"].encoding = {"zlib": True, "complevel": 1}
    dataset.attrs = _attributes(name, observations, nowcaster, settings)
    return dataset


def _described(
    name: str, attributes: dict[str, Any], products: Products
) -> dict[str, tuple[str, tuple[str, ...], dict[str, Any], dict[str, Any]]]:
    """Product -> its variable's name, dimensions before rows and columns, attributes, and coordinates of its own."""
    standard = attributes | ({"standard_name": name} if name == "rainfall_rate" else {})
    indicator = "realization: mean (of 1 where reached, else 0)"
    near, around = "", {}
    if products.neighbourhood is not None:
        near, around = f" within {products.neighbourhood}", {"neighbourhood": products.neighbourhood}
        indicator = f"area: maximum {indicator}"
    what = f"chance that {name} reaches the threshold{near}"
    chance = {"units": "1", "long_name": what, "cell_methods": indicator} | around
    ever = {"long_name": f"{what} at any lead time", "cell_methods": f"lead_time: maximum {indicator}"}
    percentiles = ("percentile", np.array(products.percentiles, "float64"), {"units": "percent"})
    thresholds = ("threshold", np.array(products.thresholds, "float64"), {"units": attributes["units"]})
    mean, many = {"cell_methods": "realization: mean"}, {"long_name": "percentiles of the members"}
    return {
        "members": (name, ("realization", "lead_time"), standard, {}),
        "mean": (f"{name}_mean", ("lead_time",), standard | mean, {}),
        "percentiles": (
            f"{name}_percentile",
            ("percentile", "lead_time"),
            standard | many,
            {"percentile": percentiles},
        ),
        "chances": (
            "exceedance_probability",
            ("threshold", "lead_time"),
            attributes | chance,
            {"threshold": thresholds},
        ),
        "chances_at_any_time": (
            "exceedance_probability_at_any_time",
            ("threshold",),
            attributes | chance | ever,
            {},
        ),
    }


def _products(
    values: np.ndarray, products: Products, factor: float, missing: np.ndarray, cell: tuple[float, float] | None
) -> dict[str, np.ndarray]:
    """Name of a product -> its array, float32, NaN where missing. `cell`: its height and width in kilometres."""
    size, length = values.shape[:2]
    shape = missing.shape

    def empty(*sizes: int) -> np.ndarray:
        return np.empty((*sizes, *shape), "float32")

    found: dict[str, np.ndarray] = {}
    if products.members:
        found["members"] = empty(size, length)
    if products.mean:
        found["mean"] = empty(length)
    if products.percentiles:
        found["percentiles"] = empty(len(products.percentiles), length)
    ever = np.zeros((len(products.thresholds), size, *shape), bool)
    if products.thresholds:
        found["chances"] = empty(len(products.thresholds), length)
    for lead in range(length):  # one by one: maps of a fine grid are large
        maps = interpolated(values[:, lead], factor, shape)  # (E, H, W)
        maps = np.where(missing, np.float32(np.nan), maps)
        if products.members:
            found["members"][:, lead] = maps
        if products.mean:
            found["mean"][lead] = maps.mean(0)
        if products.percentiles:
            found["percentiles"][:, lead] = np.percentile(maps, products.percentiles, axis=0)
        for place, threshold in enumerate(products.thresholds):
            reached = maps >= np.float32(threshold)
            if cell is not None:
                reached = near(reached, products.radius(), cell)
            ever[place] |= reached
            found["chances"][place, lead] = np.where(np.isnan(maps[0]), np.nan, reached.mean(0))
    if products.thresholds:
        found["chances_at_any_time"] = np.where(missing, np.nan, ever.mean(1)).astype("float32")
    return found


def near(reached: np.ndarray, radius: float, cell: tuple[float, float]) -> np.ndarray:
    """Where a pixel of the same map (E, H, W) whose centre is at most `radius` away was reached."""
    from scipy.ndimage import distance_transform_edt

    return np.stack([each if not each.any() else distance_transform_edt(~each, cell) <= radius for each in reached])


def _cell(grid: Grid) -> tuple[float, float]:
    """Height and width of a cell in kilometres.

    Raises:
        ValueError: the grid's spacing is unknown.
    """
    cell = grid.cell
    if cell is None:
        raise ValueError("`neighbourhood` needs the grid spacing of the data, which is unknown; state `grid_spacing`.")
    return cell


def _flags(inflow: np.ndarray, factor: float, shape: tuple[int, int]) -> np.ndarray:
    if factor == 1:
        return inflow.astype("int8")
    return np.stack([interpolated(each[None].astype("float32"), factor, shape)[0] >= 0.5 for each in inflow]).astype(
        "int8"
    )


def _coordinates(grid: Grid, observations: Observations, nowcaster: Any, length: int) -> Any:
    """Coordinates as a dataset."""
    import xarray

    geo = grid.geo
    found: dict[str, Any] = {}
    for role, name, centres in zip("yx", grid.names, (grid.y, grid.x)):
        units = str(geo.get(f"{role}_units", ""))
        attributes = {"axis": role.upper()} | ({"units": units} if units else {})
        if "degree" in units or name.lower() in ("lat", "lon", "latitude", "longitude"):
            attributes["standard_name"] = "latitude" if role == "y" else "longitude"
            attributes.setdefault("units", "degrees_north" if role == "y" else "degrees_east")
        elif units:
            attributes["standard_name"] = f"projection_{role}_coordinate"
        found[name] = (name, centres, attributes)
    found |= {name: (grid.names, *place) for name, place in grid.places.items()}
    leads = np.arange(1, length + 1)
    text = nowcaster.extractor.time_step
    lead = {"standard_name": "forecast_period"}
    if text == UNKNOWN:
        found["lead_time"] = ("lead_time", leads, lead | {"units": "1", "long_name": "frames ahead"})
        return xarray.Dataset(coords=found)
    step = parsed_step(text)
    unit = np.datetime_data(step)[0]
    amount = int(step.astype(int))
    if unit in "MY":
        found["lead_time"] = ("lead_time", amount * leads, lead | {"units": UNITS_OF_STEPS[unit]})
    else:
        found["lead_time"] = ("lead_time", (step * leads).astype("timedelta64[ns]"), lead)
    if observations.is_dated:
        last = observations.time[-1]
        valid = (last.astype(f"datetime64[{unit}]") + step * leads) if unit in "MY" else last + step * leads
        reference = {"standard_name": "forecast_reference_time", "long_name": "time of the last observed frame"}
        found["forecast_reference_time"] = ((), last.astype("datetime64[ns]"), reference)
        found["time"] = ("lead_time", valid.astype("datetime64[ns]"), {"standard_name": "time"})
    dataset = xarray.Dataset(coords=found)
    if unit not in "MY":
        dataset["lead_time"].encoding = {"units": UNITS_OF_STEPS[unit], "dtype": "int64"}
    for name in ("time", "forecast_reference_time"):
        if name in dataset.coords:
            dataset[name].encoding = {"units": "seconds since 1970-01-01", "dtype": "int64"}
    return dataset


def _grid_mapping(dataset: Any, grid: Grid) -> dict[str, str]:
    """The attribute that leads to the coordinate reference system, which is added to the dataset; empty if unknown."""
    text, attributes = grid.geo.get("crs"), grid.geo.get("grid_mapping")
    if (not text and not attributes) or "y_name" not in grid.geo:  # a system without coordinates places nothing
        return {}
    if "crs" not in dataset.variables:
        dataset.coords["crs"] = ((), np.int32(0), dict(attributes) if attributes else _of_text(str(text)))
    return {"grid_mapping": "crs"}


def _of_text(text: str) -> dict[str, Any]:
    """The CF attributes of a coordinate reference system in WKT, PROJ or as an EPSG code; where pyproj is not
    installed, the text itself."""
    try:
        from pyproj import CRS
    except ModuleNotFoundError:
        return {"crs_wkt": text, "spatial_ref": text}
    try:
        return CRS.from_user_input(text).to_cf()
    except Exception as reason:  # whatever a text may cause
        raise ValueError(f"`crs`: {text!r} is no coordinate reference system: {reason}.") from None


def _attributes(name: str, observations: Observations, nowcaster: Any, settings: dict[str, Any]) -> dict[str, Any]:
    from .. import __version__

    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "Conventions": "CF-1.11",
        "title": f"Forecast of {name.replace('_', ' ')}",
        "source": f"earthformer_hf {__version__}, {type(nowcaster.model).__name__}",
        "history": f"{made}: forecast from {observations.source}",
        "references": "Gao et al., Earthformer, NeurIPS 2022; Gao et al., PreDiff, NeurIPS 2023",
        **nowcaster.identity,
        **settings,
    }


__all__ = ["Products", "forecast_dataset", "near"]
