"""Tiny .gguf files, written with the gguf package."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

VOCABULARY, HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 64, 32, 64, 4, 2, 2
EXPERT = 768  # what transformers takes for granted, since the file's own number is not read


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    quantisation: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0,
    tied: bool = True,
    extra: dict[str, tuple[int, ...]] | None = None,
    without: tuple[str, ...] = (),
    experts: int = 0,
    pre: str = "",
) -> Path:
    """A random model of ``LAYERS`` blocks. ``extra`` adds or replaces tensors by shape; ``without`` leaves some out."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(EXPERT)
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    tokens = ["<unk>", "<s>", "</s>", *(chr(i) for i in range(65, 65 + VOCABULARY - 4)), "ab"]
    writer.add_token_list(tokens[:VOCABULARY])
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, 3] + [1] * (VOCABULARY - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    random = np.random.default_rng(0)
    for name, shape in ({**shapes(tied, experts), **(extra or {})}).items():
        if name in without:
            continue
        values = random.normal(0, 0.1, shape).astype(np.float32)
        if len(shape) > 1:
            writer.add_tensor(name, gguf.quantize(values, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shapes(tied: bool, experts: int) -> dict[str, tuple[int, ...]]:
    narrow = HIDDEN * KV_HEADS // HEADS
    table: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        table["output.weight"] = (VOCABULARY, HIDDEN)
    for i in range(LAYERS):
        block = f"blk.{i}."
        table |= {
            block + "attn_norm.weight": (HIDDEN,),
            block + "ffn_norm.weight": (HIDDEN,),
            block + "attn_q.weight": (HIDDEN, HIDDEN),
            block + "attn_k.weight": (narrow, HIDDEN),
            block + "attn_v.weight": (narrow, HIDDEN),
            block + "attn_output.weight": (HIDDEN, HIDDEN),
        }
        if experts:
            table |= {
                block + "attn_q_norm.weight": (HIDDEN // HEADS,),
                block + "attn_k_norm.weight": (HIDDEN // HEADS,),
                block + "ffn_gate_inp.weight": (experts, HIDDEN),
                block + "ffn_gate_exps.weight": (experts, EXPERT, HIDDEN),
                block + "ffn_up_exps.weight": (experts, EXPERT, HIDDEN),
                block + "ffn_down_exps.weight": (experts, HIDDEN, EXPERT),
            }
        else:
            table |= {
                block + "ffn_gate.weight": (INNER, HIDDEN),
                block + "ffn_up.weight": (INNER, HIDDEN),
                block + "ffn_down.weight": (HIDDEN, INNER),
            }
    return table
