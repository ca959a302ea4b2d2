"""Simulated weather, ocean and land, for examples, tests and benchmarks where no real data is at hand.

None is meant to be realistic; all move, grow and decay in ways that a forecast can learn or fail at.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .events import EventBuilder, EventConfig, Facts


def rain_events(count: int, length: int = 25, size: int = 128, seed: int = 0, minutes: int = 2) -> list[dict]:
    """Rain that drifts, grows and decays: `values` (length, size, size) in mm/h, float32, so many minutes apart.

    A Gaussian random field with a power spectrum falling as k^-3 drifts at a constant velocity of up to 1.5 pixels a
    frame, while a slow second field blends in; rain falls where the field exceeds a threshold, and all intensities
    wax or wane by a common factor.
    """
    events = []
    for i in range(count):
        random = np.random.default_rng([seed, i])
        first, second = (_smooth_field(random, size) for _ in range(2))
        velocity, growth = random.uniform(-1.5, 1.5, 2), random.uniform(-0.5, 0.5)
        frequency = np.fft.fftfreq(size)
        values = np.empty((length, size, size), "float32")
        for t in range(length):
            phase = np.exp(-2j * np.pi * t * (velocity[0] * frequency[:, None] + velocity[1] * frequency))
            turn = 0.5 * np.pi * t / max(length, 25)
            field = np.fft.ifft2(np.fft.fft2(np.cos(turn) * first + np.sin(turn) * second) * phase).real
            values[t] = np.where(field > 0.8, 0.3 * np.exp(1.6 * (field - 0.8) + growth * t / length), 0)
        time = np.datetime64("2000-01-01T00:00", "m") + minutes * np.arange(length)
        events.append(
            {"id": f"simulated-rain:{seed}:{i}", "time": time, "values": values, "geo": {"minutes": minutes}}
        )
    return events


def _smooth_field(random: np.random.Generator, size: int) -> np.ndarray:
    """A periodic Gaussian field (size, size) with mean 0, variance 1 and power spectrum k^-3."""
    wave_number = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)) * size
    amplitude = np.where(wave_number > 1, np.maximum(wave_number, 1) ** -1.5, 0)
    field = np.fft.ifft2(np.fft.fft2(random.standard_normal((size, size))) * amplitude).real
    return field / field.std()


def sst_events(years: int = 60, seed: int = 0) -> list[dict]:
    """An El Nino that swings: one event, `values` (12 * years, 24, 48) anomalies in degrees Celsius, NaN on land.

    A damped oscillator of two variables with a period of about four years, driven by noise that is strongest in
    northern autumn, multiplies two fixed maps (a warm tongue and a heat content to its west); weather noise is added.
    """
    random = np.random.default_rng(seed)
    decay, angle = 0.97, 2 * np.pi / 48
    step = decay * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    state, series = np.zeros(2), np.empty((12 * years, 2))
    for month in range(12 * years):
        season = 1 + 0.6 * np.cos(2 * np.pi * (month % 12 - 9) / 12)
        state = step @ state + random.normal(0, 0.18 * season, 2)
        series[month] = state
    lat, lon = np.arange(-55, 65, 5.0), np.arange(95, 335, 5.0)
    belt = np.exp(-((lat[:, None] / 12) ** 2))
    tongue, west = (belt * np.exp(-(((lon - centre) / width) ** 2)) for centre, width in ((220, 40), (160, 30)))
    values = series[:, 0, None, None] * tongue + 0.5 * series[:, 1, None, None] * west
    values = (values + random.normal(0, 0.1, values.shape)).astype("float32")
    values[:, (np.abs(lat)[:, None] > 25) | (lon < 185) | (lon > 285)] = np.nan
    time = np.datetime64("1900-01", "M") + np.arange(12 * years)
    return [{"id": f"simulated-sst:{seed}", "time": time, "values": values, "geo": {"lat": lat, "lon": lon}}]


def land_event(i: int, length: int = 30, size: int = 32, seed: int = 0) -> dict:
    """Plants that follow the weather, in the layout of EarthNet2021: a frame every 5 days.

    Vegetation grows with rain that fell on warm days, most on low ground, and withers by itself; red light falls and
    near infrared rises with it. Clouds, a smooth field above a threshold, hide a third of the pixels.

    Returns:
        An event with `values` (length, size, size, 4) float32, blue, green, red and near infrared in 0..1, `observed`
        (length, size, size), and `covariates` (length, size, size, 7) float32 in the order of EarthNet2021: elevation,
        precipitation, pressure, mean, minimum and maximum temperature, coarse elevation.
    """
    random = np.random.default_rng([seed, i])
    height = 0.5 + 0.2 * _smooth_field(random, size)
    soil = 0.15 + 0.02 * _smooth_field(random, size)
    day = random.integers(365) + 5 * np.arange(length)
    warm = 0.5 - 0.3 * np.cos(2 * np.pi * day / 365) + 0.05 * random.standard_normal(length)
    rain = np.maximum(random.gamma(0.7, 0.4, length) - 0.1, 0)
    plants = np.empty((length, size, size))
    state = np.full((size, size), random.uniform(0.2, 0.7))
    for t in range(length):
        growth = 0.5 * rain[t] * np.clip(warm[t], 0, 1) * np.clip(1.2 - height, 0, 1)
        state = state + growth * (1 - state) - 0.06 * state
        plants[t] = state
    bands = [0.3 * soil + 0 * plants, soil - 0.05 * plants, soil * (1 - 0.8 * plants), soil + 0.35 * plants]
    values = np.stack(bands, axis=-1) + random.normal(0, 0.005, (length, size, size, 4))
    clouds = np.stack([_smooth_field(random, size) > 0.4 for _ in range(length)])
    weather = [rain, 0.5 - 0.2 * rain, warm, warm - 0.1, warm + 0.1]
    fields = [height, *(x[:, None, None] for x in weather), np.full((size, size), height.mean())]
    covariates = np.stack([np.broadcast_to(field, (length, size, size)) for field in fields], axis=-1)
    return {
        "id": f"simulated-land:{seed}:{i}",
        "time": np.datetime64("2000-01-01", "D") + day.astype("timedelta64[D]"),
        "values": np.where(clouds[..., None], 1.0, values.clip(0, 1)).astype("float32"),
        "observed": ~clouds,
        "covariates": covariates.astype("float32"),
        "geo": {},
    }


@dataclass
class SimulatedLandConfig(EventConfig):
    """Options of simulated land.

    Args:
        sizes: events of train, val and test.
        size: pixels of a side.
    """

    sizes: tuple[int, int, int] = (400, 40, 40)
    size: int = 32


class SimulatedLand(EventBuilder):
    """Events of [`land_event`], each made when it is read: something to learn where EarthNet2021 is absent."""

    NAME = "simulated-land"
    NEEDS_FILES = False
    BUILDER_CONFIG_CLASS = SimulatedLandConfig
    FACTS = Facts(
        variable="simulated surface reflectance: blue, green, red, near infrared",
        units="1",
        coding="0..1",
        time_step="5D",
        grid="square, 32 pixels a side",
        licence="none needed: nothing was observed",
        citation="none",
        splits="by number; no event is in two splits",
        source="made when it is read",
        feature_extractor={"fill_value": 0, "valid_range": (0, 1)},
    )

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        seed = self.SPLITS.index(split)
        for i in range(self.config.sizes[seed]):
            event = land_event(i, size=self.config.size, seed=seed)
            reference = {"i": i, "size": self.config.size, "seed": seed}
            yield {name: event[name] for name in ("id", "time", "geo")} | {"reference": reference}

    @staticmethod
    def read(reference: dict[str, Any]) -> dict[str, Any]:
        event = land_event(reference["i"], size=reference["size"], seed=reference["seed"])
        return {name: event[name] for name in ("values", "observed", "covariates")}


__all__ = ["SimulatedLand", "SimulatedLandConfig", "land_event", "rain_events", "sst_events"]
