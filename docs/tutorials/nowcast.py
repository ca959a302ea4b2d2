# %% [markdown]
# # Nowcast your own NetCDF
#
# From a file in your units, on your grid, to a forecast on the same grid. If you have no file, the next cell writes
# one of simulated rain: 1 km pixels, a frame every 2 minutes, and a corner that the radar does not see.

# %%
from pathlib import Path

import numpy as np
import xarray as xr

import earthformer_hf
from earthformer_hf.data.simulated import rain_events
from earthformer_hf.forecasting import observe, observed_maps, save
from earthformer_hf.plotting import plot_forecast


OUTPUTS = Path("outputs")
OUTPUTS.mkdir(exist_ok=True)

event = rain_events(1, length=25, seed=3)[0]  # (25, 128, 128), mm/h
rain = event["values"].repeat(3, axis=1).repeat(3, axis=2)  # 384 x 384 pixels
rain[:, :90, :90] = np.nan  # not observed
axes = {"time": event["time"].astype("datetime64[ns]")}
for name in ("y", "x"):
    axes[name] = (name, 1000.0 * np.arange(384), {"units": "m", "standard_name": f"projection_{name}_coordinate"})
data = xr.DataArray(rain, axes, ("time", "y", "x"), "rain", {"units": "mm/h"})
data.to_netcdf(OUTPUTS / "radar.nc")

# %% [markdown]
# ## What does the model take?
#
# 13 frames of 128 x 128 pixels at 3 km, every 2 minutes. Our file is finer, so a forecast as it stands is refused,
# with the reason:

# %%
MODEL = "model_cards/earthformer-radar-tiny"
now = str(data["time"].values[12])[:16]  # the last frame that we pretend to know
try:
    earthformer_hf.forecast(MODEL, OUTPUTS / "radar.nc", until=now)
except ValueError as reason:
    print(reason)

# %% [markdown]
# ## Forecast
#
# `coarsen_to` asks for means over areas of 3 x 3 pixels. `until` takes the frames up to the 13th, so that the others
# are left to compare with.

# %%
observations = observe(OUTPUTS / "radar.nc", until=now)
forecast = earthformer_hf.forecast(MODEL, observations, coarsen_to="3 km")
save(forecast, OUTPUTS / "nowcast.nc", overwrite=True)
print(forecast)

# %% [markdown]
# The result lies on the 1 km grid again. The corner is missing in it too, and `quality_flag` is 1 where the air has
# come from the corner or from beyond the edge.
#
# ## Compare
#
# With what happened, and with *persistence*: "it stays as it is". The last lead is 24 minutes.

# %%
known = data.values[13:]
predicted = forecast["rainfall_rate"].values
seen = np.isfinite(known) & np.isfinite(predicted)


def error(maps):
    return float(np.abs(maps - known)[seen].mean())


model_error, persistence_error = error(predicted), error(np.broadcast_to(data.values[12], known.shape))
print(f"mean absolute error: model {model_error:.4f} mm/h, persistence {persistence_error:.4f} mm/h")

# %% [markdown]
# ## Look at it
#
# What is hatched was not observed, what is dotted has come from there.

# %%
figure = plot_forecast(forecast, observed_maps(forecast, observe(OUTPUTS / "radar.nc")))
figure.savefig(OUTPUTS / "tutorial_nowcast.png", dpi=45)

# %% [markdown]
# ![Observed, forecast and what followed](images/nowcast.png)
#
# The model learnt from real radar, so its error on simulated rain says little. To score it, see [How do I evaluate
# under my protocol?](../guides/evaluate.md); to have many futures, [How do I make it an
# ensemble?](../guides/ensemble.md)
