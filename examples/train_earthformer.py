"""Train an Earthformer on any data set of this package. The same command resumes an interrupted run.

    python examples/train_earthformer.py --recipe examples/configs/earthformer_radar_tiny.yaml --output_dir runs/radar

Every `save_every` steps the complete state is written to OUTPUT_DIR/checkpoints; the model with the best score on the
validation split is in OUTPUT_DIR, ready for `from_pretrained`, with its card, and figures of its forecasts.

    torchrun --standalone --nproc_per_node 8 examples/train_earthformer.py --recipe ... --output_dir ...

trains on 8 GPUs (or, without one, 8 processes of the CPU). `total_batch_size` of the recipe stays what it is.
"""

from dataclasses import dataclass, field

import numpy as np
from accelerate.utils import send_to_device, set_seed

from earthformer_hf import EarthformerConfig, EarthformerFeatureExtractor, EarthformerForPrediction
from earthformer_hf.training import (
    MODEL_INPUTS,
    DataArguments,
    PublishedArguments,
    build,
    ends_in_one_line,
    forecast_figure,
    load_windows,
    mean_over,
    parse_recipe,
    publish,
    run_settings,
    train,
)
from earthformer_hf.training.losses import intensity_weighted_mse, soft_csi_loss


@dataclass
class ForecastArguments(PublishedArguments):
    pretrained: str | None = field(default=None, metadata={"help": "start from this model instead of random weights"})
    intensity_weight: float = field(default=0.0, metadata={"help": "weight of intense values in the loss"})
    intensity_power: float = field(default=1.0, metadata={"help": "how steeply that weight grows with the value"})
    lead_power: float = field(default=0.0, metadata={"help": "how steeply the weight falls with the lead time"})
    csi_weight: float = field(default=0.0, metadata={"help": "weight of the CSI at the thresholds in the loss"})


@ends_in_one_line
def main():
    recipe, data, arguments = parse_recipe(__doc__, data=DataArguments, training=ForecastArguments)
    set_seed(arguments.seed)
    config = build(recipe, "model", EarthformerConfig)
    extractor = build(recipe, "feature_extractor", EarthformerFeatureExtractor)
    lengths = config.context_length, config.prediction_length
    train_set, eval_set = load_windows(data, extractor, lengths, arguments.seed, config.image_size)
    if arguments.pretrained:
        try:
            model = EarthformerForPrediction.from_pretrained(arguments.pretrained, config=config)
        except (ValueError, OSError) as reason:
            raise ValueError(f"--pretrained {arguments.pretrained}: {reason}") from reason
    else:
        model = EarthformerForPrediction(config)

    thresholds = []
    if arguments.csi_weight:
        if not extractor.thresholds:
            raise ValueError("`csi_weight` needs `thresholds` in `feature_extractor`, got none.")
        thresholds = extractor.encode(np.array(extractor.thresholds))[0].tolist()

    def loss_of(model, batch):
        predictions = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch}).predictions
        truth = batch["future_values"], batch["future_observed_mask"]
        weights = arguments.intensity_weight, arguments.intensity_power, arguments.lead_power
        loss = intensity_weighted_mse(predictions, *truth, *weights)
        if arguments.csi_weight:
            loss = loss + arguments.csi_weight * soft_csi_loss(predictions, *truth, thresholds)
        return loss

    def score_of(model, accelerator) -> float:
        """The same loss over the observed values of the validation split."""

        def total_and_count(batch):
            count = batch["future_observed_mask"].expand_as(batch["future_values"]).sum()
            return loss_of(model, batch).double() * count, count

        return mean_over(eval_set, arguments.batch_size, total_and_count, accelerator)

    def save_best(model):
        model.save_pretrained(arguments.output_dir)
        extractor.save_pretrained(arguments.output_dir)

    def figure_of(model):
        def forecast_of(inputs):
            return model(**send_to_device(inputs, model.device)).predictions[0]

        return forecast_figure(forecast_of, eval_set, extractor)

    settings = run_settings(data, extractor, config.to_dict(), train_set, eval_set)
    run = train(model, loss_of, train_set, score_of, save_best, arguments, figure_of, settings)
    windows = f"{len(train_set.windows)} windows for training, {len(eval_set)} for validation"
    publish(run, arguments, recipe, f"{data.source}: {windows}.")


if __name__ == "__main__":
    main()
