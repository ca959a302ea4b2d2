"""A web service of one model: frames come as NetCDF or JSON, a forecast goes back as NetCDF or PNG.

```
request -> place in the queue -> upload, bounded -> check -> the one thread that forecasts -> answer
           503 if it is full     413                400      504 if it takes too long
```
"""

import asyncio
import io
import json
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, HTTPException, Query, Request, Response
from pydantic import BaseModel, Field

from ..data.guards import check_files, open_dataset
from ..errors import one_line
from ..pipeline_prediff import PreDiffPipeline
from .files import save
from .forecast import forecast
from .nowcasters import describe, load_nowcaster


NETCDF, PNG, JSON = "application/x-netcdf", "image/png", "application/json"
FILES = (NETCDF, "application/netcdf", "application/octet-stream")
ABOUT_VALUES = {"units", "time_step", "grid_spacing", "crs", "start"}
RETRY_AFTER = 5  # seconds
BODY = {
    "required": True,
    "content": {
        NETCDF: {"schema": {"type": "string", "format": "binary"}},
        JSON: {
            "schema": {
                "type": "object",
                "required": ["values"],
                "properties": {"values": {"type": "array", "description": "(T, H, W), null where missing"}}
                | {name: {"type": "string"} for name in sorted(ABOUT_VALUES)},
            }
        },
    },
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in (NETCDF, PNG)}},
    400: {"description": "data or options that cannot work, in one line"},
    413: {"description": "the upload is too large"},
    415: {"description": "neither NetCDF nor JSON"},
    503: {"description": "the queue is full; `Retry-After` says when to come again"},
    504: {"description": "it took too long"},
}


class Asked(BaseModel, extra="forbid"):
    """Of [`~earthformer_hf.forecasting.forecast`], in the query of a request."""

    lead: str | None = None
    ensemble: int = Field(8, ge=1, le=256)
    steps: int | None = Field(None, ge=1, le=1000)
    seed: int = 0
    threshold: list[float] = []
    neighbourhood: str | None = None
    mean: bool = False
    percentile: list[float] = []
    members: bool = True
    grid: Literal["input", "model"] = "input"
    coarsen_to: str | None = None
    resample_time: str | None = None
    variable: str | None = None
    format: Literal["netcdf", "png"] | None = Field(None, description="of the answer; else the Accept header's")

    def options(self) -> dict[str, Any]:
        """As arguments of `forecast`."""
        names = {"ensemble": "ensemble_size", "steps": "num_inference_steps"}
        names |= {"threshold": "thresholds", "percentile": "percentiles"}
        return {names.get(name, name): value for name, value in self.model_dump(exclude={"format"}).items()}


class Stopped(Exception):
    """A forecast that nobody waits for."""


class Worker:
    """One model in memory, and one thread that forecasts with it.

    Args:
        model: see [`~earthformer_hf.forecasting.forecast`].
        device: where it computes.
        max_queue: requests at once, with the one that is forecast.
    """

    def __init__(self, model: Any, device: str | None, max_queue: int):
        self.nowcaster = load_nowcaster(model, None, device)
        self.thread, self.max_queue, self.queued = ThreadPoolExecutor(1), max_queue, 0
        self.stop = threading.Event()  # of the forecast that is made
        network = self.nowcaster.model
        network = network.unet if isinstance(network, PreDiffPipeline) else network
        network.register_forward_pre_hook(self._check)

    def _check(self, *_: Any) -> None:
        if self.stop.is_set():
            raise Stopped

    async def __aenter__(self) -> None:
        if self.queued >= self.max_queue:
            raise HTTPException(503, "the queue is full.", {"Retry-After": str(RETRY_AFTER)})
        self.queued += 1

    async def __aexit__(self, *_: Any) -> None:
        self.queued -= 1

    async def run(self, *arguments: Any) -> bytes:
        """The answer to one request; one that is not awaited any more stops."""
        stop = threading.Event()

        def work() -> bytes:
            self.stop = stop
            try:
                self._check()
                return _answer(self.nowcaster, *arguments)
            finally:
                self.stop = threading.Event()  # the model is free again, also for others

        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, work)
        finally:
            stop.set()


def service(
    model: Any,
    *,
    device: str | None = "auto",
    max_queue: int = 16,
    max_upload: int = 128 * 2**20,
    timeout: float = 300.0,
    max_memory: str = "4GB",
) -> FastAPI:
    """An application that forecasts on request: `POST /forecast`, `GET /health`, and its description at `/docs`.

    Args:
        model: a folder, a hub id, an [`EarthformerForPrediction`] or a [`PreDiffPipeline`]; one in memory.
        device: where it computes; the best there is if "auto".
        max_queue: requests at once; a further one is answered 503.
        max_upload: bytes of a request.
        timeout: seconds from the first byte of a request to its answer.
        max_memory: for the arrays of a forecast, such as "4GB".

    Raises:
        ValueError: no such model, or limits that are not above 0.
    """
    for name, limit in {"max_queue": max_queue, "max_upload": max_upload, "timeout": timeout}.items():
        if not limit > 0:
            raise ValueError(f"`{name}` must be above 0, got {limit!r}.")
    worker = Worker(model, device, max_queue)
    facts = describe(worker.nowcaster)
    app = FastAPI(title="Forecasts by earthformer_hf", description="\n\n".join(f"{k}: {v}" for k, v in facts.items()))
    app.state.worker = worker

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether it is there, which model it has, and how many requests it works on."""
        return {"status": "ok", "model": facts["model"], "weights": facts["weights"], "queued": worker.queued}

    @app.post("/forecast", response_class=Response, responses=ANSWERS, openapi_extra={"requestBody": BODY})
    async def forecast_request(request: Request, asked: Annotated[Asked, Query()]) -> Response:
        """What follows the last of the frames that are sent."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in (JSON, *FILES):
            raise HTTPException(415, f"send {JSON}, {NETCDF} or application/octet-stream, got {kind!r}.")
        png = asked.format == "png" or (asked.format is None and PNG in request.headers.get("accept", ""))
        options = asked.options() | {"max_memory": max_memory}
        try:
            async with worker, asyncio.timeout(timeout):
                with tempfile.TemporaryDirectory(prefix="earthformer-", ignore_cleanup_errors=True) as folder:
                    path = Path(folder) / "upload.nc"
                    await _receive(request, path, max_upload)
                    if kind != JSON and (problems := await asyncio.to_thread(check_files, [path])):
                        raise HTTPException(400, f"the file {problems[path]}.")
                    answer = await worker.run(path, kind == JSON, png, options)
        except TimeoutError:
            raise HTTPException(504, f"the forecast took more than {timeout:g} s.") from None
        except ValueError as reason:
            raise HTTPException(400, one_line(reason)) from None
        return Response(answer, media_type=PNG if png else NETCDF)

    return app


async def _receive(request: Request, path: Path, limit: int) -> None:
    """Write the body of a request to a file."""
    total = 0
    with path.open("wb") as file:
        async for chunk in request.stream():
            total += len(chunk)
            if total > limit:
                raise HTTPException(413, f"at most {limit} bytes are taken.")
            file.write(chunk)


def _answer(nowcaster: Any, path: Path, is_json: bool, png: bool, options: dict[str, Any]) -> bytes:
    data, about = _values_of(path.read_bytes()) if is_json else (_loaded(path), {})
    dataset = forecast(nowcaster, data, **(options | about))
    if png:
        return _picture(dataset)
    out = path.with_name("answer.nc")
    save(dataset, out)
    return out.read_bytes()


def _loaded(path: Path) -> Any:
    with open_dataset(path, decode_times=False) as dataset:
        return dataset.load()


def _values_of(body: bytes) -> tuple[np.ndarray, dict[str, str]]:
    """Frames of a JSON body, (T, H, W), and what it says of them."""
    try:
        found = json.loads(body)
        values = np.array(found.pop("values"), "float32")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise ValueError("the body must be a JSON object with `values`, numbers (T, H, W), null if missing.") from None
    if unknown := sorted(set(found) - ABOUT_VALUES):
        raise ValueError(f"the body may hold {sorted(ABOUT_VALUES)}, got {unknown}.")
    return values, {name: str(value) for name, value in found.items() if value is not None}


def _picture(dataset: Any) -> bytes:
    from ..plotting import plot_forecast

    picture = io.BytesIO()
    plot_forecast(dataset).savefig(picture, format="png")
    return picture.getvalue()


__all__ = ["service"]
