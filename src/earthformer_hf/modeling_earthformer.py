"""Earthformer: a hierarchical transformer that forecasts sequences of maps.

```
past_values (B, T_in, H, W, C)                                                     predictions (B, T_out, H, W, C_out)
      |                                                                                        ^
     stem: convolutions and patch merging                                  head: upsampling and convolutions
      v                                                                                        |
   level 0: self-attention blocks  ------------ memory 0 ---------->  self- and cross-attention blocks
      | merge 2x2                                                                              ^ upsample
   level 1: self-attention blocks  ------------ memory 1 ---------->  cross-attention blocks   |
                                                                               ^ learned start, one per frame
```

With covariates (K known drivers of context and forecast, such as weather) the decoder starts from those of the
forecast and goes down before it goes up, through blocks of the same kind:

```
past_covariates (B, T_in, H, W, K)    -> covariate stem -> added to the stem's tokens
future_covariates (B, T_out, H, W, K) -> covariate stem -> level 0 -> merge 2x2 -> level 1 -> ... -> up, as above
```

With a first guess, a forecast that is known without the network, the decoder starts from it in the same way, and the
network adds to it what it has learned to know better:

```
past_values -> first guess (B, T_out, H, W, C_out) -> guess stem -> level 0 -> merge 2x2 -> level 1 -> ... -> up
predictions = first guess + head(...), which is 0 before training
```

Source: Gao et al., "Earthformer: Exploring Space-Time Transformers for Earth System Forecasting", NeurIPS 2022,
https://arxiv.org/abs/2207.05833, section 3 and appendix A; the decoder with covariates is that of their EarthNet2021
experiment, as released; the first guess is this project's, see `advection.py`. The attention itself is in `cuboid.py`.
"""

import inspect
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel  # noqa: F401  in the module of its component diffusers looks for the base class
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .advection import first_guess
from .calibration import calibrated
from .configuration_earthformer import EarthformerConfig, nearest_name
from .cuboid import (
    LEAKY_SLOPE,
    CuboidAttentionBase,
    CuboidCrossAttention,
    CuboidCrossAttentionBlock,
    CuboidSelfAttention,
    CuboidSelfAttentionBlock,
    PatchMerging,
    PositionEmbedding,
    Upsample,
)
from .linear_forecast import LinearForecast
from .loading_earthformer import CheckpointModel
from .stem_earthformer import EarthformerHead, EarthformerStem


@dataclass
class EarthformerEncoderOutput(BaseModelOutput):
    """
    Output of [`EarthformerEncoder`].

    Args:
        last_hidden_state (`torch.FloatTensor`): tokens of the coarsest level, (B, T_in, h, w, hidden_sizes[-1]).
        memories (`tuple[torch.FloatTensor]`): each level's tokens, finest first, (B, T_in, h_i, w_i, hidden_sizes[i]).
        hidden_states (`tuple`, *optional*): the encoder's input and the tokens after each of its blocks.
        attentions (`tuple`, *optional*): weights of every self-attention, (B * cuboids, heads, tokens, tokens + G).
    """

    memories: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class EarthformerModelOutput(Seq2SeqModelOutput):
    """
    Output of [`EarthformerModel`]: that of [`~transformers.modeling_outputs.Seq2SeqModelOutput`], and beside it

    Args:
        first_guess (`torch.FloatTensor`, *optional*): of a model with `first_guess`, (B, T_out, H, W, C_out) in the
            model's range.
        reach (`torch.FloatTensor`, *optional*): of the same shape, 0..1: how much of the guess was observed.
    """

    first_guess: torch.FloatTensor | None = None
    reach: torch.FloatTensor | None = None


@dataclass
class EarthformerPredictionOutput(ModelOutput):
    """
    Output of [`EarthformerForPrediction`].

    Args:
        loss (`torch.FloatTensor`, *optional*): mean squared error over the observed future values.
        predictions (`torch.FloatTensor`): (B, T_out, H, W, C_out), in the model's range.
        decoder_hidden_states (`tuple`, *optional*): the decoder's first input and the tokens after each block.
        decoder_attentions, cross_attentions (`tuple`, *optional*): weights of every attention of the decoder.
        encoder_hidden_states, encoder_attentions (`tuple`, *optional*): as [`EarthformerEncoderOutput`].
    """

    loss: torch.FloatTensor | None = None
    predictions: torch.FloatTensor | None = None
    decoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    decoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None


class EarthformerPreTrainedModel(CheckpointModel):
    """Initialisation; loading, saving and pushing are those of [`CheckpointModel`]."""

    config: EarthformerConfig
    config_class = EarthformerConfig
    base_model_prefix = "model"
    main_input_name = "past_values"
    input_modalities = ("time",)
    supports_gradient_checkpointing = True
    _input_embed_layer = "stem"  # for quantization, and for adapters behind reentrant checkpoints
    # The head takes the weights of two of its layers into one step.
    _no_split_modules = [
        "CuboidSelfAttentionBlock", "CuboidCrossAttentionBlock", "PositionEmbedding", "EarthformerHead",
    ]  # fmt: skip
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        """The library's, which for "namespace/name" would fetch code of that repository and run it.

        Raises:
            ValueError: such a name, be it of a configuration file or an argument.
        """
        if "/" in (attn_implementation or ""):
            raise ValueError(f"`attn_implementation` must be 'eager' or 'sdpa', got {attn_implementation!r}.")
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """As the originals initialise, where their code has an effect.

        Linear maps are normal with variance 1 / fan-in, and upsampling is Kaiming-normal for a leaky ReLU. The
        convolutions of stem and head and the maps that carry global vectors keep PyTorch's defaults: the originals'
        initialisation does not visit them.
        """
        super()._init_weights(module)  # norms
        if isinstance(module, nn.Linear):
            init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            _pytorch_default(module)
        elif isinstance(module, nn.Embedding):
            init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, Upsample):
            init.kaiming_normal_(module.conv.weight, a=LEAKY_SLOPE, mode="fan_out", nonlinearity="leaky_relu")
            init.zeros_(module.conv.bias)
        elif isinstance(module, CuboidAttentionBase):
            init.trunc_normal_(module.relative_position_bias, std=0.02)
            if getattr(module, "update_global_vectors", False):
                _pytorch_default(module.global_out_proj)
        elif isinstance(module, EarthformerEncoder):
            if module.global_vectors is not None:
                init.trunc_normal_(module.global_vectors, std=0.02)
            for projection in module.global_projections:
                _pytorch_default(projection)


def _pytorch_default(layer: nn.Linear | nn.Conv2d):
    init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
    bound = 1 / math.sqrt(layer.weight[0].numel())
    init.uniform_(layer.bias, -bound, bound)


class EarthformerEncoder(EarthformerPreTrainedModel):
    """Self-attention blocks level by level; the tokens of every level are kept as memories for the decoder."""

    _can_record_outputs = {"hidden_states": CuboidSelfAttentionBlock, "attentions": CuboidSelfAttention}

    def __init__(self, config: EarthformerConfig):
        super().__init__(config)
        self.gradient_checkpointing = False
        sizes, last = config.hidden_sizes, len(config.hidden_sizes) - 1
        use_global, layer_config = config.num_global_vectors > 0, config.layer_config()
        self.position_embedding = PositionEmbedding(
            config.context_length, config.level_sizes[0], sizes[0], config.position_embedding_type
        )
        self.global_vectors = nn.Parameter(torch.zeros(config.num_global_vectors, sizes[0])) if use_global else None
        # The global vectors end with the encoder: its last attention does not update them.
        self.levels = nn.ModuleList(
            nn.ModuleList(
                CuboidSelfAttentionBlock(
                    layer_config,
                    sizes[i],
                    cuboids,
                    use_global,
                    update_last=i < last or block < config.encoder_depths[i] - 1,
                )
                for block in range(config.encoder_depths[i])
            )
            for i, cuboids in enumerate(config.self_attention_cuboids())
        )
        self.merges = nn.ModuleList(
            PatchMerging(before, after, (2, 2), config.layer_norm_eps) for before, after in zip(sizes, sizes[1:])
        )
        self.global_projections = nn.ModuleList(
            nn.Linear(before, after) for before, after in zip(sizes, sizes[1:]) if use_global
        )
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, hidden_states: torch.Tensor, **kwargs) -> EarthformerEncoderOutput:
        """hidden_states: (B, T_in, h_0, w_0, hidden_sizes[0]), the output of the stem."""
        batch, attn_implementation = hidden_states.shape[0], self.config._attn_implementation
        hidden_states = hidden_states + self.position_embedding(hidden_states.device)
        global_vectors = None if self.global_vectors is None else self.global_vectors.repeat(batch, 1, 1)
        memories = ()
        for i, blocks in enumerate(self.levels):
            for block in blocks:
                hidden_states, global_vectors = block(hidden_states, global_vectors, attn_implementation)
            memories += (hidden_states,)
            if i < len(self.merges):
                hidden_states = self.merges[i](hidden_states)
                if global_vectors is not None:
                    global_vectors = self.global_projections[i](global_vectors)
        return EarthformerEncoderOutput(last_hidden_state=hidden_states, memories=memories)


class EarthformerDecoder(EarthformerPreTrainedModel):
    """From a start to the forecast tokens of level 0, level by level upwards.

    The start is learned, one embedding per frame and place of the coarsest level; with covariates or a first guess it
    is their tokens, level by level downwards. Each block of a level attends to itself, then to the memory of that
    level; the first block after a learned start only to the memory.
    """

    _can_record_outputs = {
        "hidden_states": CuboidCrossAttentionBlock,
        "attentions": CuboidSelfAttention,
        "cross_attentions": CuboidCrossAttention,
    }

    def __init__(self, config: EarthformerConfig):
        super().__init__(config)
        self.gradient_checkpointing = False
        sizes, last = config.hidden_sizes, len(config.hidden_sizes) - 1
        max_time = config.context_length + config.prediction_length
        layer_config = config.layer_config()
        self.level_sizes = config.level_sizes

        def self_blocks(fewer_at_coarsest: int = 0) -> nn.ModuleList:
            return nn.ModuleList(
                nn.ModuleList(
                    CuboidSelfAttentionBlock(layer_config, sizes[i], cuboids)
                    for _ in range(config.decoder_depths[i] - (fewer_at_coarsest if i == last else 0))
                )
                for i, cuboids in enumerate(config.self_attention_cuboids())
            )

        def cross_blocks() -> nn.ModuleList:
            return nn.ModuleList(
                nn.ModuleList(
                    CuboidCrossAttentionBlock(layer_config, sizes[i], cuboids, max_time)
                    for _ in range(config.decoder_depths[i])
                )
                for i, cuboids in enumerate(config.cross_attention_cuboids())
            )

        given_start = config.num_covariates > 0 or config.first_guess is not None
        if given_start:
            self.down_self_blocks, self.down_cross_blocks = self_blocks(), cross_blocks()
            self.merges = nn.ModuleList(
                PatchMerging(before, after, (2, 2), config.layer_norm_eps) for before, after in zip(sizes, sizes[1:])
            )
            self.self_blocks = self_blocks()
        if config.first_guess is not None or not given_start:  # a guess is worth less from frame to frame
            level = 0 if given_start else last
            self.position_embedding = PositionEmbedding(
                config.prediction_length, config.level_sizes[level], sizes[level], config.position_embedding_type
            )
        if not given_start:
            self.start_proj = nn.Linear(sizes[-1], sizes[-1])
            self.self_blocks = self_blocks(fewer_at_coarsest=1)
        self.cross_blocks = cross_blocks()
        self.upsamples = nn.ModuleList(Upsample(after, before) for before, after in zip(sizes, sizes[1:]))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, memories: tuple[torch.Tensor, ...], start: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """memories: one (B, T_in, h_i, w_i, hidden_sizes[i]) per level, finest first -> (B, T_out, h_0, w_0, C).

        start: tokens (B, T_out, h_0, w_0, hidden_sizes[0]) of a model with covariates or a first guess, else None.
        """
        last = len(memories) - 1
        if start is None:
            start = self.start_proj(self.position_embedding(memories[-1].device))
            hidden_states = start.expand(memories[-1].shape[0], -1, -1, -1, -1)
        else:
            hidden_states = start
            if self.config.first_guess is not None:
                hidden_states = hidden_states + self.position_embedding(hidden_states.device)
            for i, memory in enumerate(memories):
                if i > 0:
                    hidden_states = self.merges[i - 1](hidden_states)
                hidden_states = self._run_level(
                    self.down_self_blocks[i], self.down_cross_blocks[i], hidden_states, memory
                )
        for i in range(last, -1, -1):
            hidden_states = self._run_level(self.self_blocks[i], self.cross_blocks[i], hidden_states, memories[i])
            if i > 0:
                hidden_states = self.upsamples[i - 1](hidden_states, self.level_sizes[i - 1])
        return BaseModelOutput(last_hidden_state=hidden_states)

    def _run_level(
        self,
        self_blocks: nn.ModuleList,
        cross_blocks: nn.ModuleList,
        hidden_states: torch.Tensor,
        memory: torch.Tensor,
    ) -> torch.Tensor:
        """The blocks of one level in turn: self-attention, cross-attention, self-attention, and so on.

        Where there are fewer blocks of self-attention, the level begins with cross-attention.
        hidden_states (B, T_out, h, w, C), memory (B, T_in, h, w, C) -> (B, T_out, h, w, C).
        """
        attn_implementation = self.config._attn_implementation
        cross_only = len(cross_blocks) - len(self_blocks)
        for i, cross_block in enumerate(cross_blocks):
            if i >= cross_only:
                hidden_states, _ = self_blocks[i - cross_only](hidden_states, attn_implementation=attn_implementation)
            hidden_states = cross_block(hidden_states, memory, attn_implementation)
        return hidden_states


def _refuse_unknown(model_class: type, kwargs: dict):
    """A keyword of `forward` is one of its arguments, or one that the library may pass to any model."""
    for name in kwargs:
        if name not in TransformersKwargs.__annotations__:
            known = inspect.signature(model_class.forward).parameters
            close = nearest_name(name, [name for name in known if name not in ("self", "kwargs")], cutoff=0.0)
            raise TypeError(
                f"{model_class.__name__}.forward() got an unexpected keyword argument {name!r}; "
                f"did you mean {close!r}?"
            )


def _expanded_mask(name: str, mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A mask in the shape of the values it is of; ValueError if it is none, or does not broadcast."""
    if mask.dtype != torch.bool:
        raise ValueError(f"`{name}` must be boolean, got {mask.dtype}.")
    try:
        return mask.expand_as(values)
    except RuntimeError as reason:
        raise ValueError(f"`{name}` must broadcast to {tuple(values.shape)}, got {tuple(mask.shape)}.") from reason


class EarthformerModel(EarthformerPreTrainedModel):
    """Stem, encoder and decoder: frames in, forecast tokens of level 0 out."""

    def __init__(self, config: EarthformerConfig):
        super().__init__(config)
        self.stem = EarthformerStem(config, config.num_channels)
        self.covariate_stem = EarthformerStem(config, config.num_covariates) if config.num_covariates else None
        self.guess_stem = None
        if config.first_guess is not None:  # the guess and its reach
            self.guess_stem = EarthformerStem(config, 2 * cast(int, config.num_output_channels))
        self.encoder = EarthformerEncoder(config)
        self.decoder = EarthformerDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        past_values: torch.Tensor,
        past_covariates: torch.Tensor | None = None,
        future_covariates: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_observed_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EarthformerModelOutput:
        r"""
        Args:
            past_values (`torch.FloatTensor`): context frames (B, T_in, H, W, C) in the model's range.
            past_covariates (`torch.FloatTensor`): covariates of the context, (B, T_in, H, W, num_covariates); of a
                model with `num_covariates`, and only of one.
            future_covariates (`torch.FloatTensor`): covariates of the forecast, (B, T_out, H, W, num_covariates).
            past_observed_mask (`torch.BoolTensor`, *optional*): true where `past_values` was observed, of a shape that
                broadcasts to it. Only the first guess looks at it: other pixels do not move, and none comes from them.

        Returns:
            [`EarthformerModelOutput`] whose `last_hidden_state` has the shape (B, T_out, h_0, w_0, hidden_sizes[0]).

        Raises:
            TypeError: a keyword that neither this method nor the library knows.
            ValueError: an argument has another shape, no samples, or is not floating point; covariates are missing, or
                given to a model that takes none.
        """
        _refuse_unknown(EarthformerModel, kwargs)
        self._check_frames(past_values)
        self._check_covariates(past_values.shape[0], past_covariates, future_covariates)
        record = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        record = {name: value for name, value in record.items() if value is not None}
        tokens, start, guess, reach = self.stem(past_values), None, None, None
        if self.guess_stem is not None:
            guess, reach = self._first_guess(past_values, past_observed_mask)
            start = self.guess_stem(torch.cat([guess, reach], dim=-1))
        if self.covariate_stem is not None:
            tokens, drivers = tokens + self.covariate_stem(past_covariates), self.covariate_stem(future_covariates)
            start = drivers if start is None else start + drivers
        encoded = self.encoder(tokens, return_dict=True, **record)
        decoded = self.decoder(encoded.memories, start, return_dict=True, **record)
        return EarthformerModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.get("cross_attentions"),
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            first_guess=guess,
            reach=reach,
        )

    def _first_guess(
        self, past_values: torch.Tensor, past_observed_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        if past_observed_mask is not None:
            past_observed_mask = _expanded_mask("past_observed_mask", past_observed_mask, past_values)
        return first_guess(
            config.first_guess, past_values, config.prediction_length, config.num_output_channels, past_observed_mask
        )

    def _check_frames(self, past_values: torch.Tensor):
        config = self.config
        expected = (config.context_length, *config.image_size, config.num_channels)
        if past_values.ndim != 5 or tuple(past_values.shape[1:]) != expected or past_values.shape[0] == 0:
            raise ValueError(
                f"`past_values` must have shape (batch, time, height, width, channels) = (at least 1, "
                f"{', '.join(map(str, expected))}), got {tuple(past_values.shape)}."
            )
        if not past_values.is_floating_point():
            raise ValueError(f"`past_values` must be floating point, got {past_values.dtype}.")
        if past_values.dtype == torch.float64 and self.dtype != torch.float64:
            raise ValueError(f"`past_values` must be {self.dtype} as the weights are, got {past_values.dtype}.")

    def _check_covariates(
        self, batch: int, past_covariates: torch.Tensor | None, future_covariates: torch.Tensor | None
    ):
        config = self.config
        for name, covariates, time in (
            ("past_covariates", past_covariates, config.context_length),
            ("future_covariates", future_covariates, config.prediction_length),
        ):
            if not config.num_covariates:
                if covariates is not None:
                    raise ValueError(f"`{name}` must be omitted: this model has num_covariates=0.")
                continue
            expected = (batch, time, *config.image_size, config.num_covariates)
            if covariates is None:
                raise ValueError(f"`{name}` is missing: it must have shape {expected}.")
            if tuple(covariates.shape) != expected or not covariates.is_floating_point():
                raise ValueError(
                    f"`{name}` must be floating point of shape (batch, time, height, width, covariates) = {expected}, "
                    f"got {covariates.dtype} of shape {tuple(covariates.shape)}."
                )


class EarthformerForPrediction(EarthformerPreTrainedModel):
    """Earthformer with a head that forecasts frames, and their mean squared error as loss."""

    def __init__(self, config: EarthformerConfig):
        super().__init__(config)
        self.model = EarthformerModel(config)
        self.head = EarthformerHead(config)
        self.linear_forecast = LinearForecast(config) if config.linear_components else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Nothing is added to a first guess before training."""
        super()._init_weights(module)
        if self.config.first_guess is not None and module is self.head.out_proj:
            init.zeros_(module.weight)
        if isinstance(module, LinearForecast):
            module.reset()

    @can_return_tuple
    def forward(
        self,
        past_values: torch.Tensor,
        future_values: torch.Tensor | None = None,
        future_observed_mask: torch.Tensor | None = None,
        past_covariates: torch.Tensor | None = None,
        future_covariates: torch.Tensor | None = None,
        past_observed_mask: torch.Tensor | None = None,
        past_time_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EarthformerPredictionOutput:
        r"""
        Args:
            past_values (`torch.FloatTensor`): context frames (B, T_in, H, W, C) in the model's range.
            future_values (`torch.FloatTensor`, *optional*): the frames that followed, (B, T_out, H, W, C_out).
            future_observed_mask (`torch.BoolTensor`, *optional*): true where `future_values` was observed, of a shape
                that broadcasts to it. The loss is the mean over observed values, and 0 where there are none.
            past_covariates, future_covariates (`torch.FloatTensor`): known drivers of context and forecast,
                (B, T_in, H, W, K) and (B, T_out, H, W, K), of a model with K = `num_covariates`, and only of one.
            past_observed_mask (`torch.BoolTensor`, *optional*): true where `past_values` was observed, of a shape that
                broadcasts to it. Only the first guess looks at it: other pixels do not move, and none comes from them.
            past_time_features (`torch.FloatTensor`): the season of each context frame, (B, T_in, num_time_features),
                as [`EarthformerFeatureExtractor`] makes it from their times; of a model with `num_time_features`, and
                only of one.

        Returns:
            [`EarthformerPredictionOutput`], with `loss` if `future_values` are given.

        Raises:
            TypeError: a keyword that neither this method nor the library knows.
            ValueError: an argument has another shape or dtype than stated; covariates or time features are missing, or
                given to a model that takes none; in a forecast, which is in evaluation mode and without
                `future_values`, `past_values` are not finite.

        Example:

        ```python
        >>> import torch
        >>> from earthformer_hf import EarthformerForPrediction

        >>> model = EarthformerForPrediction.from_pretrained("model_cards/earthformer-radar-tiny")
        >>> model(past_values=torch.rand(1, 13, 128, 128, 1)).predictions.shape
        torch.Size([1, 12, 128, 128, 1])
        ```
        """
        _refuse_unknown(EarthformerForPrediction, kwargs)
        inputs = {"past_covariates": past_covariates, "future_covariates": future_covariates}
        inputs |= {"past_observed_mask": past_observed_mask}
        self._check_time_features(past_values, past_time_features)
        if future_values is None:
            self._check_finite(past_values)
        outputs = self.model(past_values, **inputs, return_dict=True, **kwargs)
        if outputs.first_guess is None:
            predictions = self.head(outputs.last_hidden_state)
        else:
            guess = torch.cat([outputs.first_guess, outputs.reach], dim=-1)
            correction = self.head(outputs.last_hidden_state, guess)
            if self.config.correction_weights is not None:
                weights = correction.new_tensor(self.config.correction_weights)
                correction = correction * weights[:, None, None, None]
            predictions = outputs.first_guess + correction
        if self.linear_forecast is not None:
            predictions = predictions + self.linear_forecast(past_values, past_time_features)
        if self.config.calibration is not None:
            predictions = calibrated(predictions, self.config.calibration)
        loss = None
        if future_values is not None:
            loss = self._loss(predictions, future_values, future_observed_mask)
        return EarthformerPredictionOutput(
            loss=loss,
            predictions=predictions,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def _check_time_features(self, past_values: torch.Tensor, past_time_features: torch.Tensor | None):
        count = self.config.num_time_features
        if past_time_features is None and count:
            raise ValueError(f"`past_time_features` is missing: this model has num_time_features={count}.")
        if past_time_features is not None and not count:
            raise ValueError("`past_time_features` must be omitted: this model has num_time_features=0.")
        expected = (past_values.shape[0], self.config.context_length, count)
        if past_time_features is not None and (
            tuple(past_time_features.shape) != expected or not past_time_features.is_floating_point()
        ):
            raise ValueError(
                f"`past_time_features` must be floating point of shape (batch, time, features) = {expected}, got "
                f"{past_time_features.dtype} of shape {tuple(past_time_features.shape)}."
            )

    def _check_finite(self, past_values: torch.Tensor):
        """Of a forecast alone: in training the loss tells, and a graph or the meta device has no values to look at."""
        looks = not self.training and past_values.device.type != "meta" and not torch.compiler.is_compiling()
        if looks and not torch.isfinite(past_values).all():
            raise ValueError("`past_values` must be finite: fill missing values first, as the feature extractor does.")

    def _loss(self, predictions, future_values, future_observed_mask):
        if future_values.shape != predictions.shape or not future_values.is_floating_point():
            raise ValueError(
                f"`future_values` must be floating point of shape {tuple(predictions.shape)}, "
                f"got {future_values.dtype} of shape {tuple(future_values.shape)}."
            )
        error = (predictions - future_values).float()
        if future_observed_mask is None:
            return error.square().mean()
        observed = _expanded_mask("future_observed_mask", future_observed_mask, error)
        # where before the square: a missing value may be stored as NaN, and must not reach the gradient either.
        return torch.where(observed, error, 0.0).square().sum() / observed.sum().clamp(min=1)


__all__ = ["EarthformerForPrediction", "EarthformerModel", "EarthformerPreTrainedModel"]
