"""Temperatures on their own grid become anomalies on the models' grid."""

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from earthformer_hf.cli import app
from earthformer_hf.data.sst_anomalies import LATITUDES, LONGITUDES, sst_anomalies


MONTHS = np.datetime64("1981-01", "M") + np.arange(12 * 4)


def temperatures(lat, lon, anomaly=0.0):
    """A season, a gradient from the equator, and an anomaly (T, H, W) or one number; kelvin where asked for."""
    season = np.cos(2 * np.pi * (np.arange(len(MONTHS)) % 12) / 12)[:, None, None]
    values = 25 - 0.2 * np.abs(lat)[:, None] + 2 * season + anomaly + np.zeros((len(MONTHS), len(lat), len(lon)))
    coordinates = {"time": MONTHS.astype("datetime64[ns]"), "lat": lat, "lon": lon}
    return xr.Dataset({"sst": (("time", "lat", "lon"), values, {"units": "degC"})}, coordinates)


def converted(tmp_path, dataset, base=(1981, 1984)):
    dataset.to_netcdf(tmp_path / "in.nc")
    sst_anomalies(tmp_path / "in.nc", tmp_path / "out.nc", base)
    with xr.open_dataset(tmp_path / "out.nc") as written:
        return written.load().ssta


LAT, LON = np.arange(-88.0, 90, 2), np.arange(0.0, 360, 2)


def test_the_season_and_the_place_go_and_the_anomaly_stays(tmp_path):
    warm = np.linspace(-1, 1, len(MONTHS))[:, None, None]
    found = converted(tmp_path, temperatures(LAT, LON, warm))
    assert found.dims == ("time", "lat", "lon") and found.dtype == "float32"
    np.testing.assert_array_equal(found.lat, LATITUDES)
    np.testing.assert_array_equal(found.lon, LONGITUDES)
    by_month = warm[:, 0, 0] - warm[:, 0, 0].reshape(4, 12).mean(0)[np.arange(len(MONTHS)) % 12]
    np.testing.assert_allclose(found, np.broadcast_to(by_month[:, None, None], found.shape), atol=1e-5)


@pytest.mark.parametrize("change", ["descending", "dateline", "kelvin", "names", "order", "depth"])
def test_any_layout_gives_the_same(tmp_path, change):
    random = np.random.default_rng(0)
    data = temperatures(LAT, LON, random.normal(size=(len(MONTHS), len(LAT), len(LON))))
    expected = converted(tmp_path, data)
    if change == "descending":
        data = data.isel(lat=slice(None, None, -1))
    elif change == "dateline":
        data = data.assign_coords(lon=(data.lon + 180) % 360 - 180).sortby("lon")
    elif change == "kelvin":
        data["sst"] = (data.sst + 273.15).assign_attrs(units="K")
    elif change == "names":
        data = data.rename(sst="temperature", lat="latitude", lon="longitude")
        data["temperature"].attrs["standard_name"] = "sea_surface_temperature"
    elif change == "order":
        data = data.transpose("lon", "time", "lat")
    else:
        data = data.expand_dims(lev=[0.0])
    np.testing.assert_allclose(converted(tmp_path, data), expected, atol=1e-4)


def test_a_node_is_the_mean_over_its_area(tmp_path):
    """Against a plain mean of the 25 cells of a 1-degree grid that lie in a node's box, and with a part of it land."""
    lat, lon = np.arange(-60.0, 66), np.arange(0.0, 360)
    anomaly = np.random.default_rng(0).normal(size=(len(MONTHS), len(lat), len(lon)))
    anomaly -= anomaly.reshape(4, 12, len(lat), len(lon)).mean(0)[np.arange(len(MONTHS)) % 12]
    data = temperatures(lat, lon, anomaly)
    rows, columns = np.abs(lat - 45) < 2.5, np.abs(lon - 200) < 2.5
    area = np.sin(np.deg2rad(lat[rows] + 0.5)) - np.sin(np.deg2rad(lat[rows] - 0.5))
    plain = (anomaly[:, rows][:, :, columns].mean(2) * area).sum(1) / area.sum()
    np.testing.assert_allclose(converted(tmp_path, data).sel(lat=45, lon=200), plain, atol=1e-5)
    data["sst"] = data.sst.where((data.lon > 199) | (data.lon < 195))  # two of the node's five columns are land
    found = converted(tmp_path, data)
    np.testing.assert_allclose(
        found.sel(lat=45, lon=200),
        (anomaly[:, rows][:, :, columns][..., 2:].mean(2) * area).sum(1) / area.sum(),
        atol=1e-5,
    )
    data["sst"] = data.sst.where((data.lon > 201) | (data.lon < 195))  # four of them
    assert np.isnan(converted(tmp_path, data).sel(lat=45, lon=200)).all()


def test_what_is_refused(tmp_path):
    good = temperatures(LAT, LON)
    for bad, message in [
        (good.rename(sst="wind"), "must hold one of"),
        (good.isel(time=[0, 1, 3]), "1981-02 is followed by 1981-04"),
        (good.isel(time=slice(None, None, -1)), "1984-12 is followed by 1984-11"),
        (good + 273.15, "no temperatures of the sea"),
        (good.fillna(-999).where(good.lon > 100, -999), "no temperatures of the sea"),
        (good * np.nan, "nothing but missing values"),
        (good.rename(lon="x1"), "must have time, lat and lon"),
    ]:
        with pytest.raises(ValueError, match=message):
            converted(tmp_path, bad)
    with pytest.raises(ValueError, match="`base`: .* holds 0 of the months 1 of 1951..1970, 10 are needed"):
        converted(tmp_path, good, (1951, 1970))


def test_the_command(tmp_path):
    temperatures(LAT[::5], LON[::5]).to_netcdf(tmp_path / "in.nc")
    arguments = ["data", "sst-anomalies", str(tmp_path / "in.nc"), str(tmp_path / "out.nc")]
    result = CliRunner().invoke(app, [*arguments, "--base", "1981-1984"])
    assert result.exit_code == 0 and result.output == f"{tmp_path / 'out.nc'}: written, 1728 nodes of sea\n"
    result = CliRunner().invoke(app, [*arguments, "--base", "1981"])
    assert result.exit_code == 1 and "--base must be two years such as 1981-2010" in result.output
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "`--base`: " in result.output and "Traceback" not in result.output
