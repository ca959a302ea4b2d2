"""What both converters share: rules for options, names of tensors, the folder they write, and the command line."""

import argparse
import hashlib
import re
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import yaml
from safetensors import SafetensorError
from yaml import YAMLError

from earthformer_hf import EarthformerFeatureExtractor, EarthformerForPrediction, PreDiffPipeline, sharing
from earthformer_hf.cuboid import SELF_ATTENTION_PATTERNS


# ---------------------------------------------------------------------------------------------------------------------
# Options: a table of the original's option -> rule. A rule gives arguments of ours, or refuses a value by its name.
# ---------------------------------------------------------------------------------------------------------------------

Options = dict[str, Any]

# Defaults of options that the original has no default for: one must be given, the other is left out.
REQUIRED, LEFT_OUT = object(), object()


def refuse(option: str, value: Any, supported: str) -> NoReturn:
    raise ValueError(f"{option}={value!r} is not supported; {supported}.")


def is_like(value: Any, example: Any) -> bool:
    """Whether a value has an example's type; a list is not empty, and each entry is like the example's first."""
    if isinstance(example, list):
        return isinstance(value, list) and bool(value) and all(is_like(entry, example[0]) for entry in value)
    return type(value) is type(example) or (type(value) is int and type(example) is float)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What becomes of one option.

    Args:
        default: its value where a configuration does not have it; `REQUIRED` or `LEFT_OUT` if there is none.
        example: a value that others must be like in type, where the default does not show it.
        or_list: whether a list of such values is accepted as well.
    """

    default: Any = LEFT_OUT
    example: Any = None
    or_list: bool = False

    def check(self, option: str, value: Any):
        """Refuse a value of another type."""
        example = self.default if self.example is None else self.example
        if value is self.default or is_like(value, example) or (self.or_list and is_like(value, [example])):
            return
        refuse(option, value, f"it must be like {example!r}{' or a list of such' if self.or_list else ''}")

    def arguments(self, option: str, options: Options) -> dict[str, Any]:
        """Our arguments that follow from the option, which is one of all `options`."""
        return {}


@dataclass(frozen=True)
class Rename(Rule):
    """The option is an argument of ours, of another name."""

    argument: str

    def arguments(self, option, options):
        return {self.argument: options[option]} if option in options else {}


@dataclass(frozen=True)
class Translate(Rule):
    """The option is an argument of ours, of another name and with other names of its values (theirs -> ours)."""

    argument: str
    values: Mapping[Any, Any]

    def check(self, option, value):
        if not any(is_like(value, known) and value == known for known in self.values):
            refuse(option, value, f"it must be one of {', '.join(map(repr, self.values))}")

    def arguments(self, option, options):
        return {self.argument: self.values[options[option]]}


@dataclass(frozen=True)
class Compute(Rule):
    """A function makes arguments of ours of this option and others, or refuses what does not fit together."""

    function: Callable[[Options], dict[str, Any]]

    def arguments(self, option, options):
        return self.function(options)


@dataclass(frozen=True)
class Only(Rule):
    """The option must have the value that this package builds in, or `also` one that means the same.

    Args:
        when: whether the original reads the option at all, given all options.
    """

    value: Any
    also: tuple = ()
    when: Callable[[Options], Any] = lambda options: True

    def check(self, option, value):
        supported = (self.value, *self.also)
        if value not in supported and not any(is_like(value, entry) for entry in supported):
            refuse(option, value, f"only {self.value!r}")

    def arguments(self, option, options):
        value = options.get(option, self.value)
        if value not in (self.value, *self.also) and self.when(options):
            refuse(option, value, f"only {self.value!r}")
        return {}


@dataclass(frozen=True)
class Ignore(Rule):
    """Any value is accepted: it does not change what a trained model computes, for the reason that is given."""

    reason: str

    def check(self, option, value):
        pass


@dataclass(frozen=True)
class Alias(Rule):
    """Another name of an option."""

    option: str


def read_options(given: Mapping[str, Any], rules: Mapping[str, Rule]) -> Options:
    """All options by the constructor's names: those given, of the right type, and the defaults of the others.

    Raises:
        ValueError: an option is unknown, of another type, given twice, or missing; the message names it.
    """
    options = {name: rule.default for name, rule in rules.items() if rule.default is not LEFT_OUT}
    for key, value in given.items():
        rule, name = rules.get(key), key
        if isinstance(rule, Alias):
            rule, name = rules[rule.option], rule.option
            if name in given:
                refuse(key, value, f"{name} is given too")
        if rule is None:
            refuse(key, value, "it is no option of the original")
        rule.check(key, value)
        options[name] = value
    for name, value in options.items():
        if value is REQUIRED:
            raise ValueError(f"{name} must be given, like {rules[name].example!r}.")
    return options


def convert_options(given: Mapping[str, Any], rules: Mapping[str, Rule], prefix: str = "") -> dict[str, Any]:
    """Our arguments for the original's options.

    Args:
        given: name -> value, as in a configuration of the original.
        rules: for every option that the original has.
        prefix: before the names of options in messages.

    Raises:
        ValueError: an option is unknown, or has a value that this package does not have; the message names it.
    """
    arguments: dict[str, Any] = {}
    try:
        options = read_options(given, rules)
        for name, rule in rules.items():
            arguments |= rule.arguments(name, options)
    except ValueError as reason:
        raise ValueError(f"{prefix}{reason}") from None
    return arguments


def options_named_in(message: str, given: Mapping[str, Any], rules: Mapping[str, Rule]) -> list[str]:
    """The original's options that those arguments of ours come from which a message names; the given ones, if any."""
    options = read_options(given, rules)
    named = [
        name
        for name, rule in rules.items()
        if any(re.search(rf"\b{argument}\b", message) for argument in rule.arguments(name, options))
    ]
    names_given = {rule.option if isinstance(rule := rules[key], Alias) else key for key in given}
    return [name for name in named if name in names_given] or named


# Both originals have the same cuboid layers, and options of the same names for them.
PADDING = {"zeros": False, "ignore": True}  # whether padding is masked
PATTERN_NAMES = {"spatial_lg_v1": "spatial_lg_4", "video_swin": "video_swin_2x4"}


def convert_pattern(option: str, name: str, known: Collection[str] = SELF_ATTENTION_PATTERNS) -> str:
    """Our name of a pattern of cuboids.

    Raises:
        ValueError: this package has no such pattern.
    """
    name = PATTERN_NAMES.get(name, name)
    if re.sub(r"\d+", "#", name) not in known:
        refuse(option, name, f"only {', '.join(known)} ('#' is a number)")
    return name


def level_channels(options: Options, levels: int) -> list[int]:
    """Channels of each level, from `base_units`, `block_units` and `scale_alpha`."""
    base, units = options["base_units"], options["block_units"]
    if units and units[0] != base:
        refuse("block_units", units, f"the first must be base_units, {base}")
    growth = 2 ** options["scale_alpha"]
    return units or [base * int(growth**level) for level in range(levels)]


# ---------------------------------------------------------------------------------------------------------------------
# Tensors: a table of regular expression -> replacement. The first that matches is applied.
# ---------------------------------------------------------------------------------------------------------------------

LAYER_NAMES = [
    (r"\.T_embed\.", r".time."),
    (r"\.H_embed\.", r".height."),
    (r"\.W_embed\.", r".width."),
    (r"\.HW_embed\.", r".place."),
    (r"\.ffn_l\.(\d+)\.ffn_1\.", r".feed_forwards.\1.up."),
    (r"\.ffn_l\.(\d+)\.ffn_2\.", r".feed_forwards.\1.down."),
    (r"\.ffn_l\.(\d+)\.layer_norm\.", r".feed_forwards.\1.norm."),
    (r"\.attn_l\.(\d+)\.relative_position_bias_table$", r".attentions.\1.relative_position_bias"),
    (r"\.attn_l\.(\d+)\.proj\.", r".attentions.\1.out_proj."),
    (r"\.attn_l\.(\d+)\.q_proj\.", r".attentions.\1.query."),
    (r"\.attn_l\.(\d+)\.kv_proj\.", r".attentions.\1.key_value."),
    (r"\.attn_l\.(\d+)\.global_vec_norm\.", r".attentions.\1.global_norm."),
    (r"\.attn_l\.(\d+)\.global_proj\.", r".attentions.\1.global_out_proj."),
    (r"\.attn_l\.(\d+)\.l2g_q_net\.", r".attentions.\1.read_query."),
    (r"\.attn_l\.(\d+)\.l2g_global_kv_net\.", r".attentions.\1.read_global_key_value."),
    (r"\.attn_l\.(\d+)\.g2l_global_q_net\.", r".attentions.\1.update_global_query."),
    (r"\.attn_l\.(\d+)\.g2l_k_net\.", r".attentions.\1.update_key."),
    (r"\.attn_l\.(\d+)\.g2l_v_net\.", r".attentions.\1.update_value."),
    (r"\.attn_l\.(\d+)\.g2g_global_qkv_net\.", r".attentions.\1.update_global_qkv."),
    (r"\.attn_l\.(\d+)\.", r".attentions.\1."),  # norm, qkv, global_qkv
]

# Tensors that are dropped, by the names that they would have here, with the reason.
POSITION_INDEX = (r"\.relative_position_index$", "an index that is computed where it is used")


def unused_update_of_global_vectors(last_block: str) -> tuple[str, str]:
    """The same for the last attention block (a pattern) that updates global vectors."""
    reason = "updates global vectors that nothing reads, and never received a gradient"
    return last_block + r"\.attentions\.\d+\.(update_\w+|global_out_proj)\.(weight|bias)$", reason


class Conversion(NamedTuple):
    """Tensors by our names; original name -> our name; original name -> why it is dropped."""

    tensors: dict[str, torch.Tensor]
    renamed: dict[str, str]
    dropped: dict[str, str]


def rename_first(name: str, rules: Iterable[tuple[str, str]]) -> str | None:
    """A name after the first rule that matches it; None if there is none."""
    for pattern, replacement in rules:
        if re.search(pattern, name):
            return re.sub(pattern, replacement, name)
    return None


def match_tensors(
    renamed_tensors: Iterable[tuple[str, str, torch.Tensor]],
    expected: Mapping[str, torch.Tensor],
    drop_rules: Iterable[tuple[str, str]],
    source: str = "checkpoint",
) -> Conversion:
    """Put every tensor, once, where it belongs.

    Args:
        renamed_tensors: original name, our name, tensor.
        expected: the state dict of our model.
        drop_rules: pattern of our names and reason, for tensors that our model does not have.
        source: begins every message.

    Raises:
        ValueError: a tensor is unknown, missing, used twice, of another shape or type, or not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    renamed, dropped = {}, {}
    for name, target, tensor in renamed_tensors:
        if target not in expected:
            reasons = [reason for pattern, reason in drop_rules if re.search(pattern, target)]
            if not reasons:
                raise ValueError(
                    f"{source}: tensor {name!r} has no place in a model of this configuration ({target})."
                )
            dropped[name] = reasons[0]
            continue
        if target in tensors:
            raise ValueError(f"{source}: two tensors become {target!r}, the second is {name!r}.")
        if tensor.shape != expected[target].shape:
            raise ValueError(
                f"{source}: tensor {name!r} must have shape {tuple(expected[target].shape)} in this configuration, "
                f"got {tuple(tensor.shape)}."
            )
        if tensor.is_floating_point() != expected[target].is_floating_point():
            raise ValueError(f"{source}: tensor {name!r} must be of {expected[target].dtype}, got {tensor.dtype}.")
        if not tensor.isfinite().all():
            raise ValueError(f"{source}: tensor {name!r} holds values that are infinite or not a number.")
        tensors[target] = tensor
        renamed[name] = target
    missing = sorted(set(expected) - set(tensors))
    if missing:
        raise ValueError(f"{source}: {len(missing)} tensors are missing, the first is {missing[0]!r} (our name).")
    return Conversion(tensors, renamed, dropped)


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]


def read_recipe(name: str) -> dict[str, Any]:
    """A file of `examples/configs`."""
    return yaml.safe_load((ROOT / f"examples/configs/{name.replace('-', '_')}.yaml").read_text(encoding="utf-8"))


def read_model_block(path: Path) -> dict[str, Any]:
    """The `model:` block of a configuration file of an original.

    Raises:
        ValueError: there is none.
    """
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, YAMLError) as reason:
        raise ValueError(f"config_path: {path} is no YAML: {reason}") from None
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise ValueError(f"config_path: {path} has no top-level `model:` block.")
    return document["model"]


def conversion_section(command: str, sources: Iterable[tuple[Path, Conversion]]) -> str:
    """What a card says about where the weights come from: command, digests, and what became of every tensor."""
    lines, tables = ["```", command, "```", ""], []
    for path, conversion in sources:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines += [f"`{path.name}`, SHA-256 `{digest}`:", "", f"- {len(conversion.renamed)} tensors were renamed."]
        for reason, count in Counter(conversion.dropped.values()).items():
            lines.append(f"- {count} were dropped: {reason}.")
        lines.append("")
        tables += ["<details>", f"<summary>Every tensor of {path.name}</summary>", ""]
        tables += ["| name in the original | name here |", "|---|---|"]
        tables += [f"| `{name}` | `{target}` |" for name, target in conversion.renamed.items()]
        tables += [f"| `{name}` | dropped: {reason} |" for name, reason in conversion.dropped.items()]
        tables += ["", "</details>", ""]
    lines += ["The weights were saved and loaded again; outputs on a fixed input are those from before.", ""]
    return "\n".join(lines + tables)


def released_card(name: str, section: str) -> str | None:
    """The card of `model_cards/NAME` with the section on the conversion, or None if there is no such card."""
    path = ROOT / "model_cards" / name / "README.md"
    if not path.is_file():
        return None
    unchecked = "We know no SHA-256 of the released files, so it was not checked whether these are the ones."
    return f"{path.read_text(encoding='utf-8')}\n## Conversion\n\n{section}\n{unchecked}\n"


Converted = TypeVar("Converted", EarthformerForPrediction, PreDiffPipeline)


def compare_and_export(
    model: Converted,
    outputs: Callable[[Converted], list[torch.Tensor]],
    output_dir: Path,
    card: str,
    extractor: EarthformerFeatureExtractor | None = None,
    overwrite: bool = False,
) -> Converted:
    """Save, load again, compare what both compute, and export what was loaded; returns it.

    Args:
        outputs: of a model on a fixed input.
        card: the text of the folder's card.

    Raises:
        ValueError: the reloaded model computes something else, or `output_dir` holds something else.
    """
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        reloaded = type(model).from_pretrained(temporary)
        for before, after in zip(outputs(model), outputs(reloaded)):
            if not torch.allclose(before, after, rtol=0, atol=1e-6 * float(before.abs().max())):
                raise ValueError("checkpoint: what was saved and loaded again computes something else.")
        readme = Path(temporary) / "README.md"
        readme.write_text(card, encoding="utf-8")
        sharing.export(reloaded, output_dir, extractor, readme, overwrite)
    return reloaded


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

# What ends a command with one line instead of a traceback.
ERRORS = (ValueError, TypeError, IndexError, OSError, RuntimeError, SafetensorError, UnpicklingError)


def add_shared_arguments(parser: argparse.ArgumentParser, presets: Collection[str]):
    configuration = parser.add_mutually_exclusive_group(required=True)
    configuration.add_argument("--config_path", type=Path, help="configuration of the original (.yaml)")
    configuration.add_argument("--preset", choices=presets, help="a published setting instead")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that output_dir holds")


def command_for_card(script: str, arguments: argparse.Namespace) -> str:
    """The command with paths that do not name the folders of the machine it ran on."""
    parts = ["python", f"conversion/{script}"]
    for name, value in vars(arguments).items():
        if value is not None and name != "overwrite":
            parts += [f"--{name}", value.resolve().name if isinstance(value, Path) else value]
    return shlex.join(parts)


def run(parser: argparse.ArgumentParser, convert: Callable[[argparse.Namespace], str]) -> int:
    """Run a conversion with the command's arguments and print what it returns; an error becomes one line.

    Returns:
        The exit status.
    """
    arguments = parser.parse_args()
    try:
        message = convert(arguments)
    except ERRORS as reason:
        print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
        return 1
    print(message)
    return 0


__all__ = [
    "Alias", "Compute", "Conversion", "Ignore", "LAYER_NAMES", "LEFT_OUT", "Only", "Options", "PADDING",
    "POSITION_INDEX", "REQUIRED", "Rename", "Rule", "Translate", "add_shared_arguments", "command_for_card",
    "compare_and_export", "conversion_section", "convert_options", "convert_pattern", "is_like", "level_channels",
    "match_tensors", "options_named_in", "read_model_block", "read_recipe", "refuse", "released_card", "rename_first",
    "run", "unused_update_of_global_vectors",
]  # fmt: skip
