"""Loading and pushing a PreDiff pipeline: by the classes of this package and of diffusers, and by no other code."""

import json
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import PreTrainedModel


_DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
_LOADING_ARGUMENTS = (
    *_DOWNLOAD_ARGUMENTS, "variant", "dtype", "torch_dtype", "device_map", "max_memory", "offload_folder",
    "offload_state_dict", "quantization_config", "low_cpu_mem_usage", "disable_mmap", "use_safetensors",
    "trust_remote_code",
)  # fmt: skip


class PreDiffHubMixin:
    """What [`PreDiffPipeline`] does otherwise than [`~diffusers.DiffusionPipeline`]: it runs no code of a folder, and
    is pushed with its own."""

    _component_classes: Callable[[], dict[str, type]]  # what each component is loaded as

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> Self:
        r"""
        Load a pipeline from a folder or a hub id, always with the classes of this package and of diffusers: code that
        lies beside the weights is never run.

        Args:
            variant (`str`, *optional*): such as "fp16"; weights of other variants are not downloaded.
            dtype or torch_dtype (`torch.dtype`, `str` or `dict`, *optional*): one for all networks, or per component
                with "default" for the rest; float32 if omitted.
            vae, unet, scheduler, alignment, feature_extractor, forecaster: components to use instead of the stored
                ones.
            use_safetensors (`bool`, *optional*): only True, since other weights are never loaded.
            trust_remote_code (`bool`, *optional*): changes nothing.
            kwargs: `device_map`, `max_memory`, `offload_folder`, `offload_state_dict`, `quantization_config`,
                `low_cpu_mem_usage`, `disable_mmap`, `cache_dir`, `force_download`, `local_files_only`, `token` and
                `revision`, as in [`~diffusers.DiffusionPipeline.from_pretrained`].

        Raises:
            ValueError: an argument that is not listed here, a folder that is mistyped or no such pipeline, or weights
                that are no safetensors or do not fit it.
        """
        unknown = sorted(set(kwargs) - {*cls._component_classes(), *_LOADING_ARGUMENTS})
        if unknown:
            raise ValueError(f"{cls.__name__}.from_pretrained: it does not take {unknown}.")
        if kwargs.get("use_safetensors") not in (None, True):
            raise ValueError(f"{cls.__name__}.from_pretrained: `use_safetensors` must be True, got False.")
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            if find_spec(f"{__package__}.sharing") is not None:
                import_module(f"{__package__}.sharing.loading").refuse_mistyped(folder)
            folder = Path(cls.download(str(pretrained_model_name_or_path), **kwargs))
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder}: no pipeline, it holds no model_index.json.")
        index = cls.load_config(folder)
        for name, component in cls._component_classes().items():
            if issubclass(component, torch.nn.Module) and name in index and name not in kwargs:
                _check_weights(component, folder / name, kwargs.get("variant"))
        dtype = _as_dtype(kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None))
        kwargs |= {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
        pipeline = super().from_pretrained(folder, **kwargs)  # type: ignore[misc]
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipeline

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """Fetch a hub repository's configurations and safetensors of one `variant`, without those of components that
        are given; arguments as in `from_pretrained`. Returns the folder."""
        components = [name for name in cls._component_classes() if name not in kwargs]
        options = {name: kwargs[name] for name in _DOWNLOAD_ARGUMENTS if name in kwargs}
        return snapshot_download(
            pretrained_model_name, allow_patterns=_files(components, kwargs.get("variant")), **options
        )

    @classmethod
    def load_config(cls, *args, **kwargs):
        """The index of components, with the classes to load them with: what the stored one names is never imported.

        Raises:
            ValueError: an entry that is no pair of names, or a scheduler that diffusers does not have.
        """
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        index["_class_name"] = cls.__name__
        for name, component in cls._component_classes().items():
            entry = index.pop(name, None) or [None, None]
            if not (isinstance(entry, list) and len(entry) == 2):
                raise ValueError(f"model_index.json: {name!r} must be a pair of names, got {entry!r}.")
            if entry[1] is None:
                continue
            if name == "scheduler":
                component = scheduler_class(entry[1])
            library = "diffusers" if component.__module__.startswith("diffusers.") else component.__module__
            index[name] = [library, component.__name__]
        return loaded

    @classmethod
    def _get_signature_types(cls):
        """For `from_pipe`, which takes over a network only if its very class is named here, and for loading by the
        code of a hub repository, which diffusers runs once per component and so makes several classes of that name."""
        classes = cls._component_classes()
        networks = {name: (classes[name], ModelMixin) for name in ("unet", "alignment")}
        networks["forecaster"] = (classes["forecaster"], PreTrainedModel)
        return super()._get_signature_types() | networks

    def push_to_hub(
        self, repo_id, commit_message=None, private=None, token=None, create_pr=False, safe_serialization=True,
        variant=None, subfolder=None, **options,
    ):  # fmt: skip
        """As [`~diffusers.DiffusionPipeline.push_to_hub`], but with the code of the pipeline, and its card first.

        Args:
            card, tag, revision, tags, max_shard_size: as for [`earthformer_hf.sharing.push`].
        """
        options |= {"commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr}
        options |= {"variant": variant}
        if find_spec(f"{__package__}.sharing") is None:  # this file was downloaded with a pipeline
            return super().push_to_hub(repo_id, safe_serialization=safe_serialization, subfolder=subfolder, **options)
        if not safe_serialization or subfolder:
            raise ValueError(
                f"`safe_serialization` must be True and `subfolder` None, got {safe_serialization} and {subfolder!r}."
            )
        return import_module(f"{__package__}.sharing").push(self, repo_id, **options)


def scheduler_class(name: str) -> type:
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise ValueError(f"model_index.json: {name!r} is no scheduler of diffusers.")
    return found


def _weights(name: str, variant: str | None) -> list[str]:
    """Patterns of the files that hold the weights of a component: of one variant, whole or in shards."""
    stem = "model" if name == "forecaster" else "diffusion_pytorch_model"  # of transformers, of diffusers
    stem = f"{stem}.{variant}" if variant else stem
    return [f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors"]


def _files(components: list[str], variant: str | None) -> list[str]:
    """Patterns of the files to download for these components."""
    patterns = [f"{name}/{pattern}" for name in components for pattern in ("*.json", *_weights(name, variant))]
    return ["model_index.json", *patterns]


def _check_weights(network_class: Any, folder: Path, variant: str | None):
    """Refuse a network's folder without all its weights and no others, as safetensors, or with an adapter."""
    if not folder.is_dir():
        raise ValueError(f"{folder.parent}: the component {folder.name!r} is missing.")
    if (folder / "adapter_config.json").exists():  # which names another model to load in this one's place
        raise ValueError(f"{folder}: it holds adapter_config.json, and adapters are not loaded.")
    indices = [json.loads(path.read_text()) for path in folder.glob("*.safetensors*index*.json")]
    shards = [shard for index in indices for shard in index["weight_map"].values()]
    patterns = _weights(folder.name, variant)
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    if not found or not all(shard.endswith(".safetensors") for shard in shards):
        asked = f"You are trying to load the model files of the `variant={variant}`, but " if variant else ""
        files = sorted(path.name for path in folder.iterdir())
        raise ValueError(f"{asked}{folder} must hold safetensors, {patterns[0]} or shards of that name, got {files}.")
    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config"):
        return  # whose tensors have names of their own
    expected = set(empty_network(network_class, folder).state_dict())
    stored: set[str] = set()
    for path in found:
        with safe_open(path, "pt") as file:
            stored |= set(file.keys())
    if stored != expected:
        missing, unknown = sorted(expected - stored), sorted(stored - expected)
        raise ValueError(
            f"{folder}: the weights do not fit {network_class.__name__} as configured: {len(missing)} tensors are "
            f"missing {missing[:3]}, {len(unknown)} are unknown {unknown[:3]}."
        )


def empty_network(network_class: Any, folder: Path) -> torch.nn.Module:
    """A network of diffusers or transformers as configured in a folder, without memory for weights.

    Raises:
        ValueError: a configuration that cannot work, or would take minutes to build.
    """
    with torch.device("meta"):
        if issubclass(network_class, PreTrainedModel):  # whose configuration checks itself
            return network_class(network_class.config_class.from_pretrained(folder))
        config = network_class.load_config(folder)
        _check_size(config, folder)
        return network_class.from_config(config)


def _check_size(config: dict[str, Any], folder: Path):
    """Refuse a configuration of a network of diffusers that would take minutes to build.

    Raises:
        ValueError: names the entry and the limit.
    """
    for name, value in config.items():
        values = value if isinstance(value, list | tuple) else [value]
        if len(values) > 1000:
            raise ValueError(f"{folder}: `{name}` must have at most 1,000 entries, got {len(values):,}.")
        limit = 100 if "layers" in name or "blocks" in name else 100_000
        if any(isinstance(number, int | float) and number > limit for number in values):
            raise ValueError(f"{folder}: `{name}` must be at most {limit:,}, got {value!r:.60}.")
        if "block" in name and len(values) > 16:
            raise ValueError(f"{folder}: `{name}` must have at most 16 entries, got {len(values):,}.")


def _as_dtype(dtype):
    """A torch.dtype from its name, for every entry of a dict; float32 from None."""
    if isinstance(dtype, dict):
        return {name: _as_dtype(entry) for name, entry in dtype.items()}
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(found, torch.dtype):
        raise ValueError(f"`dtype` must be a torch.dtype, its name such as 'bfloat16', or a dict, got {dtype!r}.")
    return found


__all__ = ["PreDiffHubMixin", "empty_network", "scheduler_class"]
