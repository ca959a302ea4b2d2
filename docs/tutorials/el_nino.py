# %% [markdown]
# # El Niño with a plume
#
# The coming months of the tropical Pacific, from the last twelve, with the range of the errors that such forecasts
# made before. With open data at hand this is the observed ocean up to October 2014; else a simulated one.

# %%
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModelForTimeSeriesPrediction

import earthformer_hf  # noqa: F401  registers the Auto classes
from earthformer_hf.data import Windows
from earthformer_hf.data.inputs import ocean_input
from earthformer_hf.data.open_sst import nino34, three_month_means
from earthformer_hf.evaluation import PROTOCOLS, baseline_forecaster, evaluate, model_forecaster
from earthformer_hf.plotting import plot_ocean


OUTPUTS = Path("outputs")
OUTPUTS.mkdir(exist_ok=True)
MODEL = "model_cards/earthformer-sst-small"

model = AutoModelForTimeSeriesPrediction.from_pretrained(MODEL).eval()
extractor = AutoFeatureExtractor.from_pretrained(MODEL)
label, events = ocean_input(None)
record = events["test"][0]  # values (months, 24, 48), anomalies in degrees Celsius, NaN on land
print(f"{label}: {record['time'][0]} to {record['time'][-1]}")

# %% [markdown]
# ## The coming months
#
# Nino3.4 is the mean anomaly over 5S-5N, 170W-120W; three-month means of it make El Niño (+0.5 degrees or more) or La
# Niña.

# %%
past = np.asarray(record["values"][-12:])
inputs = extractor(past, time=record["time"][-12:])  # the model looks at the calendar month
with torch.no_grad():
    maps = extractor.decode(model(**inputs).predictions[0, ..., 0])  # (14, 24, 48)
maps = np.where(extractor.observed(past).all(axis=0), maps, np.nan)
index = three_month_means(nino34(maps))  # (12,)
months = record["time"][-1].astype("datetime64[M]") + 1 + np.arange(len(maps))
for month, value in zip(months[1:], index):
    print(f"{month}  {value:+.2f}")

# %% [markdown]
# ## How sure?
#
# The model gives one future and no chances. But we can forecast from every month of the record, compare with what
# followed, and take the errors as the width of the plume: 1.645 standard errors hold 90 % if errors are normal.

# %%
protocol = replace(PROTOCOLS[extractor.protocol], name="tutorial", scores=("nino34",), window_stride=2)
windows = Windows(events["test"], extractor.encode, 12, 14, stride=2)
forecasters = {"Earthformer": model_forecaster(model, extractor)}
forecasters["persistence"] = baseline_forecaster("persistence", protocol, lambda split: windows)
results = evaluate(forecasters, windows, protocol)
scores = {system: entries["nino34"] for system, entries in results["scores"].items()}
skill = scores["Earthformer"]["c_nino34_m"]
print(f"{results['windows']} hindcasts: skill {skill:.2f}, persistence {scores['persistence']['c_nino34_m']:.2f}")
half_width = 1.645 * np.asarray(scores["Earthformer"]["rmse_by_lead"])

# %% [markdown]
# *Skill* is the correlation with what followed, averaged over twelve leads. These are hindcasts with today's
# knowledge of the past, so a real-time forecast would do a little worse.
#
# ## Look at it

# %%
recent = record["time"][-24:].astype("datetime64[M]")
observed = recent[1:-1], three_month_means(nino34(np.asarray(record["values"][-24:])))
known = np.where(np.isfinite(maps[0]), record["values"][-1], np.nan)
shown = {f"observed, {recent[-1]}": known, f"forecast for {months[5]}": maps[5]}
by_lead = {system: entries["correlation_by_lead"] for system, entries in scores.items()}
figure = plot_ocean(by_lead, observed, (months[1:-1], index, half_width), shown, record["geo"], label)
figure.savefig(OUTPUTS / "tutorial_el_nino.png", dpi=60)

# %% [markdown]
# ![Skill, a plume of the index, and maps](images/el_nino.png)
#
# Where the plume crosses +0.5, El Niño and its absence are both possible. The test record holds about six events, so
# a few hundredths of skill mean nothing: by so much the model is better than a regression that knows the calendar, see
# the [zoo](../zoo.md).
