# %% [markdown]
# # Fine-tune on a new radar
#
# `earthformer-radar-tiny` learnt from American radar, a frame every 2 minutes. Suppose that your radar makes a frame
# every 4 minutes: rain moves twice as far from frame to frame, and your rain looks different. The model does not know
# that. A few dozen steps from its weights teach it.
#
# ## The new radar
#
# Here it is simulated rain of which every other frame is kept. Yours:
# `earthformer_hf.data.from_folder("my_radar")["train"]`.

# %%
from pathlib import Path

import torch
from transformers import AutoFeatureExtractor, AutoModelForTimeSeriesPrediction, Trainer, TrainingArguments

import earthformer_hf
from earthformer_hf.data.simulated import rain_events
from earthformer_hf.plotting import plot_sequence, sequence_row


OUTPUTS = Path("outputs")
OUTPUTS.mkdir(exist_ok=True)
MODEL = "model_cards/earthformer-radar-tiny"
STEPS = 40

torch.manual_seed(0)
model = AutoModelForTimeSeriesPrediction.from_pretrained(MODEL)
extractor = AutoFeatureExtractor.from_pretrained(MODEL)

train_events, test_events = rain_events(12, length=64, seed=1), rain_events(4, length=64, seed=2)
for event in [*train_events, *test_events]:
    event["values"] = extractor.from_physical(event["values"][::2])  # mm/h -> the code that the model knows
    event["time"] = event["time"][::2]

lengths = {"context_length": 13, "prediction_length": 12}
train_windows = earthformer_hf.windows(train_events, extractor.encode, **lengths)
test_windows = earthformer_hf.windows(test_events, extractor.encode, **lengths, stride=7)
print(f"{len(train_windows)} windows to train on, {len(test_windows)} for the test")

# %% [markdown]
# ## Before
#
# The mean squared error on windows that no training sees, beside persistence. Only observed pixels count.


# %%
@torch.no_grad()
def test_error(forecast) -> float:
    """The mean squared error of a forecast, a function of a window's item, over all test windows."""
    total, count = 0.0, 0
    for item in test_windows:
        mask = item["future_observed_mask"]
        total += float(((forecast(item) - item["future_values"]) ** 2)[mask].sum())
        count += int(mask.sum())
    return total / count


def by_model(item):
    return model(item["past_values"][None]).predictions[0]


def by_persistence(item):
    return item["past_values"][-1:].expand_as(item["future_values"])


model.eval()
before = test_error(by_model)
wettest = max(range(len(test_windows)), key=lambda n: float(test_windows[n]["future_values"].mean()))
item = test_windows[wettest]
with torch.no_grad():
    frames_before = by_model(item)
print(f"persistence {test_error(by_persistence):.5f}, model before {before:.5f}")

# %% [markdown]
# ## Train
#
# transformers' own `Trainer`: the windows are its data set, the model computes its loss. `label_names` says which of
# the inputs is the future.

# %%
arguments = TrainingArguments(
    output_dir=str(OUTPUTS / "fine_tuned"),
    max_steps=STEPS,
    per_device_train_batch_size=2,
    learning_rate=5e-4,
    warmup_steps=4,
    lr_scheduler_type="cosine",
    label_names=["future_values"],
    logging_steps=6,
    save_strategy="no",
    report_to="none",
    use_cpu=not torch.accelerator.is_available(),
)
Trainer(model, arguments, train_dataset=train_windows).train()
model.cpu().eval()

# %% [markdown]
# ## After

# %%
after = test_error(by_model)
print(f"model after {after:.5f}: {100 * (1 - after / before):.0f} % less error than before")

earthformer_hf.sharing.export(model, OUTPUTS / "my-radar", extractor, overwrite=True)

# %% [markdown]
# The folder `outputs/my-radar` loads with `from_pretrained`, and goes to a hub with `earthformer-hf hub push`.

# %%
with torch.no_grad():
    rows = {"observed": item["future_values"], "before": frames_before, "after": by_model(item)}
shown = [1, 3, 5, 7, 9, 11]
frames = {name: extractor.to_physical(extractor.decode(row[..., 0])) for name, row in rows.items()}
past = extractor.to_physical(extractor.decode(item["past_values"][..., 0]))
panels = {"observed": sequence_row(frames["observed"][shown], past[[6, 9, 12]])}
panels |= {f"{name} fine-tuning": sequence_row(frames[name][shown]) for name in ("before", "after")}
columns = [f"frame {n:+d}" for n in [-6, -3, 0, *(n + 1 for n in shown)]]
figure = plot_sequence(panels, columns, f"simulated rain (not real): {STEPS} steps of fine-tuning")
figure.savefig(OUTPUTS / "tutorial_fine_tune.png", dpi=60)

# %% [markdown]
# ![Observed rain, forecasts before and after fine-tuning](images/fine_tune.png)
#
# Look at both, the number and the picture. The error fell, and the forecast became smoother: a squared error asks for
# the mean of what may follow, and being careful is what forty steps teach first. How this rain moves takes some
# hundreds more.
#
# For more than a first look use `examples/train_earthformer.py` with a recipe: it keeps the best averaged weights,
# goes on after a kill, weighs intense rain, and writes a card. See [How do I fine-tune on my
# radar?](../guides/fine-tune.md)
