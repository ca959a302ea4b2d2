"""Hindcasts over an archive: each equals a forecast of its own, and a kill loses and repeats nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml
from archive_data import rain, save_model, write_archive
from filelock import FileLock
from typer.testing import CliRunner

from earthformer_hf.cli import app
from earthformer_hf.evaluation import run_protocol
from earthformer_hf.forecasting import forecast, forecast_archive, forecast_on, observe


distributed = pytest.importorskip("distributed")
DAY = "2020-06-01T"
SHORT = (f"{DAY}01:00", f"{DAY}02:20", "10m")  # three starts
ASKED = (f"{DAY}00:00", f"{DAY}03:00", "10m")  # eleven


@pytest.fixture(scope="module")
def scheduler():
    """A scheduler and a worker in threads of this process."""
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0"
    ) as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def archive(tmp_path):
    return write_archive(tmp_path / "archive")


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


def opened(path):
    return xr.open_dataset(path, engine="zarr", consolidated=False)


def marked(path):
    """When each start's mark was written, by its number."""
    return {int(mark.name): mark.stat().st_mtime_ns for mark in (Path(path) / "complete" / "c").glob("*")}


def test_a_store_holds_the_forecast_from_each_start(tmp_path, archive, scheduler):
    model = save_model(tmp_path / "model", pipeline=True)
    options = {"ensemble_size": 2, "num_inference_steps": 1, "thresholds": [0.1], "device": "cpu", "overlap": 0}
    out = tmp_path / "out.zarr"
    summary = forecast_archive(model, archive, out, *SHORT, scheduler=scheduler, **options)
    # there is nothing between 01:10 and 02:00, and 02:00 and 02:10 have too few frames before them
    starts = [f"{DAY}{clock}" for clock in ("01:00", "01:10", "02:20")]
    left_out = summary["left_out"]
    assert (summary["made"], summary["kept"], len(left_out)) == (3, 0, 6)
    assert "3 frames without a hole are needed, there are 2" in left_out[f"{DAY}02:10:00"]
    assert f"the last frame before {DAY}01:20:00 is of {DAY}01:10:00" in left_out[f"{DAY}01:20:00"]
    with opened(out) as store:
        np.testing.assert_array_equal(store["forecast_reference_time"], np.array(starts, "datetime64[ns]"))
        assert store["complete"].values.tolist() == [1] * 3
        assert store["rainfall_rate"].dims == ("forecast_reference_time", "realization", "lead_time", "y", "x")
        assert all(f"{when}: {why}" in store.attrs["left_out"] for when, why in left_out.items())
        for number in (0, 2):
            alone = forecast(model, archive, until=starts[number], **options)
            assert alone["forecast_reference_time"] == np.datetime64(starts[number])
            mine = store.isel(forecast_reference_time=number)
            assert set(mine.coords) == set(alone.coords)
            xr.testing.assert_equal(mine.drop_vars("complete").load(), alone)
            assert mine["rainfall_rate"].attrs == alone["rainfall_rate"].attrs
        assert store.isel(forecast_reference_time=0)["rainfall_rate"].values.std() > 0


def test_what_is_done_is_kept_and_what_differs_is_refused(tmp_path, archive, model, scheduler):
    out, options = tmp_path / "out.zarr", {"scheduler": scheduler, "device": "cpu"}
    forecast_archive(model, archive, out, *SHORT, **options)
    whole, times = opened(out).load(), marked(out)
    assert len(times) == 3
    group = out / "complete" / "c"
    (group / "1").unlink()  # as if killed after the region and before its mark
    assert forecast_archive(model, archive, out, *SHORT, **options)["made"] == 1
    xr.testing.assert_identical(opened(out).load(), whole)
    again = marked(out)
    assert again.pop(1) > times.pop(1) and again == times
    assert drafts(tmp_path) == []

    def refused(text, model=model, data=archive, asked=SHORT, **more):
        with pytest.raises(ValueError, match=text):
            forecast_archive(model, data, out, *asked, **(options | more))
        assert marked(out) == again | {1: marked(out)[1]}

    refused("begun with `weights`", model=save_model(tmp_path / "other"))
    refused("begun with `lead` None, not '1h'", lead="1h")
    refused("begun with `end`", asked=(SHORT[0], f"{DAY}02:30", "10m"))
    rain(3, f"{DAY}01:20").to_netcdf(archive / "c.nc")
    refused("begun with `starts`")
    with FileLock(tmp_path / ".out.zarr.lock"):
        refused("another call writes")
    (tmp_path / "foreign.zarr").mkdir()
    with pytest.raises(ValueError, match="no store of an archive's forecasts"):
        forecast_archive(model, archive, tmp_path / "foreign.zarr", *SHORT, **options)


def test_a_start_that_cannot_be_forecast_is_tried_again(tmp_path, model, scheduler):
    data = rain(6)
    data["rain"][:5] = np.nan
    (tmp_path / "archive").mkdir()
    data.isel(time=slice(0, 3)).fillna(-1).to_netcdf(tmp_path / "archive" / "a.nc")  # negative rain
    data.isel(time=slice(3, 6)).to_netcdf(tmp_path / "archive" / "b.nc")
    summary = {}
    for kept in (0, 1):
        summary = forecast_archive(
            model, tmp_path / "archive", tmp_path / "out.zarr", f"{DAY}00:40", f"{DAY}00:50", "10m",
            scheduler=scheduler, device="cpu",
        )  # fmt: skip
        assert (summary["made"], summary["kept"]) == (1 - kept, kept)
        assert list(summary["left_out"]) == [f"{DAY}00:40:00"] and "negative" in str(summary["left_out"])
    assert opened(tmp_path / "out.zarr")["complete"].values.tolist() == [0, 1]
    assert opened(tmp_path / "out.zarr")["rainfall_rate"][0].isnull().all()


@pytest.mark.parametrize(
    "change, text",
    [
        ({"out": "out.nc"}, "must end in .zarr"),
        ({"data": np.zeros((3, 4, 4))}, "must be paths"),
        ({"end": f"{DAY}00:00", "start": f"{DAY}01:00"}, "must name times"),
        ({"every": "often"}, "`every`"),
        ({"start": "soon"}, "`start` must be a time"),
        ({"start": "2019-01-01", "end": "2019-01-01"}, "no start has the frames it needs"),
        ({"workers": 0}, "`workers`"),
        ({"lead": "7m"}, "`lead`"),
        ({"feature_extractor": object()}, "JSON"),
        ({"scheduler": "tcp://127.0.0.1:1"}, "cannot be reached"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, archive, model, change, text):
    with distributed_quick_to_give_up(), pytest.raises(ValueError, match=text):
        arguments = {"model": model, "data": archive, "out": "out.zarr", "start": ASKED[0], "end": ASKED[1]}
        arguments |= {"every": "10m"} | change
        forecast_archive(arguments.pop("model"), arguments.pop("data"), tmp_path / arguments.pop("out"), **arguments)


def distributed_quick_to_give_up():
    import dask

    return dask.config.set({"distributed.comm.timeouts.connect": "1s"})


def test_frames_up_to_a_time(archive):
    data = rain(9)
    assert observe(data, until=f"{DAY}00:45").time[-1] == np.datetime64(f"{DAY}00:40")
    files = observe(archive, until=f"{DAY}01:10")
    assert files.time[-1] == np.datetime64(f"{DAY}01:10") and len(files.time) == 8
    np.testing.assert_array_equal(files.read(slice(7, 8))[0], rain(8)["rain"][7])
    for late in ("01:20", "01:30"):
        with pytest.raises(ValueError, match="no frame at"):
            observe(archive, until=f"{DAY}{late}")
        with pytest.raises(ValueError, match="no frame at"):
            observe(rain(8), until=f"{DAY}{late}")
    with pytest.raises(ValueError, match="none is that early"):
        observe(archive, until="2020-05-31T00:00")


# ---------------------------------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------------------------------

FAR = ["--lead", "400m"]  # ten hops: time enough to kill
COMMAND = [sys.executable, "-m", "earthformer_hf.cli"]


def command(tmp_path, out, *more, asked=ASKED):
    times = ["--start", asked[0], "--end", asked[1], "--every", asked[2], "--device", "cpu"]
    return [*COMMAND, "archive", str(tmp_path / "archive"), "--model", str(tmp_path / "model"), "--out", str(out),
            *times, "--json", *more]  # fmt: skip


@pytest.fixture
def cluster(tmp_path):
    """Start processes of a cluster: a scheduler, or a worker of one; all are ended with the test."""
    started = []

    def start(*arguments, ready):
        log = (tmp_path / f"{len(started)}.log").open("w")
        process = subprocess.Popen([sys.executable, "-m", "distributed.cli." + arguments[0], *arguments[1:]],
                                   stdout=log, stderr=log, start_new_session=True)  # fmt: skip
        started.append(process)
        wait_for(lambda: ready in Path(log.name).read_text(), 120)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def start_cluster(start, tmp_path, port, workers=2):
    scheduler = start(
        "dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard", ready="Scheduler at"
    )
    address = f"tcp://127.0.0.1:{port}"
    options = ["--no-nanny", "--nthreads", "1", "--no-dashboard", "--local-directory", str(tmp_path)]
    return address, scheduler, [start("dask_worker", address, *options, ready="Registered") for _ in range(workers)]


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.02)


def free_port():
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def uninterrupted(tmp_path):
    with distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster:
        arguments = {"scheduler": cluster.scheduler_address, "device": "cpu", "lead": "400m"}
        forecast_archive(tmp_path / "model", tmp_path / "archive", tmp_path / "whole.zarr", *ASKED, **arguments)
    return opened(tmp_path / "whole.zarr").load()


def data_of(store):
    """Without the time at which it was made."""
    return store.drop_attrs(deep=False)


def drafts(tmp_path):
    """Locks and unfinished stores."""
    return [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_killed_client_goes_on(tmp_path, archive, model):
    out = tmp_path / "out.zarr"
    client = subprocess.Popen(command(tmp_path, out, "--workers", "2", *FAR), start_new_session=True)
    wait_for(lambda: len(marked(out)) >= 3, 240)
    os.kill(client.pid, signal.SIGKILL)
    client.wait()
    time.sleep(3)  # its workers see that it is gone
    before = marked(out)
    assert 3 <= len(before) < 11
    done = subprocess.run(command(tmp_path, out, "--workers", "2", *FAR), capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)
    assert (summary["made"], summary["kept"]) == (11 - len(before), len(before))
    after = marked(out)
    assert len(after) == 11 and {number: after[number] for number in before} == before
    assert drafts(tmp_path) == []
    xr.testing.assert_identical(data_of(opened(out).load()), data_of(uninterrupted(tmp_path)))


@pytest.mark.slow
def test_a_killed_worker_is_replaced_by_the_others(tmp_path, archive, model, cluster):
    address, _, workers = start_cluster(cluster, tmp_path, free_port())
    out = tmp_path / "out.zarr"
    client = subprocess.Popen(command(tmp_path, out, "--dask", address, *FAR), stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len(marked(out)) >= 3, 240)
    workers[0].kill()
    before = marked(out)
    summary = json.loads(client.communicate(timeout=240)[0])
    assert client.returncode == 0 and summary["made"] == 11
    after = marked(out)
    assert len(after) == 11 and {number: after[number] for number in before} == before
    assert drafts(tmp_path) == []
    xr.testing.assert_identical(data_of(opened(out).load()), data_of(uninterrupted(tmp_path)))


@pytest.mark.slow
def test_a_killed_scheduler_ends_the_call_and_the_next_goes_on(tmp_path, archive, model, cluster):
    address, scheduler, _ = start_cluster(cluster, tmp_path, free_port())
    out = tmp_path / "out.zarr"
    client = subprocess.Popen(command(tmp_path, out, "--dask", address, *FAR), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(marked(out)) >= 3, 240)
    scheduler.kill()
    _, errors = client.communicate(timeout=240)
    assert client.returncode == 1 and "error: `scheduler`: it was lost" in errors
    before = marked(out)
    assert len(before) < 11
    address, _, _ = start_cluster(cluster, tmp_path, free_port(), workers=1)
    done = subprocess.run(command(tmp_path, out, "--dask", address, *FAR), capture_output=True, text=True, check=True)
    after = marked(out)
    assert len(after) == 11 and {number: after[number] for number in before} == before
    assert json.loads(done.stdout)["kept"] >= len(before)
    assert drafts(tmp_path) == []
    xr.testing.assert_identical(data_of(opened(out).load()), data_of(uninterrupted(tmp_path)))


def test_the_command(tmp_path, archive, model, scheduler):
    arguments = command(tmp_path, tmp_path / "out.zarr", "--dask", scheduler, asked=SHORT)[len(COMMAND) :]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["made"] == 3
    done = CliRunner().invoke(app, [*arguments, "--lead", "1h"])
    assert done.exit_code == 1 and done.stderr.startswith("error: `--out`")


def test_a_worker_makes_a_forecast_as_this_process_does(tmp_path, archive, model, scheduler):
    options = {"lead": "1h"}
    found = forecast_on(scheduler, model, str(archive), **options)
    expected = forecast(model, str(archive), **options)
    xr.testing.assert_allclose(found, expected)
    assert found.attrs["weights_sha256"] == expected.attrs["weights_sha256"]
    with pytest.raises(ValueError, match="`lead` must be a multiple"):
        forecast_on(scheduler, model, str(archive), **options | {"lead": "7s"})
    command = ["forecast", str(archive), "--model", str(model), "--out", str(tmp_path / "a.nc"), "--dask", scheduler]
    done = CliRunner().invoke(app, [*command, "--lead", "1h"])
    assert done.exit_code == 0, done.output
    np.testing.assert_allclose(xr.load_dataset(tmp_path / "a.nc").rainfall_rate, expected.rainfall_rate, rtol=1e-5)


PROTOCOL = """
name: mine
source: own data
dataset: folder
options: {fractions: [0, 0, 1]}
split: test
independent: id
context_length: 3
prediction_length: 4
window_stride: 1
frame_stride: 1
scores: [contingency, errors]
thresholds: [0.5, 2]
value_range: 1.0
pools: []
neighbourhoods: []
average: pooled
missing: none
baselines: [persistence]
"""


@pytest.mark.slow
def test_a_store_is_scored_as_its_model_is(tmp_path, archive, model, scheduler):
    out, protocol = tmp_path / "out.zarr", tmp_path / "mine.yaml"
    protocol.write_text(PROTOCOL)
    forecast_archive(model, archive, out, *ASKED, scheduler=scheduler, device="cpu")

    def scores(what, **options):
        folder = tmp_path / Path(what).name.replace(".", "-")
        run_protocol(what, str(protocol), archive, output=folder, **options)
        return json.loads((folder / "scores.json").read_text())

    alone, stored = scores(model), scores(out)
    assert stored["windows"] == alone["windows"] == 2 + 3
    assert stored["scores"] == alone["scores"]
    assert list(stored["forecasts"]) == ["model_id", "weights_sha256"]
    (out / "complete" / "c" / "1").unlink()
    assert scores(out)["windows"] == 4  # what is not there is not scored

    def refused(text, store=out, **changes):
        fields = yaml.safe_load(PROTOCOL) | changes
        protocol.write_text(yaml.safe_dump(fields))
        with pytest.raises(ValueError, match=text):
            run_protocol(store, str(protocol), archive)

    refused("has 2 of 20m", prediction_length=2, frame_stride=2)
    refused("has 5 of 10m", prediction_length=5)
    refused(
        "holds maps .4, 20, 28., the data of .mine. are .4, 16, 16.",
        options={"fractions": [0, 0, 1], "crop": [0, 16, 0, 16]},
    )
    rain(9, "2020-06-02T00:00").to_netcdf(archive / "c.nc")
    refused("holds no forecast from a window", options={"fractions": [0, 0, 1], "pattern": "c.nc"})
    forecast(model, archive).expand_dims("forecast_reference_time").to_zarr(tmp_path / "other.zarr", zarr_format=3)
    refused("must be a store of an archive's forecasts", tmp_path / "other.zarr")
