"""Tiny random models of each family, made from their config classes, and a tiny tokenizer to go with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 128
_TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA_LIKE = {
    **_TEXT,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}

# family -> (config class, model class, config values)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_LLAMA_LIKE, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _LLAMA_LIKE),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _LLAMA_LIKE),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_LLAMA_LIKE, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _LLAMA_LIKE),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", _LLAMA_LIKE),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**_TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            **_TEXT,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {
            **_TEXT,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", {**_TEXT, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {**_TEXT, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256},
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        {
            **_TEXT,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
    ),
    "roberta": (
        "RobertaConfig",
        "RobertaForMaskedLM",
        {
            **_TEXT,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 258,
        },
    ),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {**_TEXT, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 256},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            **_TEXT,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "num_labels": 3,
        },
    ),
}

_MIXTURE = {**_LLAMA_LIKE, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    **_MIXTURE, "num_hidden_layers": 3, "num_key_value_heads": 4, "head_dim": 4, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1, "n_routed_experts": 8,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Eight experts each, two of them for a token, but for Llama 4 and Switch, which take one.
    "mixtral_8": ("MixtralConfig", "MixtralForCausalLM", {**_MIXTURE, "num_local_experts": 8}),
    "qwen3_moe_8": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_MIXTURE, "num_experts": 8, "norm_topk_prob": True}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_MIXTURE, "num_experts": 8, "shared_expert_intermediate_size": 24},
    ),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {**_LLAMA_LIKE, "num_experts": 8, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **_LLAMA_LIKE,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        {
            **_LLAMA_LIKE,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
            "num_hidden_layers": 3,
        },
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        {**_LLAMA_LIKE, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", _LATENT),
    "phimoe": (
        "PhimoeConfig",
        "PhimoeForCausalLM",
        {**_LLAMA_LIKE, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            **_LLAMA_LIKE,
            "num_local_experts": 8,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 1,
        },
    ),
    "switch": (
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        {
            **_TEXT,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_heads": 4,
            "num_experts": 8,
            "decoder_start_token_id": 0,
        },
    ),
    "jetmoe": (
        "JetMoeConfig",
        "JetMoeForCausalLM",
        {**_LLAMA_LIKE, "num_local_experts": 8, "num_experts_per_tok": 2, "kv_channels": 8},
    ),
}
"""Mixtures of experts, built as `FAMILIES` are."""


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of a family, in eval mode. Weights have a spread that keeps the outputs away from ties."""
    config_name, model_name, values = {**FAMILIES, **MIXTURES}[family]
    config = getattr(transformers, config_name)(**{**values, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)._from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.15)
    return model.eval()


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte value below 125, three special tokens: any ASCII text has as many tokens as characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    for code in range(3, VOCABULARY):
        vocabulary[chr(code)] = code
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>", fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def save_tiny(
    folder: Path, family: str, *, max_shard_size: str = "5GB", dtype: torch.dtype | None = None, **changes: Any
) -> Path:
    """Write a tiny model (and tokenizer, where it reads text) as an ordinary folder."""
    model = tiny_model(family, **changes)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if family != "vit":
        tiny_tokenizer().save_pretrained(folder)
    return folder


def calibration_for(family: str, *, rows: int = 24, length: int = 32, seed: int = 7) -> Any:
    """Token ids (rows, length), or batches of random images for a vision model."""
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        return [{"pixel_values": torch.randn(4, 3, 32, 32, generator=generator)} for _ in range(6)]
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)
