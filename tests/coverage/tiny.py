"""A tiny random model of any family: the entries of its config class are made small by what their names say.

No family is named here. A few recipes with other proportions are tried, then the defaults divided by a common factor,
then the defaults with few layers; the first that builds, is small and runs a forward is taken.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

VOCABULARY = 512
LAYERS = 4
MOST_PARAMETERS = 20_000_000
MOST_WEIGHTS_OF_DEFAULTS = 30_000_000


@dataclass(frozen=True)
class Proportions:
    """Sizes of one recipe. ``divide`` scales the defaults instead, ``keep`` leaves all but numbers of layers."""

    hidden: int = 64
    heads: int = 8
    head: int = 8
    ffn: int = 96
    divide: bool = False
    keep: bool = False


RECIPES = (
    Proportions(),
    Proportions(head=16),
    Proportions(heads=4, head=16),
    Proportions(hidden=128, head=16, ffn=192),
    Proportions(hidden=128, heads=4, head=32, ffn=256),
    Proportions(divide=True),
    Proportions(keep=True),
)

Make = Callable[[int, Proportions], int]

# The first pattern that matches the whole name of an integer entry says its value.
RULES: list[tuple[str, Make]] = [
    (r"(.*_)?pad(_token)?_(id|index|idx)|padding_idx", lambda old, p: 0),
    (r"bos_(token_id|index)", lambda old, p: 1),
    (r"eos_(token_id|index)", lambda old, p: 2),
    (r".*(token_id|token_index|_index|_token)", lambda old, p: old if old < VOCABULARY else 300 + old % 97),
    (r".*vocab.*|n_words|n_token|.*codebook_size", lambda old, p: min(old, VOCABULARY)),
    (r".*(kv_shared|mtp|nextn|predict)_?layers.*", lambda old, p: 0 if old < LAYERS else 2),
    (r"first_k_dense_replace|.*dense_layers", lambda old, p: min(old, 1)),
    (r"max_window_layers", lambda old, p: 2),
    (r".*_(layer|attn|expert)_period|.*_(layer|attn)_interval", lambda old, p: min(old, 2)),
    (r".*_(layer|attn|expert)_offset", lambda old, p: min(old, 1)),
    (r"(.*_)?(num_hidden_layers|n_layers?|num_layers|layers|num_blocks|depth)", lambda old, p: min(old, LAYERS)),
    (r"(.*_)?num_(encoder|decoder)_layers", lambda old, p: min(old, LAYERS)),
    (r"(.*_)?(linear_)?num_key_heads", lambda old, p: p.heads // 2),
    (r"(n_)?mamba_(n_|num_)?heads", lambda old, p: 2 * p.hidden // 16),
    (r"mamba_(d_)?head(_dim|dim)?", lambda old, p: 16),
    (r"(.*_)?(num_(\w+_)?heads|n_heads?|attention_heads|nhead)", lambda old, p: p.heads),
    (r"(mamba_)?n_?groups|n_group|topk_group|num_expert_group", lambda old, p: min(old, 1)),
    (r"qk_rope_head_dim|rotary_dim", lambda old, p: 8),
    (r"(.*_)?(head_dim|d_kv|dim_head|attention_head_size|kv_channels|d_head|\w+_head_dim)", lambda old, p: p.head),
    (r".*lora_rank", lambda old, p: 24),
    (r".*(d_state|state_size)", lambda old, p: 16),
    (r".*(experts_per_tok(en)?|top_?k|moe_k|topk)", lambda old, p: min(old, 2)),
    (r".*shared_experts?", lambda old, p: min(old, 1)),
    (r".*(num|n_routed|n|local)_experts", lambda old, p: min(old, 4)),
    (r".*(moe|expert|shared)\w*_(intermediate_size|hidden_size|dim)", lambda old, p: 32),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|dff|n_inner|inner_dim|d_inner)", lambda old, p: p.ffn),
    (r"(.*_)?(mlp_dim|mlp_hidden_dim)", lambda old, p: p.ffn),
    (r"(.*_)?(ffn_hidden_size|dim_ff|hidden_dim|feedforward_dim|intermediate_dim)", lambda old, p: p.ffn),
    (r"(.*_)?(hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_size|embedding_dim|d_embed|d_model_size)",
     lambda old, p: p.hidden),
    (r"dim|width|model_dim|d_embedding|.*proj_dim|projection_dim|.*projection_size|true_hidden_size|lru_width",
     lambda old, p: p.hidden),
    (r"(.*_)?(max_position_embeddings|n_positions|max_(source|target)_positions|max_seq_len|context_length)",
     lambda old, p: min(old, 256)),
    (r".*(sliding_window|attention_window|local_attention|block_size|window_attention).*", lambda old, p: min(old, 16)),
    (r"(.*_)?window_size", lambda old, p: min(old, 2)),
    (r"(.*_)?image_size", lambda old, p: min(old, 64)),
    (r"(.*_)?patch_size", lambda old, p: min(old, 16)),
    (r"num_patches", lambda old, p: min(old, 16)),
    (r"hash_seed", lambda old, p: 0),
    (r".*chunk_size", lambda old, p: min(old, 16)),
    (r".*axial_pos_shape", lambda old, p: 16),
]  # fmt: skip


# Entries that models cannot do without, though their default is empty.
NEEDED: tuple[tuple[str, Any], ...] = (
    (r"default_language", "en_XX"),
    (r"head_dim", 8),
    (r"num_key_value_heads", 4),
    (r"num_experts_per_tok", 2),
    (r"n_routed_experts", 4),
)


class NotBuiltError(Exception):
    """No recipe makes a small model of this family that runs."""


@dataclass
class Tiny:
    """A model, the arguments of a forward that it runs, and the number of the recipe that made it."""

    model: transformers.PreTrainedModel
    inputs: dict[str, torch.Tensor]
    recipe: int


def tiny_model(config_class: Any, model_class: Any, seed: int = 0, *, decoder: bool = False) -> Tiny:
    """The first small model that runs.

    Args:
        decoder: whether a config that can be that of an encoder or a decoder is to be the latter's.

    Raises:
        NotBuiltError: with what stopped the first recipe.
    """
    first = ""
    for number, proportions in enumerate(RECIPES):
        try:
            config = tiny_config(config_class, proportions, decoder=decoder)
            with torch.device("meta"):
                size = sum(one.numel() for one in model_class._from_config(config).parameters())
            most = MOST_WEIGHTS_OF_DEFAULTS if proportions.keep else MOST_PARAMETERS
            if size > most:
                raise ValueError(f"{size:,} parameters are not tiny")
            model = randomized(model_class._from_config(config).eval(), seed)
            return Tiny(model, _accepted(model), number)
        except Exception as error:  # noqa: BLE001 - whatever a config or a model raises: this recipe does not suit
            first = first or f"{type(error).__name__}: {_line(error)}"
    raise NotBuiltError(first)


def tiny_config(config_class: Any, proportions: Proportions, *, decoder: bool = False) -> Any:
    """A config of a class with small entries, in nested configs too."""
    default = config_class()
    values = small_values(default, proportions)
    if decoder and hasattr(default, "is_decoder"):
        values["is_decoder"] = True
    made = config_class(**values)
    lists = _shorter_lists(default, made)
    try:
        return config_class(**{**values, **lists, **_both_kinds(config_class(**{**values, **lists}))})
    except Exception:  # noqa: BLE001 - a config that knows no other kind of layer
        return config_class(**{**values, **lists})


def _both_kinds(made: Any) -> dict[str, Any]:
    """Every second layer a full attention, where a short model would have got none beside its linear ones."""
    names = {field.name for field in dataclasses.fields(made)}
    return {
        name: [kind if place % 2 == 0 else "full_attention" for place, kind in enumerate(value)]
        for name in ("layer_types", "layers_block_type")
        if name in names and set(value := getattr(made, name, None) or []) in ({"linear_attention"}, {"mamba"})
    }


def small_values(default: Any, proportions: Proportions) -> dict[str, Any]:
    """Small values for the entries that a config's constructor takes."""
    names = {field.name for field in dataclasses.fields(default)} if dataclasses.is_dataclass(default) else set()
    aliases = dict(getattr(type(default), "attribute_map", {}))
    values: dict[str, Any] = {}
    for name in sorted(names):
        old = _value_of(default, name)
        if isinstance(old, transformers.PreTrainedConfig):
            part = tiny_config(type(old), proportions)
            values[name] = part
            continue
        if re.fullmatch(r"attn_layer_(indices|ids)", name) and not old:
            values[name] = [1]
        stated = next(field.default for field in dataclasses.fields(default) if field.name == name)
        if old is None and (said := next((new for word, new in NEEDED if re.fullmatch(word, name)), None)) is not None:
            values[name] = {"head_dim": proportions.head, "num_key_value_heads": proportions.heads // 2}.get(name, said)
        if stated is None and not isinstance(old, list | tuple | dict):
            continue  # the config makes it from other entries
        if name == "rope_parameters" or name.endswith("rope_scaling"):
            continue
        new = _small(name, old, default, proportions, aliases)
        if new != old:
            values[name] = new
    return values


def _value_of(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001 - an entry that differs between layers has no value of its own
        return vars(config).get(name)


def _small(name: str, old: Any, default: Any, proportions: Proportions, aliases: dict[str, str]) -> Any:
    if isinstance(old, bool) or not isinstance(old, int | list | tuple):
        return old
    if isinstance(old, list | tuple):
        return _small_list(name, old, proportions)
    if proportions.keep or proportions.divide:
        rule = _rule(name)
        if (
            re.search(r"token|vocab|layers?$|depth|num_blocks|experts|position|window|image_size|group|top", name)
            and rule
        ):
            return rule(old, proportions)
        return _divided(name, old, default) if proportions.divide else old
    if name == aliases.get("hidden_size"):
        heads = getattr(default, "num_heads", None)
        return proportions.hidden if not isinstance(heads, list | tuple) else 8 * heads[0]
    if name == "embed_dim" and isinstance(getattr(default, "num_heads", None), list | tuple):
        return 8 * default.num_heads[0]
    if re.fullmatch(r"(.*_)?(num_key_value_heads|num_kv_heads|n_kv_heads?)", name):
        every = getattr(default, "num_attention_heads", None)
        return 1 if old == 1 else proportions.heads if old == every else proportions.heads // 2
    rule = _rule(name)
    return rule(old, proportions) if rule else old


def _rule(name: str) -> Make | None:
    return next((make for pattern, make in RULES if re.fullmatch(pattern, name)), None)


def _divided(name: str, old: int, default: Any) -> int:
    """Widths divided by what brings the hidden size near 64; heads keep their number, so that products still fit."""
    hidden = next((getattr(default, key) for key in ("hidden_size", "d_model", "embed_dim", "dim")
                   if isinstance(getattr(default, key, None), int)), 64)  # fmt: skip
    factor = 1
    while hidden // (2 * factor) >= 64 and hidden % (2 * factor) == 0:
        factor *= 2
    if re.search(r"size|dim|width|channels|inner|embd|d_model|d_ff|rank", name) and "kernel" not in name:
        return old // factor if old % factor == 0 and old // factor >= 4 else old
    return old


def _small_list(name: str, old: list[Any] | tuple[Any, ...], proportions: Proportions) -> Any:
    if not old or not all(type(value) is int for value in old):
        return old
    kind = type(old)
    if re.search(r"depths|num_layers|layers$|num_blocks", name):
        return kind(min(value, 2) for value in old)
    if re.search(r"hidden_sizes|embed_dims|stage_channels|encoder_hidden|neck_hidden", name) and not proportions.keep:
        divisor = max(1, old[0] // 32)
        return kind(value // divisor for value in old) if all(value % divisor == 0 for value in old) else old
    if re.search(r"attention_window|image_size|axial_pos_shape", name):
        rule = _rule(name)
        return kind(rule(value, proportions) for value in old) if rule else old
    return old


def _shorter_lists(default: Any, made: Any) -> dict[str, Any]:
    """Lists with an entry a layer, for the new number of layers: every kind of layer that there was, when it fits."""
    changed: dict[str, Any] = {}
    was, now = (getattr(config, "num_hidden_layers", None) for config in (default, made))
    if not isinstance(was, int) or not isinstance(now, int) or was == now:
        return changed
    names = {field.name for field in dataclasses.fields(made)}
    for name, value in made.to_dict().items():
        if isinstance(value, list) and len(value) == was and name in names:
            kinds = list(dict.fromkeys(map(repr, value)))
            if set(map(repr, value[:now])) == set(kinds) or len(kinds) > now:
                changed[name] = value[:now]
            else:
                first = [value[list(map(repr, value)).index(kind)] for kind in kinds]
                changed[name] = (first * now)[:now]
        mapped = dict(getattr(type(made), "attribute_map", {})).get(name)
        if mapped in changed:
            changed.pop(name, None)
    return changed


def randomized(model: transformers.PreTrainedModel, seed: int) -> transformers.PreTrainedModel:
    """Random weights, biases and norms alike, so that a slice that is missing anywhere shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.nan_to_num_(0.0).mul_(1 + 0.1 * noise).add_(0.05 * noise)
    model.tie_weights()
    return model


def inputs_of(model: transformers.PreTrainedModel, rows: int, length: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Arguments of a forward that may suit the model, the likeliest first."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or VOCABULARY
    ids = torch.randint(3, min(vocabulary, 290), (rows, length), generator=generator)
    text = {"input_ids": ids}
    size = next((value for part in (model.config, getattr(model.config, "vision_config", None))
                 if (value := getattr(part, "image_size", None)) is not None), 64)  # fmt: skip
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(model.config, "num_channels", 3)
    pixels = {"pixel_values": torch.randn(rows, channels, height, width, generator=generator)}
    both = {"input_ids": ids[:, : length // 2], "decoder_input_ids": ids[:, length // 2 :]}
    if model.main_input_name == "pixel_values":
        return [pixels, text]
    return [both, text] if model.config.is_encoder_decoder else [text, both, {"inputs": ids}]


def answer(model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits or last hidden states, without a cache."""
    cached = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
    with torch.no_grad():
        try:
            output = model(**inputs, **cached)
        except TypeError:
            output = model(**inputs)
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value.float()
    return (output[0] if isinstance(output, tuple) else next(iter(output.values()))).float()


def _accepted(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    problem: Exception | None = None
    for inputs in inputs_of(model, 1, 48, 3):
        try:
            found = answer(model, inputs)
        except Exception as error:  # noqa: BLE001 - the next kind of input is tried
            problem = problem or error
            continue
        if not torch.isfinite(found).all():
            raise ValueError("its outputs are not finite")
        return inputs
    assert problem is not None
    raise problem


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
