"""Rotary position embedding in llama.cpp's terms; the numbers are those that transformers itself computes."""

from __future__ import annotations

from typing import Any

import numpy as np

from secateur.errors import UnsupportedModelError


def rope_facts(
    config: Any, arch: str, head: int, known: frozenset[str], *, partial: bool
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Keys of the file, and tensors by name, that make llama.cpp turn queries and keys as transformers does.

    Args:
        head: numbers in a head.
        known: kinds of scaling that llama.cpp knows in this family.
        partial: whether less than a whole head may be turned.

    Raises:
        UnsupportedModelError: for a kind of scaling, or a value of it, that llama.cpp does not know.
    """
    given = config.rope_parameters
    sliding = given.get("sliding_attention")
    parameters = given.get("full_attention", given)
    kind = parameters.get("rope_type", "default")
    _refuse(config, parameters, kind, known, partial=partial)
    if sliding is not None and sliding.get("rope_type", "default") != "default":
        raise _unknown(config, f"'{sliding['rope_type']}' in blocks with a sliding window")
    turned = int(head * float(parameters.get("partial_rotary_factor") or 1.0))
    key = f"{arch}.rope."
    facts = {f"{key}dimension_count": turned, f"{key}freq_base": float(parameters["rope_theta"])}
    if sliding is not None:
        facts[f"{key}freq_base_swa"] = float(sliding["rope_theta"])
    tensors: dict[str, list[float]] = {}
    if kind == "llama3":
        tensors["rope_freqs.weight"] = _slowed(config, parameters, turned)
    elif kind != "default":
        facts[f"{key}scaling.type"] = kind
    if kind in ("linear", "yarn"):
        facts[f"{key}scaling.factor"] = float(parameters["factor"])
    if kind == "yarn":
        original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        facts[f"{key}scaling.original_context_length"] = int(original)
        facts[f"{key}scaling.yarn_beta_fast"] = float(parameters.get("beta_fast") or 32)
        facts[f"{key}scaling.yarn_beta_slow"] = float(parameters.get("beta_slow") or 1)
    if kind == "longrope":
        facts[f"{key}scaling.original_context_length"] = int(parameters["original_max_position_embeddings"])
        facts[f"{key}scaling.attn_factor"] = float(_transformers(config, kind)[1])
        for length in ("long", "short"):
            tensors[f"rope_factors_{length}.weight"] = [float(one) for one in parameters[f"{length}_factor"]]
    return facts, tensors


def _refuse(config: Any, parameters: dict[str, Any], kind: str, known: frozenset[str], *, partial: bool) -> None:
    if kind not in known:
        raise _unknown(config, f"'{kind}'")
    if not partial and float(parameters.get("partial_rotary_factor") or 1.0) != 1.0:
        raise _unknown(config, "of a part of each head")
    if kind == "yarn":
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if parameters.get(name) is not None:
                raise _unknown(config, f"'yarn' with {name}")
        if parameters.get("truncate") is False:
            raise _unknown(config, "'yarn' without truncation")


def _unknown(config: Any, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"llama.cpp does not know the rotary embedding {what} in a {config.model_type} model",
        hint="run the folder with transformers instead",
    )


def _transformers(config: Any, kind: str) -> tuple[Any, float]:
    """Frequencies and the factor on queries and keys, as transformers computes them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return frequencies, float(factor)


def _slowed(config: Any, parameters: dict[str, Any], turned: int) -> list[float]:
    """By how much each frequency is lower than without scaling: llama.cpp divides by these numbers."""
    frequencies, _ = _transformers(config, "llama3")
    plain = float(parameters["rope_theta"]) ** -(np.arange(0, turned, 2, dtype=np.float64) / turned)
    return [float(one) for one in plain / frequencies.double().numpy()]
