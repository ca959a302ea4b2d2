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

Source: Gao et al., "Earthformer: Exploring Space-Time Transformers for Earth System Forecasting", NeurIPS 2022,
https://arxiv.org/abs/2207.05833, section 3 and appendix A; the decoder with covariates is that of their EarthNet2021
experiment, as released. The attention itself is in `cuboid.py`.
"""

import math
import os
import re
import tempfile
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqModelOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_earthformer import EarthformerConfig
from .cuboid import (
    LEAKY_SLOPE,
    CuboidAttentionBase,
    CuboidCrossAttention,
    CuboidCrossAttentionBlock,
    CuboidSelfAttention,
    CuboidSelfAttentionBlock,
    PatchMerging,
    PositionEmbedding,
    SafeGroupNorm,
    Upsample,
)


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


class EarthformerConvStage(nn.Module):
    """Convolutions (3x3, group norm, leaky ReLU) in each frame: a stage of the stem or of the head."""

    def __init__(self, config: EarthformerConfig, in_channels: int, out_channels: int, num_convs: int):
        super().__init__()
        groups = config.stem_norm_groups or max(1, out_channels // 4)
        layers = []
        for i in range(num_convs):
            layers += [
                nn.Conv2d(in_channels if i == 0 else out_channels, out_channels, kernel_size=3, padding=1),
                SafeGroupNorm(groups, out_channels),
                nn.LeakyReLU(LEAKY_SLOPE),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, H, W, C_in) -> (B, T, H, W, C_out)."""
        frames = hidden_states.flatten(0, 1).permute(0, 3, 1, 2)  # (B * T, C, H, W)
        frames = self.layers(frames)
        return frames.permute(0, 2, 3, 1).unflatten(0, hidden_states.shape[:2])


class EarthformerStem(nn.Module):
    """From frames, or the covariates of frames, to the tokens of level 0."""

    def __init__(self, config: EarthformerConfig, in_channels: int):
        super().__init__()
        channels = [in_channels, *config.stem_channels]
        strides = [(s, s) if isinstance(s, int) else tuple(s) for s in config.stem_strides]
        self.stages = nn.ModuleList(
            EarthformerConvStage(config, before, after, config.stem_num_convs)
            for before, after in zip(channels, channels[1:])
        )
        self.merges = nn.ModuleList(
            PatchMerging(n, n, stride, config.layer_norm_eps) for n, stride in zip(channels[1:], strides)
        )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, T, H, W, C) -> (B, T, h_0, w_0, hidden_sizes[0])."""
        for stage, merge in zip(self.stages, self.merges):
            values = merge(stage(values))
        return values


class EarthformerHead(nn.Module):
    """From the tokens of level 0 back to frames: the stem mirrored, then a linear map to the output channels."""

    def __init__(self, config: EarthformerConfig):
        super().__init__()
        channels = [config.stem_channels[-1], *config.stem_channels[::-1]]
        self.sizes = config.stem_sizes[-2::-1]
        self.upsamples = nn.ModuleList(Upsample(n, n) for n in channels[:-1])
        self.stages = nn.ModuleList(
            EarthformerConvStage(config, before, after, config.head_num_convs)
            for before, after in zip(channels, channels[1:])
        )
        self.out_proj = nn.Linear(channels[-1], config.num_output_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, h_0, w_0, hidden_sizes[0]) -> (B, T, H, W, C_out)."""
        for upsample, stage, size in zip(self.upsamples, self.stages, self.sizes):
            hidden_states = stage(upsample(hidden_states, size))
        return self.out_proj(hidden_states)


_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


class EarthformerPreTrainedModel(PreTrainedModel):
    """Initialisation and loading."""

    config: EarthformerConfig
    config_class = EarthformerConfig
    base_model_prefix = "model"
    main_input_name = "past_values"
    input_modalities = ("time",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["CuboidSelfAttentionBlock", "CuboidCrossAttentionBlock", "PositionEmbedding"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As [`~transformers.PreTrainedModel.from_pretrained`], but never with a part of the weights left random.

        The head as a whole may be missing (it is then initialised, with a warning) or not wanted.

        Raises:
            ValueError: the checkpoint lacks other tensors, or holds tensors that this model does not have.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if pretrained_model_name_or_path is not None and kwargs.get("state_dict") is None:
            head = {name for name in model.state_dict() if name.startswith("head.")}
            missing = set(info["missing_keys"])
            missing -= head if head <= missing else set()
            unexpected = {name for name in info["unexpected_keys"] if head or not name.startswith("head.")}
            if missing or unexpected:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: the weights do not fit {cls.__name__} as configured: "
                    f"{len(missing)} tensors are missing {sorted(missing)[:3]}, "
                    f"{len(unexpected)} are unknown {sorted(unexpected)[:3]}."
                )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, is_main_process: bool = True, **kwargs):
        """As [`~transformers.PreTrainedModel.save_pretrained`]; if it fails, the folder is as it was before."""
        if not is_main_process or kwargs.get("distributed_checkpoint"):
            return super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        folder = Path(save_directory)
        folder.parent.mkdir(parents=True, exist_ok=True)
        kwargs.setdefault("repo_id", folder.name)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            super().save_pretrained(temporary, *args, **kwargs)
            written = {path.name for path in Path(temporary).iterdir()}
            folder.mkdir(exist_ok=True)
            for name in written:
                os.replace(Path(temporary) / name, folder / name)
        if any(_WEIGHTS.fullmatch(name) for name in written):
            for path in folder.iterdir():  # weights of an earlier save with other shards
                if _WEIGHTS.fullmatch(path.name) and path.name not in written:
                    path.unlink()

    @wraps(PreTrainedModel.push_to_hub, assigned=())
    def push_to_hub(self, repo_id: str, **options):  # type: ignore[override]
        """As [`~transformers.PreTrainedModel.push_to_hub`], but with the code of the model, and its card first.

        Args:
            feature_extractor, card, tag, variant: as for [`earthformer_hf.sharing.push`].
        """
        if find_spec(f"{__package__}.sharing") is None:  # this file was downloaded with a model
            return super().push_to_hub(repo_id, **options)
        return import_module(f"{__package__}.sharing").push(self, repo_id, **options)

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

    The start is learned, one embedding per frame and place of the coarsest level; with covariates it is their tokens,
    level by level downwards. Each block of a level attends to itself, then to the memory of that level; the first
    block after a learned start only to the memory.
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

        if config.num_covariates:
            self.down_self_blocks, self.down_cross_blocks = self_blocks(), cross_blocks()
            self.merges = nn.ModuleList(
                PatchMerging(before, after, (2, 2), config.layer_norm_eps) for before, after in zip(sizes, sizes[1:])
            )
            self.self_blocks = self_blocks()
        else:
            self.position_embedding = PositionEmbedding(
                config.prediction_length, config.level_sizes[-1], sizes[-1], config.position_embedding_type
            )
            self.start_proj = nn.Linear(sizes[-1], sizes[-1])
            self.self_blocks = self_blocks(fewer_at_coarsest=1)
        self.cross_blocks = cross_blocks()
        self.upsamples = nn.ModuleList(Upsample(after, before) for before, after in zip(sizes, sizes[1:]))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, memories: tuple[torch.Tensor, ...], covariates: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """memories: one (B, T_in, h_i, w_i, hidden_sizes[i]) per level, finest first -> (B, T_out, h_0, w_0, C).

        covariates: tokens (B, T_out, h_0, w_0, hidden_sizes[0]) of a model with covariates, else None.
        """
        last = len(memories) - 1
        if covariates is None:
            start = self.start_proj(self.position_embedding(memories[-1].device))
            hidden_states = start.expand(memories[-1].shape[0], -1, -1, -1, -1)
        else:
            hidden_states = covariates
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


class EarthformerModel(EarthformerPreTrainedModel):
    """Stem, encoder and decoder: frames in, forecast tokens of level 0 out."""

    def __init__(self, config: EarthformerConfig):
        super().__init__(config)
        self.stem = EarthformerStem(config, config.num_channels)
        self.covariate_stem = EarthformerStem(config, config.num_covariates) if config.num_covariates else None
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
        **kwargs,
    ) -> Seq2SeqModelOutput:
        r"""
        Args:
            past_values (`torch.FloatTensor`): context frames (B, T_in, H, W, C) in the model's range.
            past_covariates (`torch.FloatTensor`): covariates of the context, (B, T_in, H, W, num_covariates); of a
                model with `num_covariates`, and only of one.
            future_covariates (`torch.FloatTensor`): covariates of the forecast, (B, T_out, H, W, num_covariates).

        Returns:
            [`~transformers.modeling_outputs.Seq2SeqModelOutput`] whose `last_hidden_state` has the shape
            (B, T_out, h_0, w_0, hidden_sizes[0]).

        Raises:
            ValueError: an argument has another shape, no samples, or is not floating point; covariates are missing, or
                given to a model that takes none.
        """
        self._check_frames(past_values)
        self._check_covariates(past_values.shape[0], past_covariates, future_covariates)
        record = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        record = {name: value for name, value in record.items() if value is not None}
        tokens, start = self.stem(past_values), None
        if self.covariate_stem is not None:
            tokens = tokens + self.covariate_stem(past_covariates)
            start = self.covariate_stem(future_covariates)
        encoded = self.encoder(tokens, return_dict=True, **record)
        decoded = self.decoder(encoded.memories, start, return_dict=True, **record)
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.get("cross_attentions"),
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
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
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        past_values: torch.Tensor,
        future_values: torch.Tensor | None = None,
        future_observed_mask: torch.Tensor | None = None,
        past_covariates: torch.Tensor | None = None,
        future_covariates: torch.Tensor | None = None,
        **kwargs,
    ) -> EarthformerPredictionOutput:
        r"""
        Args:
            past_values (`torch.FloatTensor`): context frames (B, T_in, H, W, C) in the model's range.
            future_values (`torch.FloatTensor`, *optional*): the frames that followed, (B, T_out, H, W, C_out).
            future_observed_mask (`torch.BoolTensor`, *optional*): true where `future_values` was observed, of a shape
                that broadcasts to it. The loss is the mean over observed values.
            past_covariates, future_covariates (`torch.FloatTensor`): known drivers of context and forecast,
                (B, T_in, H, W, K) and (B, T_out, H, W, K), of a model with K = `num_covariates`, and only of one.

        Returns:
            [`EarthformerPredictionOutput`], with `loss` if `future_values` are given.

        Raises:
            ValueError: an argument has another shape or dtype than stated; covariates are missing, or given to a model
                that takes none.

        Example:

        ```python
        >>> import torch
        >>> from earthformer_hf import EarthformerForPrediction

        >>> model = EarthformerForPrediction.from_pretrained("model_cards/earthformer-radar-tiny")
        >>> model(past_values=torch.rand(1, 13, 128, 128, 1)).predictions.shape
        torch.Size([1, 12, 128, 128, 1])
        ```
        """
        outputs = self.model(past_values, past_covariates, future_covariates, return_dict=True, **kwargs)
        predictions = self.head(outputs.last_hidden_state)
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

    def _loss(self, predictions, future_values, future_observed_mask):
        if future_values.shape != predictions.shape or not future_values.is_floating_point():
            raise ValueError(
                f"`future_values` must be floating point of shape {tuple(predictions.shape)}, "
                f"got {future_values.dtype} of shape {tuple(future_values.shape)}."
            )
        error = (predictions - future_values).float()
        if future_observed_mask is None:
            return error.square().mean()
        if future_observed_mask.dtype != torch.bool:
            raise ValueError(f"`future_observed_mask` must be boolean, got {future_observed_mask.dtype}.")
        try:
            observed = future_observed_mask.expand_as(error)
        except RuntimeError as reason:
            raise ValueError(
                f"`future_observed_mask` must broadcast to {tuple(error.shape)}, "
                f"got {tuple(future_observed_mask.shape)}."
            ) from reason
        # where before the square: a missing value may be stored as NaN, and must not reach the gradient either.
        return torch.where(observed, error, 0.0).square().sum() / observed.sum()


__all__ = ["EarthformerForPrediction", "EarthformerModel", "EarthformerPreTrainedModel"]
