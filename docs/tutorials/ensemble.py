# %% [markdown]
# # An ensemble, its calibration, and knowledge alignment
#
# PreDiff draws several possible futures. Three questions: how far apart are the members, are they sure for good
# reasons, and what if it rains more than usual?

# %%
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from earthformer_hf import KnowledgeAlignmentCallback, PreDiffPipeline
from earthformer_hf.data import Windows
from earthformer_hf.data.inputs import rain_input
from earthformer_hf.evaluation import PROTOCOLS, evaluate, pipeline_forecaster
from earthformer_hf.guidance import frame_mean, intensity_change
from earthformer_hf.plotting import plot_rank_histogram, plot_sequence, sequence_row


OUTPUTS = Path("outputs")
OUTPUTS.mkdir(exist_ok=True)
MEMBERS, STEPS, WINDOWS = 4, 5, 8

pipeline = PreDiffPipeline.from_pretrained("model_cards/prediff-radar-small")
pipeline.set_progress_bar_config(disable=True)
extractor = pipeline.feature_extractor
label, events = rain_input(None, extractor)  # open radar data if they are at hand, else simulated rain
windows = Windows(events, extractor.encode, 7, 6, stride=4)
print(f"{label}: {len(windows)} windows of 7 + 6 frames, every 10 minutes")

# %% [markdown]
# ## Members
#
# Each starts from noise of its own. Member 1 is the same whether you ask for one member or for forty.

# %%
wettest = max(range(len(windows)), key=lambda n: float(windows[n]["future_values"].mean()))
item = windows[wettest]
past, future = item["past_values"], item["future_values"]


def draw(members: int, steps: int = STEPS, **options) -> torch.Tensor:
    """Members (members, 6, 128, 128, 1) in the model's range."""
    noise = torch.Generator().manual_seed(0)
    output = pipeline(past[None], members, steps, noise, output_type="pt", **options)
    return output.predictions[0]


def millimetres(frames) -> np.ndarray:
    return extractor.to_physical(extractor.decode(frames[..., 0]))


ensemble = draw(MEMBERS)
chance = (millimetres(ensemble) >= 1).mean(axis=0)  # of 1 mm/h, (6, 128, 128)
print(f"the chance of 1 mm/h lies between 0 and 1 at {100 * ((chance > 0) & (chance < 1)).mean():.0f} % of the pixels")

# %% [markdown]
# ## Calibration
#
# The members of a good ensemble are as far from each other as from the observation: their *spread-skill ratio* is 1.
# And the observation is as often below all members as between any two, so that the *rank histogram* is flat. A U
# means: too sure.

# %%
settings = {"scores": ("ensemble", "ranks"), "baselines": (), "independent": "id", "max_windows": WINDOWS}
protocol = replace(PROTOCOLS[extractor.protocol], name="tutorial", **settings)
results = evaluate({"PreDiff": pipeline_forecaster(pipeline, MEMBERS, STEPS)}, windows, protocol)
summary = results["scores"]["PreDiff"]["summary"]
ranks = np.asarray(results["scores"]["PreDiff"]["ranks"]["ranks_wet"]).sum(axis=0)  # (MEMBERS + 1,)
print(f"fair CRPS {summary['fair_crps']:.4f}, spread-skill ratio {summary['spread_skill_ratio']:.2f}")

# %% [markdown]
# ## Knowledge alignment
#
# Usually the mean rain of the next hour differs little from that of the last frame. Ask for two standard
# deviations less, and for two more: from the same noise, two scenarios.

# %%
usual = pipeline.alignment.config.statistics
guided = {}
for n in (-2, 2):
    target = intensity_change(usual["change_mean"], usual["change_deviation"], n)
    guide = KnowledgeAlignmentCallback(target, frame_mean)
    guided[n] = draw(1, steps=8, callback_on_step_end=guide)[0]
    asked = float(target(past[None])[0])
    print(f"{n:+d} sigma: mean intensity asked {asked:.4f}, got {float(guided[n].mean()):.4f}")
less, more = (float(guided[n].mean()) for n in (-2, 2))

# %% [markdown]
# ## Look at it

# %%
shown = [0, 2, 5]
rows = {"observed": sequence_row(millimetres(future)[shown], millimetres(past)[[0, 3, 6]])}
rows |= {f"member {n + 1}": sequence_row(millimetres(ensemble[n])[shown]) for n in range(2)}
rows |= {f"asked for {n:+d} sigma": sequence_row(millimetres(guided[n])[shown]) for n in (-2, 2)}
columns = ["-60 min", "-30 min", "0 min", "+10 min", "+30 min", "+60 min"]
chances = {"chance of 1 mm/h": sequence_row(chance[shown])}
plot_sequence(rows, columns, f"{label}: PreDiff", chances).savefig(OUTPUTS / "tutorial_ensemble.png", dpi=50)

# %% [markdown]
# ![Observed rain, members, guided members and chances](images/ensemble.png)

# %%
figure = plot_rank_histogram({"pixels where it rained, or a member has rain": {"PreDiff": ranks}}, "rank histogram")
figure.savefig(OUTPUTS / "tutorial_ranks.png", dpi=60)

# %% [markdown]
# ![Rank histogram](images/ranks.png)
#
# Eight windows and four members are a quick look, and say so by their noise. `earthformer-hf evaluate` scores them
# all, with reliability and more: [How do I evaluate under my protocol?](../guides/evaluate.md)
