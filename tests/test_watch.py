"""A folder is watched: one forecast for each new frame, whatever is late, missing or half written."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import xarray as xr
from archive_data import rain, save_model
from filelock import FileLock
from typer.testing import CliRunner

from earthformer_hf.cli import app
from earthformer_hf.forecasting import forecast
from earthformer_hf.forecasting.watch import Watch, watch


FRAMES = rain(9)


def put(folder, *numbers):
    """Frames as files of their own."""
    folder.mkdir(exist_ok=True)
    for number in numbers:
        FRAMES.isel(time=[number]).to_netcdf(folder / f"radar_{number}.nc")


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


@pytest.fixture
def lines():
    return []


@pytest.fixture
def watched(tmp_path, model, lines):
    put(tmp_path / "radar", 0, 1, 2)
    return Watch(model, tmp_path / "radar", tmp_path / "out", lines.append, "cpu")


def made(tmp_path):
    return sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("."))


def test_a_new_frame_is_forecast_from_once(tmp_path, watched, model, lines):
    path = watched.look()
    assert path.name == "forecast_20200601T002000.nc"
    xr.testing.assert_equal(xr.load_dataset(path), forecast(model, FRAMES.isel(time=slice(0, 3))))
    changed = path.stat().st_mtime_ns
    assert watched.look() is None and len(lines) == 1
    os.utime(tmp_path / "radar" / "radar_2.nc")  # changed, and no new frame
    assert watched.look() is None
    again = Watch(model, tmp_path / "radar", tmp_path / "out", lines.append, "cpu")  # as after a restart
    assert again.look() is None and "waiting for frames after 2020-06-01T00:20:00" in lines[-1]
    assert path.stat().st_mtime_ns == changed
    put(tmp_path / "radar", 3)
    assert watched.look().name == "forecast_20200601T003000.nc"
    assert made(tmp_path) == ["forecast_20200601T002000.nc", "forecast_20200601T003000.nc"]


def test_a_missing_frame_is_told_and_waited_for(tmp_path, watched, lines):
    watched.look()
    put(tmp_path / "radar", 4)  # 3 is missing
    for _ in range(2):
        assert watched.look() is None
    assert len(lines) == 2 and lines[1].startswith("waiting: ") and "3 frames without a hole" in lines[1]
    put(tmp_path / "radar", 3)  # it was late
    assert watched.look().name == "forecast_20200601T004000.nc"
    put(tmp_path / "radar", 6, 7, 8)  # 5 never comes
    assert watched.look().name == "forecast_20200601T012000.nc"


def test_a_half_written_file_is_told_and_waited_for(tmp_path, watched, lines, caplog):
    watched.look()
    put(tmp_path / "radar", 3)
    path = tmp_path / "radar" / "radar_3.nc"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert watched.look() is None and "radar_3.nc" in caplog.text
    path.write_bytes(whole)
    assert watched.look().name == "forecast_20200601T003000.nc"


def test_nothing_but_its_own_files_is_left(tmp_path, watched):
    watched.look()
    assert {path.name for path in (tmp_path / "out" / ".watch" / "cache").iterdir()} <= {"earthformer_hf_listings"}
    assert sorted(path.name for path in (tmp_path / "radar").iterdir()) == [f"radar_{n}.nc" for n in range(3)]


def test_it_looks_until_it_is_stopped(tmp_path, watched, lines):
    stop, found = threading.Event(), []
    thread = threading.Thread(target=lambda: found.extend(watch(watched, "1s", stop)))
    thread.start()
    end = time.monotonic() + 30
    while not made(tmp_path) and time.monotonic() < end:
        time.sleep(0.05)
    with pytest.raises(ValueError, match="another process writes"):
        next(watch(watched, "1s"))
    stop.set()
    thread.join(30)
    assert not thread.is_alive() and [path.name for path in found] == ["forecast_20200601T002000.nc"]


@pytest.mark.parametrize(
    "change, text",
    [
        ({"folder": "nowhere"}, "`folder`"),
        ({"out": "radar/out"}, "`out` must not lie within"),
        ({"model": "radar"}, "no weights"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, model, change, text):
    put(tmp_path / "radar", 0)
    places = {"model": "model", "folder": "radar", "out": "out"} | change
    with pytest.raises(ValueError, match=text):
        Watch(*(tmp_path / name for name in places.values()), print, "cpu")


def test_frames_without_dates_are_told(tmp_path, model, lines):
    (tmp_path / "radar").mkdir()
    np.save(tmp_path / "radar" / "a.npy", FRAMES["rain"].values)
    assert Watch(model, tmp_path / "radar", tmp_path / "out", lines.append, "cpu").look() is None
    assert len(lines) == 1 and lines[0].startswith("waiting: ")


def arguments(tmp_path, *more):
    places = [str(tmp_path / "radar"), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    return ["watch", *places, "--device", "cpu", *more]


def test_the_command_once(tmp_path, watched):
    for word in ("written", "is there"):
        done = CliRunner().invoke(app, arguments(tmp_path, "--once", "--lead", "1h"))
        assert done.exit_code == 0 and word in done.stdout, done.output
    assert xr.load_dataset(tmp_path / "out" / made(tmp_path)[0]).sizes["lead_time"] == 6
    done = CliRunner().invoke(app, arguments(tmp_path, "--once", "--units", "K"))
    assert done.exit_code == 1 and "waiting: " in done.stdout  # cron is told
    with FileLock(tmp_path / "out" / ".watch" / "lock"):
        done = CliRunner().invoke(app, arguments(tmp_path, "--once"))
    assert done.exit_code == 1 and "error: `--out`: another process writes" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command(tmp_path, watched, number):
    command = [sys.executable, "-m", "earthformer_hf.cli", *arguments(tmp_path, "--interval", "1s")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not made(tmp_path) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and out.endswith("ended\n") and "Traceback" not in errors
    assert made(tmp_path) == ["forecast_20200601T002000.nc"]
