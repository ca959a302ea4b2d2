"""Evaluation protocols: what exactly a score means. A protocol is data; `evaluate.py` runs it.

Two scores compare if their protocols are the same in every field, which is what `Protocol.hash` stands for. Those of
`PROTOCOLS` have names; one for other data is a YAML file with the same fields, see `own_protocol.py`.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..data.file_times import parsed_step
from ..data.measures import UNKNOWN
from .metrics import check_thresholds


# Families of scores, see `metrics_of` in `tally.py`.
FAMILIES = (
    "contingency", "errors", "ssim", "fss", "spectrum", "ensemble", "ranks", "probabilities", "nino34", "earthnet",
)  # fmt: skip
OF_ENSEMBLES = ("ensemble", "ranks", "probabilities")
OF_THRESHOLDS = ("contingency", "fss", "probabilities")

# Forecasts without a neural network, see `baselines.py` -> what they forecast: maps, an ensemble of maps, or the
# Nino3.4 index.
BASELINES = {
    "persistence": "maps",
    "last clear value": "maps",
    "dressed persistence": "ensemble",
    "advection": "maps",
    "extrapolation": "maps",
    "s-prog": "maps",
    "anvil": "maps",
    "steps": "ensemble",
    "damped persistence": "index",
    "linear inverse model": "index",
    "seasonal ridge": "index",
}

# Fields that score files were written without: empty, they leave the hash of a protocol as it is.
LATER_FIELDS = ("feature_extractor",)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is forecast, what it is compared with, and how differences become numbers.

    Args:
        name: of the protocol.
        source: who scored like this.
        published: scores that others state for it, and where; they compare with ours, and with no other protocol's.
        dataset: a name that `load_dataset` knows, such as "folder"; or a folder that `data prepare` wrote, or its id
            on the hub.
        options: of that data set.
        feature_extractor: what the source of the data does not say of its numbers, as arguments of
            [`~earthformer_hf.EarthformerFeatureExtractor`]: {"units": "mm/h", "missing_value": -1}.
        split: that is scored.
        training_split, validation_split: on which baselines are fitted, and choose their settings.
        independent: what makes events independent of each other: "id", each event is, but all tiles of one map (events
            with a row and a column, of the same file or source and time) are together; or a key of their `geo`; or, of
            long records, a length of time such as "1D": windows that start in one day are not, and those of two are.
        context_length, prediction_length: frames of a window.
        window_stride, frame_stride: frames of the event between the starts of two windows, and of two in a window.
        max_windows: score so many windows only, evenly spread; a quick look, which compares with nothing else.
        missing: in words, what becomes of values that were not observed; nothing is said if omitted. They never enter
            a score, and never a sum: NaN, the missing value, and what is outside the valid range, in the observation;
            every forecast must be finite wherever the future was observed.
        scores: families of scores, of `FAMILIES`.
        value_range: above 0; stored values are divided by it before errors and CRPS are taken.
        frame_sums: errors are added up over the pixels of a frame instead of averaged.
        thresholds: ascending, in stored units; an event is a value of at least the threshold.
        physical_thresholds: further ones, in the physical units of the data set (mm/h).
        wet_threshold: in stored units; ranks and chances are also counted where observation or a member reaches it.
        pools: widths of blocks of pixels whose maxima are counted too.
        neighbourhoods: odd widths of the windows of the fractions skill score, in pixels.
        average: "pooled" adds counts and errors up over everything before a ratio is taken; "per lead" takes the ratio
            for each lead time, and then their mean. A mean over thresholds is of those that occur in the observations
            or the forecasts, since a score of the others is undefined; a score file says which, if not all.
        ensemble: what a deterministic score of an ensemble is of: the "mean" of its members, or "each" member.
        index_series: the series of the events that holds the observed index; if omitted, it is computed from the maps.
        baselines: forecasts without a neural network that are scored too, see `baselines.py`.

    Raises:
        ValueError: a value that no score can be taken with, or a baseline that none of `scores` is of.
    """

    name: str
    source: str
    published: str = ""
    dataset: str
    options: dict[str, Any] = field(default_factory=dict)
    feature_extractor: dict[str, Any] = field(default_factory=dict)
    split: str = "test"
    training_split: str = "train"
    validation_split: str = "val"
    independent: str = "id"
    context_length: int
    prediction_length: int
    window_stride: int = 1
    frame_stride: int = 1
    max_windows: int | None = None
    missing: str = ""
    scores: tuple[str, ...]
    value_range: float = 1.0
    frame_sums: bool = False
    thresholds: tuple[float, ...] = ()
    physical_thresholds: tuple[float, ...] = ()
    wet_threshold: float | None = None
    pools: tuple[int, ...] = ()
    neighbourhoods: tuple[int, ...] = ()
    average: str = "pooled"
    ensemble: str = "mean"
    index_series: str | None = None
    baselines: tuple[str, ...] = ("persistence",)

    def __post_init__(self):
        if not self.scores:
            raise ValueError(f"`scores` must be of {FAMILIES}, one or more, got none.")
        for name, known in (("scores", FAMILIES), ("baselines", tuple(BASELINES))):
            if not set(getattr(self, name)) <= set(known):
                raise ValueError(f"`{name}` must be of {known}, got {getattr(self, name)}.")
        for name, allowed in (("average", ("pooled", "per lead")), ("ensemble", ("mean", "each"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")
        for name in ("context_length", "prediction_length", "window_stride", "frame_stride", "max_windows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.independent[:1].isdigit():
            parsed_step(self.independent, "independent")
        if (step := str(self.feature_extractor.get("time_step", UNKNOWN))) != UNKNOWN:
            parsed_step(step)
        self._check_settings_of_scores()
        for name in self.baselines:
            self.families_of(BASELINES[name], f"the baseline {name!r}")

    def _check_settings_of_scores(self):
        """ValueError for numbers that no score can be taken with."""
        if not 0 < self.value_range < math.inf:
            raise ValueError(f"`value_range` must be finite and above 0, got {self.value_range}.")
        if self.wet_threshold is not None and not math.isfinite(self.wet_threshold):
            raise ValueError(f"`wet_threshold` must be finite, got {self.wet_threshold}.")
        for name in ("thresholds", "physical_thresholds"):
            needed = name == "thresholds" and not set(OF_THRESHOLDS).isdisjoint(self.scores)
            if needed or getattr(self, name):
                check_thresholds(getattr(self, name), name)
        if not all(pool >= 1 for pool in self.pools):
            raise ValueError(f"`pools` must be at least 1, got {self.pools}.")
        odd = all(width >= 1 and width % 2 for width in self.neighbourhoods)
        if not odd or ("fss" in self.scores and not self.neighbourhoods):
            raise ValueError(
                f"`neighbourhoods` must be odd numbers of pixels, of 'fss' one or more, got {self.neighbourhoods}."
            )
        if "nino34" in self.scores and self.prediction_length < 3:
            raise ValueError(
                f"`prediction_length` must be at least 3 for the means of 'nino34', got {self.prediction_length}."
            )
        if "earthnet" in self.scores and self.prediction_length > 40:
            raise ValueError(f"`prediction_length` must be at most 40 for 'earthnet', got {self.prediction_length}.")

    def families_of(self, forecast: str, what: str) -> tuple[str, ...]:
        """The scores that a forecast gets.

        Args:
            forecast: "maps", an "ensemble" of them, or the "index".
            what: forecasts that, in words.

        Raises:
            ValueError: it gets none.
        """
        kinds = {"nino34": ("maps", "index")} | dict.fromkeys(OF_ENSEMBLES, ("ensemble",))
        found = tuple(family for family in self.scores if forecast in kinds.get(family, ("maps", "ensemble")))
        if not found:
            words = {"maps": "maps", "ensemble": "ensembles", "index": "the Nino3.4 index"}[forecast]
            raise ValueError(f"`scores` must hold one of {words}, which {what} forecasts, got {self.scores}.")
        return found

    @property
    def hash(self) -> str:
        """SHA-256 of all fields, see [`hash_of`]."""
        return hash_of(asdict(self))


def hash_of(fields: dict[str, Any]) -> str:
    """SHA-256 of a protocol's fields, as canonical JSON; of those in `LATER_FIELDS`, where they hold something."""
    chosen = {name: value for name, value in fields.items() if value or name not in LATER_FIELDS}
    text = json.dumps(chosen, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


SEVIR = Protocol(
    name="sevir-earthformer",
    source="Gao et al., Earthformer, NeurIPS 2022, table 6, and the released code (mode 0)",
    published="CSI-M: Earthformer 0.4419 (MSE 3.6957e-3), without global vectors 0.4356, released checkpoint 0.4310 "
    "(Gong et al., CasCast, 2024), persistence 0.2613; the paper divides by counts + 1e-4",
    dataset="sevir",
    context_length=13,
    prediction_length=12,
    window_stride=12,
    missing="events with missing pixels are left out, as their catalogue has them",
    scores=("contingency", "errors", "spectrum"),
    value_range=255.0,
    thresholds=(16, 74, 133, 160, 181, 219),
    pools=(4, 16),
)

RADAR_OPEN = Protocol(
    name="radar-open",
    source="this project; the extrapolation is the one that the description of the data scores",
    dataset="open-radar",
    independent="source",
    context_length=13,
    prediction_length=12,
    window_stride=4,
    missing="pixels without radar coverage enter no score; forecasts see them as dry",
    scores=("contingency", "errors", "fss", "spectrum"),
    value_range=255.0,
    thresholds=(16, 74, 133, 160, 181, 219),
    physical_thresholds=(0.5, 1, 5, 10),
    pools=(4, 16),
    neighbourhoods=(1, 5, 11, 21),
    baselines=("persistence", "extrapolation", "s-prog", "anvil"),
)

RADAR_OPEN_10MIN = replace(
    RADAR_OPEN,
    name="radar-open-10min",
    source="this project: an hour ahead in the geometry of SEVIR-LR, two storms of NOAA MRMS",
    options={"file": "radar_open_10min_3km.h5"},
    context_length=7,
    prediction_length=6,
    baselines=("persistence", "advection", "extrapolation", "s-prog", "anvil"),
)

NBODY_MNIST = Protocol(
    name="nbody-mnist",
    source="Gao et al., Earthformer, NeurIPS 2022, section 4.1; values and scores in 0..1 as in the released code, "
    "errors added up over a frame",
    published="MSE 19.73, MAE 48.54, SSIM 0.932 (a user's run of the released code); the paper's 14.82, 39.93, 0.9538 "
    "are of values in 0..255, and do not compare",
    dataset="nbody-mnist",
    options={"parameters": "nbody_digits3_len20_size64_r0_train20k", "digits": "mnist.npz"},
    context_length=10,
    prediction_length=10,
    missing="none are missing",
    scores=("errors", "ssim"),
    value_range=255.0,
    frame_sums=True,
)

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        SEVIR,
        replace(
            SEVIR,
            name="sevir-per-lead",
            source="Gong et al., CasCast, ICML 2024, and others: scores per lead time first, then their mean",
            published="persistence: CSI-M 0.2695, MSE 0.0115283, MAE 0.044349",
            average="per lead",
        ),
        replace(
            SEVIR,
            name="sevir-lr-prediff",
            source="Gao et al., PreDiff, NeurIPS 2023, table 2: CSI of the mean of 8 members",
            published="PreDiff: CRPS 0.0246, CSI-M 0.4100, pooled over 4 x 4 pixels 0.4624, 16 x 16 0.6244",
            dataset="sevir-lr",
            context_length=7,
            prediction_length=6,
            window_stride=6,
            scores=("contingency", "errors", "spectrum", "ensemble", "ranks", "probabilities"),
            wet_threshold=16,
            baselines=("persistence", "dressed persistence"),
        ),
        RADAR_OPEN,
        replace(
            RADAR_OPEN,
            name="radar-open-ensemble",
            source="this project: the windows of radar-open, every other frame; ensembles, and their means",
            context_length=7,
            prediction_length=6,
            frame_stride=2,
            scores=("contingency", "errors", "spectrum", "ensemble", "ranks", "probabilities"),
            wet_threshold=7,
            baselines=("persistence", "dressed persistence", "steps"),
        ),
        RADAR_OPEN_10MIN,
        replace(
            RADAR_OPEN_10MIN,
            name="radar-open-10min-ensemble",
            source="this project: the windows of radar-open-10min; ensembles, and their means",
            scores=("contingency", "errors", "spectrum", "ensemble", "ranks", "probabilities"),
            wet_threshold=7,
            baselines=("persistence", "advection", "dressed persistence", "steps"),
        ),
        Protocol(
            name="icar-enso",
            source="Gao et al., Earthformer, NeurIPS 2022, section 4.3, and the ICAR-ENSO competition: three-month "
            "means of the plain mean over latitude -5..5, longitude 190..240, against the labels of the competition",
            published="C-Nino3.4-M, -WM: Earthformer 0.7329, 2.259, without global vectors 0.7239, 2.214, "
            "persistence 0.3221, 0.447",
            dataset="icar-enso",
            context_length=12,
            prediction_length=14,
            missing="none are missing",
            scores=("nino34", "errors"),
            value_range=26.74809741973877,  # of the published scaling to 0..1, degrees Celsius
            index_series="nino34",
        ),
        Protocol(
            name="sst-kaplan",
            source="this project: the scores of icar-enso on observed anomalies (Kaplan, 1993-2014), against the "
            "index of the observed maps",
            dataset="open-sst",
            context_length=12,
            prediction_length=14,
            missing="land and nodes without data enter no score and no index",
            scores=("nino34", "errors"),
            baselines=("persistence", "damped persistence", "linear inverse model", "seasonal ridge"),
        ),
        NBODY_MNIST,
        replace(
            NBODY_MNIST,
            name="moving-mnist",
            source="Gao et al., Earthformer, NeurIPS 2022: of the 10,000 published test sequences the last 1,000 are "
            "the test set; not the usual protocol, which scores all of them",
            published="Earthformer: MSE 41.79, MAE 92.78, SSIM 0.8961",
            dataset="moving-mnist",
            options={},
        ),
        Protocol(
            name="earthnet2021",
            source="Requena-Mesa et al., EarthNet2021, CVPR workshops 2021, the iid test set; see `earthnet_parts` "
            "for what the toolkit does otherwise",
            published="EarthNetScore: Earthformer 0.3425",
            dataset="earthnet2021",
            split="iid",
            context_length=10,
            prediction_length=20,
            missing="clouded pixels enter no score",
            scores=("earthnet", "errors"),
        ),
    )
}
PROTOCOLS["earthnet2021-ood"] = replace(
    PROTOCOLS["earthnet2021"], name="earthnet2021-ood", split="ood", published="EarthNetScore: Earthformer 0.3252"
)
for storm in ("0006", "0007"):
    PROTOCOLS[f"radar-open-10min-{storm}"] = replace(
        RADAR_OPEN_10MIN,
        name=f"radar-open-10min-{storm}",
        source=f"this project: radar-open-10min on storm {storm} alone",
        options=RADAR_OPEN_10MIN.options | {"sources": [f"mrms_storm_{storm}"]},
    )
for dataset, options in (("nbody-mnist", {}), ("moving-mnist", {"digits": "mnist_10k.npz"})):
    PROTOCOLS[f"{dataset}-drawn"] = replace(
        PROTOCOLS[dataset],
        name=f"{dataset}-drawn",
        source=f"this project: {dataset} on sequences drawn anew, so that no published score compares",
        published="",
        options=options,
    )


__all__ = ["BASELINES", "FAMILIES", "LATER_FIELDS", "PROTOCOLS", "Protocol", "hash_of"]
