"""The oceans: ICAR-ENSO from files of its layout that the tests write, and the open record."""

import numpy as np
import pytest
import xarray as xr
from tiny import DATA

from earthformer_hf import EarthformerFeatureExtractor, load_dataset
from earthformer_hf.data import icar_enso, open_sst
from earthformer_hf.data.windows import Windows


LAT, LON = np.arange(-55.0, 65, 5), np.arange(85.0, 345, 5)  # two longitudes on either side of the crop
ARCHIVES = (("CMIP6", 2, 4), ("CMIP5", 3, 3))  # models, rows: rests of 0 and 2 rows
scale = EarthformerFeatureExtractor(**icar_enso.IcarEnso.FACTS.feature_extractor).encode


def load(folder, split=None, name="icar-enso", **options):
    return load_dataset(name, folder, split, cache_dir=folder.parent / "cache", **options)


@pytest.fixture
def simulations(tmp_path, monkeypatch):
    """Files of five short models, and each model's months of the Nino3.4 index; maps are a function of them."""
    monkeypatch.setattr(icar_enso, "ARCHIVES", ARCHIVES)
    random, records, rows = np.random.default_rng(0), [], []
    for _, models, number in ARCHIVES:
        for _ in range(models):
            records.append(random.normal(size=12 * number + 24).astype("float32"))
            rows += [records[-1][12 * row : 12 * row + 36] for row in range(number)]
    nino = np.stack(rows)  # (rows, 36)
    folder = tmp_path / "enso"
    folder.mkdir()
    write(folder, nino)
    return folder, records, nino


def write(folder, nino, lon=LON, name="sst", maps_of=None):
    maps = (nino if maps_of is None else maps_of)[..., None, None] + (0.01 * LAT[:, None] + 0.001 * lon).astype(
        "float32"
    )
    dims, places = ("year", "month", "lat", "lon"), {"lat": LAT, "lon": lon}
    xr.Dataset({name: (dims, maps)}, places).to_netcdf(folder / "CMIP_train.nc")
    xr.Dataset({"nino": (dims[:2], nino)}).to_netcdf(folder / "CMIP_label.nc")


@pytest.mark.parametrize("rows, months", [(151, 1836), (140, 1704), (3, 60), (2, 48), (1, 36)])
def test_rows_become_the_record_they_were_cut_from(rows, months):
    record = np.arange(12 * rows + 24)
    cut = np.stack([record[12 * row : 12 * row + 36] for row in range(rows)])
    unfolded = icar_enso.unfold(cut)
    assert unfolded.tolist() == record.tolist() and len(unfolded) == months
    maps = icar_enso.unfold(cut[..., None, None] * np.ones((2, 3)))
    np.testing.assert_array_equal(maps[:, 1, 2], record)


def test_models_split_crop_and_index(simulations):
    folder, records, _ = simulations
    tables = load(folder)
    ids = {split: table["id"][:] for split, table in tables.items()}
    assert ids == {"train": ["CMIP6:01", "CMIP6:02", "CMIP5:01"], "val": ["CMIP5:02"], "test": ["CMIP5:03"]}
    events = [event for split in ("train", "val", "test") for event in tables[split]]
    for event, record in zip(events, records):
        np.testing.assert_array_equal(event["series"]["nino34"], record)
        assert event["values"].shape == (len(record), 24, 48) and event["values"].dtype == "float32"
        np.testing.assert_allclose(event["values"][5:7], record[5:7, None, None] + grid(), atol=1e-6)
        assert len(event["time"]) == len(record) and str(event["time"][13].astype("M8[M]")) == "0002-02"
    assert events[0]["geo"] == {"lat": LAT.tolist(), "lon": np.arange(95.0, 335, 5).tolist()}
    item = Windows(tables["test"], scale, 12, 14, series=("nino34",))[3]
    np.testing.assert_array_equal(item["future_nino34"], records[-1][15:29])
    low, high = -16.549121856689453, 10.198975563049316
    expected = (records[-1][3:15, None, None] + grid() - low) / (high - low)
    np.testing.assert_allclose(item["past_values"][..., 0], expected, atol=1e-6)


def grid():
    return 0.01 * LAT[:, None] + 0.001 * np.arange(95, 335, 5)


def test_a_missing_value_is_named(simulations):
    folder, _, nino = simulations
    holes = nino.copy()
    holes[16, 20] = np.nan  # of the last model's last row
    write(folder, nino, maps_of=holes)
    with pytest.raises(ValueError, match="'CMIP5:03': .*CMIP_train.nc, row 16: 1152 of 41472 values are missing"):
        load(folder, "test")
    write(folder, holes, maps_of=nino)
    with pytest.raises(ValueError, match="'CMIP5:03': .*CMIP_label.nc, row 16: 1 of 36 values are missing"):
        load(folder, "test")
    tables = load(folder, keep_bad=True)
    problems = [problem for table in tables.values() for problem in table.with_format(None)["problem"]]
    assert [bool(problem) for problem in problems] == [False] * 4 + [True]


def test_missing_values_outside_the_crop_do_not_matter(simulations):
    folder, records, nino = simulations
    with xr.open_dataset(folder / "CMIP_train.nc") as dataset:
        dataset = dataset.load()
    dataset.sst[:, :, :, :2] = np.nan
    (folder / "CMIP_train.nc").unlink()
    dataset.to_netcdf(folder / "CMIP_train.nc")
    assert len(load(folder, "train")) == 3


def test_other_files_are_refused(simulations):
    folder, _, nino = simulations
    write(folder, nino[1:])
    with pytest.raises(ValueError, match="CMIP_label.nc must hold 'nino' of .*17.* found .*16"):
        load(folder)
    write(folder, nino, lon=LON[4:])
    with pytest.raises(ValueError, match="CMIP_train.nc must hold 'sst' of .*48.* found .*46"):
        load(folder)
    write(folder, nino, name="sea")
    with pytest.raises(ValueError, match="CMIP_train.nc must hold 'sst' .* found .'sea'"):
        load(folder)
    (folder / "CMIP_train.nc").unlink()
    with pytest.raises(ValueError, match="CMIP_train.nc: does not exist"):
        load(folder)


@pytest.mark.parametrize(
    "future, gaps, counts",
    [
        (14, (1, 1), (52_350, 1_679)),
        (14, (10, 11), (5_250, 153)),
        (26, (1, 1), (51_990, 1_667)),
        (26, (10, 11), (5_205, 152)),
    ],
)
def test_windows_of_the_published_settings(future, gaps, counts):
    long, short = ({"id": "", "values": np.broadcast_to(np.float32(0), (n, 1, 1))} for n in (1836, 1704))
    train = Windows([long] * 15 + [short] * 15, scale, 12, future, stride=gaps[0])
    assert (len(train), len(Windows([short], scale, 12, future, stride=gaps[1]))) == counts


# -- the open record --------------------------------------------------------------------------------------------------


def write_record(path, first, months):
    """Maps whose every value is an eighth of the number of the month, but for missing land."""
    time = (np.datetime64(first, "M") + np.arange(months)).astype("datetime64[ns]")
    values = np.arange(months)[:, None, None] / 8 * np.ones((24, 72))
    values[:, 0, :30] = np.nan
    places = {"time": time, "lat": np.arange(-55.0, 65, 5), "lon": np.arange(0.0, 360, 5)}
    xr.Dataset({"ssta": (("time", "lat", "lon"), values)}, places).to_netcdf(path)


def test_the_open_record_by_years(tmp_path):
    folder = tmp_path / "sst"
    folder.mkdir()
    write_record(folder / "mine.nc", "1999-07", 60)
    years = {"train": (1999, 2000), "test": (2002, 2003)}
    tables = load(folder, name="open-sst", file="mine.nc", years=years)
    assert set(tables) == {"train", "test"} and tables["train"][0]["id"] == "mine:train"
    event = tables["test"][0]
    assert event["values"].shape == (24, 24, 48) and str(event["time"][0].astype("M8[M]")) == "2002-01"
    np.testing.assert_array_equal(event["series"]["nino34"], np.arange(30, 54) / 8)
    assert np.isnan(event["values"][:, 0, :11]).all() and np.isfinite(event["values"][:, 0, 11:]).all()
    extractor = EarthformerFeatureExtractor(**open_sst.OpenSst.FACTS.feature_extractor)
    item = Windows(tables["test"], extractor.encode, 12, 2, series=("nino34",))[1]
    assert (
        item["past_nino34"].tolist() == (np.arange(31, 43) / 8).tolist()
        and not item["future_observed_mask"][:, 0, :11].any()
    )
    with pytest.raises(ValueError, match="no month of 1856..1974"):
        load(folder, "train", name="open-sst", file="mine.nc")
    with pytest.raises(ValueError, match="other.nc: does not exist"):
        load(folder, "test", name="open-sst", file="other.nc")


@pytest.mark.skipif(not (DATA / "sst_kaplan_1856_2014.nc").exists(), reason="open SST: set EARTHFORMER_HF_DATA")
def test_the_table_of_the_open_record_holds_its_events(tmp_path):
    tables = load_dataset("open-sst", DATA, cache_dir=tmp_path)
    record = xr.open_dataset(DATA / "sst_kaplan_1856_2014.nc")
    for split, table in tables.items():
        first, last = open_sst.SPLITS[split]
        expected = record.ssta.sel(time=slice(str(first), str(last)), lon=slice(95, 330))
        event = table[0]
        assert event["id"] == f"sst_kaplan_1856_2014:{split}" and (event["time"] == expected.time.values).all()
        np.testing.assert_array_equal(event["values"], expected.values.astype("float32"))
        np.testing.assert_array_equal(event["series"]["nino34"], open_sst.nino34(event["values"]))
        assert event["geo"]["lon"] == expected.lon.values.tolist()
