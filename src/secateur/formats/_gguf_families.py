"""The model families of which llama.cpp computes the same function, and what a file must tell it about them.

Every number comes from the model's config: a pruned model has fewer heads, groups or hidden units than its sizes would
suggest. What llama.cpp has no field for is refused, and a window that it does not know shortens the context length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from secateur.errors import UnsupportedModelError
from secateur.formats._gguf_rope import rope_facts
from secateur.progress import Reporter

Facts = dict[str, Any]
"""Key of the file -> value: bool, int, float, str, or a list of one of them."""


@dataclass(frozen=True)
class Family:
    """How a family of transformers looks in llama.cpp."""

    architecture: str
    interleaved: bool = False
    """Rotary embedding turns neighbours, (0, 1), (2, 3) ...; transformers turns halves, so rows of Q and K move."""
    norm_shift: float = 0.0
    """Added to the weights of norms: transformers multiplies by 1 + w, llama.cpp by w."""
    square: bool = False
    """All heads together must be as wide as the model."""
    unless: str = ""
    """The family whose architecture serves a model that is not."""
    partial_rotary: bool = False
    """Only a part of each head may be turned."""
    activation: str = "silu"
    rope_types: frozenset[str] = frozenset({"default", "linear", "yarn"})


_ROPE = frozenset({"default", "linear", "yarn"})
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", interleaved=True, rope_types=_ROPE | {"llama3"}),
    "mistral": Family("llama", interleaved=True, rope_types=_ROPE | {"llama3"}),
    "qwen2": Family("qwen2", square=True, unless="llama"),  # a Llama with biases on Q, K and V
    "qwen3": Family("qwen3"),
    "gemma3_text": Family("gemma3", norm_shift=1.0, activation="gelu_pytorch_tanh", rope_types=_ROPE - {"yarn"}),
    "phi3": Family("phi3", square=True, partial_rotary=True, rope_types=frozenset({"default", "longrope"})),
    "smollm3": Family("smollm3", interleaved=True),
}
"""Model type of config.json -> family."""


@dataclass(frozen=True)
class Sizes:
    """The dimensions of a model."""

    blocks: int
    hidden: int
    inner: int
    heads: int
    groups: int
    head: int
    vocabulary: int


def family_of(config: Any, name: str) -> Family:
    """The family of a model.

    Raises:
        UnsupportedModelError: when llama.cpp does not know it, or we do not know how it is called there.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"{name} is of family '{kind}', which has no mapping to GGUF",
            hint=f"families with one: {', '.join(FAMILIES)}",
        )
    family, sizes = FAMILIES[kind], sizes_of(config)
    return FAMILIES[family.unless] if family.unless and sizes.heads * sizes.head != sizes.hidden else family


def sizes_of(config: Any) -> Sizes:
    """Read the dimensions off a config."""
    heads = int(config.num_attention_heads)
    return Sizes(
        blocks=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        inner=_number(config.intermediate_size, "intermediate_size"),
        heads=heads,
        groups=_number(getattr(config, "num_key_value_heads", None) or heads, "num_key_value_heads"),
        head=_number(getattr(config, "head_dim", None) or config.hidden_size // heads, "head_dim"),
        vocabulary=int(config.vocab_size),
    )


def _number(value: Any, what: str) -> int:
    """One number for all blocks; some configs have one for each.

    Raises:
        UnsupportedModelError: when blocks differ.
    """
    values = {int(one) for one in value} if isinstance(value, Iterable) else {int(value)}
    if len(values) != 1:
        raise UnsupportedModelError(
            f"{what} differs from block to block ({sorted(values)}); llama.cpp has one number for all of this family",
            hint="export a model whose blocks are alike",
        )
    return values.pop()


def facts_of(config: Any, family: Family, reporter: Reporter) -> tuple[Facts, dict[str, list[float]]]:
    """What llama.cpp must know of the model, and the values of tensors that transformers computes from the config.

    Raises:
        UnsupportedModelError: when the config asks for something that llama.cpp does not do in this family.
    """
    sizes = sizes_of(config)
    _refuse(config, family, sizes)
    context, window = int(config.max_position_embeddings), _window(config)
    arch = family.architecture
    facts: Facts = {}
    if arch == "gemma3":
        facts |= _sliding(config, arch)
    elif window is not None and window < context:
        reporter.warn(
            f"llama.cpp has no sliding window in this family: the context length is set to its {window:,} tokens "
            f"(not {context:,}), up to which it makes no difference"
        )
        context = window
    if arch == "phi3":
        facts[f"{arch}.attention.sliding_window"] = 0  # without it older versions assume one
    facts |= {
        f"{arch}.block_count": sizes.blocks,
        f"{arch}.context_length": context,
        f"{arch}.embedding_length": sizes.hidden,
        f"{arch}.feed_forward_length": sizes.inner,
        f"{arch}.attention.head_count": sizes.heads,
        f"{arch}.attention.head_count_kv": sizes.groups,
        f"{arch}.attention.key_length": sizes.head,
        f"{arch}.attention.value_length": sizes.head,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.vocab_size": sizes.vocabulary,
    }
    turned, tensors = rope_facts(config, arch, sizes.head, family.rope_types, partial=family.partial_rotary)
    return facts | turned, tensors


def expected_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes by the name in a block (or in the file, for what is in no block), of all families together."""
    queries, values = sizes.heads * sizes.head, sizes.groups * sizes.head
    hidden, inner = sizes.hidden, sizes.inner
    shapes = {
        "token_embd.weight": (sizes.vocabulary, hidden),
        "output.weight": (sizes.vocabulary, hidden),
        "attn_q.weight": (queries, hidden),
        "attn_k.weight": (values, hidden),
        "attn_v.weight": (values, hidden),
        "attn_qkv.weight": (queries + 2 * values, hidden),
        "attn_output.weight": (hidden, queries),
        "ffn_gate.weight": (inner, hidden),
        "ffn_up.weight": (inner, hidden),
        "ffn_down.weight": (hidden, inner),
        "attn_q_norm.weight": (sizes.head,),
        "attn_k_norm.weight": (sizes.head,),
    }
    norms = ("output_norm", "attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
    biases = {f"{name.removesuffix('.weight')}.bias": (shape[0],) for name, shape in shapes.items() if len(shape) == 2}
    return shapes | biases | {f"{name}.weight": (hidden,) for name in norms}


def _refuse(config: Any, family: Family, sizes: Sizes) -> None:
    """Name what llama.cpp would compute differently."""
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    width = sizes.heads * sizes.head
    scale = getattr(config, "query_pre_attn_scalar", None)
    # llama.cpp knows the one Gemma 3 that scales otherwise by its number of blocks
    wanted = sizes.hidden / sizes.heads if sizes.blocks == 62 else sizes.head
    reasons = {
        f"its activation is {activation}, not {family.activation}": activation != family.activation,
        f"its heads have {width} outputs in all, not hidden_size = {sizes.hidden}": family.square
        and width != sizes.hidden,
        f"query_pre_attn_scalar is {scale}, not {wanted:g}": scale is not None and scale != wanted,
        "it caps its logits (softcapping)": bool(
            getattr(config, "final_logit_softcapping", None) or getattr(config, "attn_logit_softcapping", None)
        ),
        "it attends in both directions": bool(getattr(config, "use_bidirectional_attention", False)),
        "its blocks without rotary embedding are not every fourth": not _every_fourth(config, sizes.blocks),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedModelError(
                f"llama.cpp cannot run this {config.model_type} model: {reason}",
                hint="run the folder with transformers; only the shape that llama.cpp builds in can be exported",
            )


def _every_fourth(config: Any, blocks: int) -> bool:
    """SmolLM 3 leaves out rotary embedding in every fourth block; llama.cpp has that built in."""
    turned = getattr(config, "no_rope_layers", None)
    return turned is None or [bool(one) for one in turned[:blocks]] == [(i + 1) % 4 != 0 for i in range(blocks)]


def _window(config: Any) -> int | None:
    """Tokens that a block with a sliding window looks back at most; None when no block has one."""
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else config.model_type in ("mistral", "phi3")
    window = getattr(config, "sliding_window", None)
    return int(window) if slides and window else None


def _sliding(config: Any, arch: str) -> Facts:
    """Which blocks have a window: all but every p-th, or one by one where the blocks follow no such rule."""
    kinds = [kind == "sliding_attention" for kind in config.layer_types[: config.num_hidden_layers]]
    periods = (p for p in range(1, len(kinds) + 2) if kinds == [i % p < p - 1 for i in range(len(kinds))])
    return {
        f"{arch}.attention.sliding_window": int(config.sliding_window),
        f"{arch}.attention.sliding_window_pattern": next(periods, kinds),
    }
