"""The web service: each answer is that of its own request, and too much or too bad is refused."""

import asyncio
import io
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import xarray as xr
from archive_data import EXTRACTOR, rain, save_model
from tiny import tiny_model, tiny_pipeline

from earthformer_hf.forecasting import forecast


pytest.importorskip("fastapi")
from earthformer_hf.forecasting import service as module
from earthformer_hf.forecasting.service import service


NETCDF = {"content-type": "application/x-netcdf"}
ABOUT = {"units": "mm/h", "time_step": "10m", "grid_spacing": "3 km"}


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


@pytest.fixture
def app(model):
    return service(model, device="cpu", max_upload=10**6, max_queue=3)


def upload(tmp_path, seed=0, frames=3):
    path = tmp_path / f"{seed}-{frames}.nc"
    rain(frames, seed=seed).to_netcdf(path)
    return path.read_bytes()


async def ask(app, *requests):
    """Answers to (method, path, options) that are sent at once."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await asyncio.gather(*(client.request(method, path, **options) for method, path, options in requests))


def post(app, content, path="/forecast", headers=NETCDF, **options):
    return asyncio.run(ask(app, ("POST", path, {"content": content, "headers": headers} | options)))[0]


def dataset_of(answer):
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-netcdf"
    return from_bytes(answer.content)


def from_bytes(content):
    with tempfile.NamedTemporaryFile(suffix=".nc") as file:
        file.write(content)
        file.flush()
        return xr.load_dataset(file.name)


def test_netcdf_and_json_give_the_forecast(tmp_path, app, model):
    expected = forecast(model, rain(5), lead="1h")
    found = dataset_of(post(app, upload(tmp_path, frames=5), "/forecast?lead=1h"))
    xr.testing.assert_equal(found, expected)
    assert found.sizes["lead_time"] == 6 and found.attrs["weights_sha256"] == expected.attrs["weights_sha256"]
    values = rain(5)["rain"].values
    values[-1, 0, 0] = np.nan
    lists = [[[None if np.isnan(v) else float(v) for v in row] for row in frame] for frame in values]
    found = dataset_of(post(app, None, headers={}, json={"values": lists, **ABOUT}))
    expected = forecast(model, values, **ABOUT)
    np.testing.assert_array_equal(found["rainfall_rate"], expected["rainfall_rate"])
    assert found["rainfall_rate"][:, 0, 0].isnull().all() and found["rainfall_rate"][:, 1, 1].notnull().all()


def test_options_reach_a_pipeline(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.register_modules(feature_extractor=EXTRACTOR)
    query = "/forecast?ensemble=3&steps=2&seed=5&threshold=0.5&threshold=1&grid=model"
    found = dataset_of(post(service(pipeline, device="cpu"), upload(tmp_path), query))
    options = {"ensemble_size": 3, "num_inference_steps": 2, "seed": 5, "thresholds": (0.5, 1.0)}
    xr.testing.assert_equal(found, forecast(pipeline, rain(3), **options))


@pytest.mark.parametrize("path, headers", [("/forecast?format=png", {}), ("/forecast", {"accept": "image/png"})])
def test_a_picture(tmp_path, app, path, headers):
    answer = post(app, upload(tmp_path), path, NETCDF | headers)
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    from matplotlib.image import imread

    picture = imread(io.BytesIO(answer.content))
    assert picture.std() > 0.05 and min(picture.shape[:2]) > 100


@pytest.mark.parametrize(
    "content, path, headers, status, text",
    [
        (b"\x89HDF\r\n\x1a\n" + bytes(999), "/forecast", NETCDF, 400, "the file"),
        (b"not a file", "/forecast", NETCDF, 400, "begins with"),
        (b"", "/forecast", NETCDF, 400, "begins with"),
        (bytes(10**6 + 1), "/forecast", NETCDF, 413, "at most 1000000 bytes"),
        (b"[" * 100_000, "/forecast", {"content-type": "application/json"}, 400, "`values`"),
        (b'{"values": [[1], [2, 3]]}', "/forecast", {"content-type": "application/json"}, 400, "`values`"),
        (b'{"values": [[[1]]], "path": "/etc"}', "/forecast", {"content-type": "application/json"}, 400, "'path'"),
        (b'{"values": [[[1]]]}', "/forecast", {"content-type": "application/json"}, 400, "`units`"),
        (b"", "/forecast", {"content-type": "text/html"}, 415, "text/html"),
        (None, "/forecast?lead=7m", NETCDF, 400, "`lead`"),
        (None, "/forecast?threshold=1", NETCDF, 400, "ensemble"),
        (None, "/forecast?ensemble=0", NETCDF, 422, "ensemble"),
        (None, "/forecast?grid=other", NETCDF, 422, "grid"),
        (None, "/forecast?lead=100000h", NETCDF, 400, "`max_memory`"),
    ],
)
def test_what_cannot_work_is_said(tmp_path, app, content, path, headers, status, text):
    answer = post(app, upload(tmp_path) if content is None else content, path, headers)
    assert answer.status_code == status, answer.text
    detail = answer.json()["detail"]
    assert text in str(detail) and (status == 422 or "\n" not in detail)
    assert app.state.worker.queued == 0
    assert post(app, upload(tmp_path)).status_code == 200  # it goes on


def test_the_queue_has_a_limit_and_health_answers_meanwhile(tmp_path, app, monkeypatch):
    go, answer = threading.Event(), module._answer
    monkeypatch.setattr(module, "_answer", lambda *arguments: go.wait(60) and answer(*arguments))
    requests = [("POST", "/forecast", {"content": upload(tmp_path), "headers": NETCDF})] * 5

    async def all_at_once():
        tasks = asyncio.create_task(ask(app, *requests))
        while app.state.worker.queued < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        health = (await ask(app, ("GET", "/health", {})))[0].json()
        go.set()
        return health, await tasks

    health, answers = asyncio.run(all_at_once())
    assert health["status"] == "ok" and health["queued"] == 3 and health["model"] == "model"
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 503, 503]
    assert all(answer.headers["retry-after"] == "5" for answer in answers if answer.status_code == 503)
    assert app.state.worker.queued == 0


def test_a_forecast_that_takes_too_long_is_stopped(tmp_path):
    model = tiny_model()
    app = service_of(model, timeout=1.0)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(time.monotonic()) or time.sleep(0.3))
    answer = post(app, upload(tmp_path), "/forecast?lead=4000m")  # 100 hops
    assert answer.status_code == 504 and "more than 1 s" in answer.json()["detail"]
    time.sleep(1)
    assert len(calls) < 10
    app.state.worker.thread.submit(lambda: None).result(10)  # its thread is free


def service_of(model, **options):
    from earthformer_hf.forecasting.nowcasters import load_nowcaster

    return service(load_nowcaster(model, EXTRACTOR), device="cpu", **options)


def test_it_describes_itself(app):
    schema, page = asyncio.run(ask(app, ("GET", "/openapi.json", {}), ("GET", "/docs", {})))
    assert page.status_code == 200
    body = schema.json()["paths"]["/forecast"]["post"]
    assert {"application/x-netcdf", "application/json"} == set(body["requestBody"]["content"])
    assert {"200", "400", "413", "415", "503", "504"} <= set(body["responses"])
    assert "20 x 28 pixels of 3 km" in schema.json()["info"]["description"]


@pytest.mark.parametrize("limit", ["max_queue", "max_upload", "timeout"])
def test_limits_are_above_0(model, limit):
    with pytest.raises(ValueError, match=f"`{limit}` must be above 0"):
        service(model, **{limit: 0})


def memory_of(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_200_requests_from_16_clients(tmp_path, model):
    """None lost, none mixed up, and no memory kept."""
    port = free_port()
    command = [sys.executable, "-m", "earthformer_hf.cli", "serve", "--model", str(model), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*command, "--device", "cpu"], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=240) as client:
            wait_until_healthy(client)
            bodies = [upload(tmp_path, seed) for seed in range(20)]
            serial = [dataset_of(client.post("/forecast", content=body, headers=NETCDF)) for body in bodies]
            assert not serial[0].equals(serial[1])

            def send(number):
                answer = client.post("/forecast", content=bodies[number % 20], headers=NETCDF)
                return number, answer.status_code, answer.content

            def round_of(requests):
                with ThreadPoolExecutor(16) as clients:
                    return list(clients.map(send, range(requests)))

            round_of(60)  # what libraries keep
            before, begin = memory_of(server.pid), time.monotonic()
            answers = round_of(200)
            seconds, grown = time.monotonic() - begin, memory_of(server.pid) - before
        assert [status for _, status, _ in answers] == [200] * 200
        for number, _, content in answers:
            xr.testing.assert_equal(from_bytes(content), serial[number % 20])
        assert grown < 20e6, f"{grown / 1e6:.1f} MB more"
        sys.stderr.write(f"200 requests in {seconds:.1f} s, {grown / 1e6:+.1f} MB\n")
    finally:
        server.terminate()
        assert server.wait(60) is not None


def wait_until_healthy(client):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise TimeoutError("no service")


def free_port():
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
