"""Evaluation protocols: what exactly a score means. A protocol is data; `examples/evaluate.py` runs it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RainProtocol:
    """Windows of radar frames; counts pooled over pixels, lead times and windows before any ratio is taken."""

    name: str
    score_name: str
    file: str
    split: str
    sources: tuple[str, ...]
    window_stride: int
    description: str
    frame_stride: int = 1


@dataclass(frozen=True)
class IndexProtocol:
    """Windows of months; correlation and error of three-month means of an ocean index, per lead, then averaged."""

    name: str
    score_name: str
    file: str
    train_split: str
    validation_split: str
    split: str
    description: str


PROTOCOLS: dict[str, RainProtocol | IndexProtocol] = {
    protocol.name: protocol
    for protocol in (
        RainProtocol(
            name="mrms-24min",
            score_name="CSI-M (rain-derived proxy, 24 min)",
            file="radar_open_3km.h5",
            split="test",
            sources=("mrms",),
            window_stride=4,
            description="165 windows of 25 two-minute frames, 128 x 128 at 3 km, Georgia and Florida, 2019-06-10 "
            "00:00-01:10 UTC; pixels with radar coverage; an event is a proxy code of at least the threshold; "
            "CSI pooled, CSI-M the mean of the six thresholds; MSE of the code divided by 255",
        ),
        RainProtocol(
            name="mrms-24min-ensemble",
            score_name="fair CRPS (rain-derived proxy code / 255, 4 to 24 min)",
            file="radar_open_3km.h5",
            split="test",
            sources=("mrms",),
            window_stride=4,
            frame_stride=2,
            description="the 165 windows of mrms-24min, every other frame: 7 of context, 6 to forecast, 4 minutes "
            "apart; pixels with radar coverage; fair CRPS of the code divided by 255, mean over pixels; CSI and MSE "
            "of the ensemble's mean; dressed persistence: the last frame plus errors that persistence made on "
            "training windows, drawn with seed 0, clipped at 0",
        ),
        IndexProtocol(
            name="nino34-12-months",
            score_name="Nino3.4 correlation skill (three-month means, 12 leads)",
            file="sst_kaplan_1856_2014.nc",
            train_split="train",
            validation_split="val",
            split="test",
            description="every window of 12 + 14 months within 1993-2014, Kaplan anomalies; index = plain mean over "
            "latitude -5..5, longitude 190..240; correlation and RMSE over windows per lead, averaged over leads",
        ),
    )
}
