r"""The pre-tokenizers that llama.cpp knows by name, and what each is in a tokenizer.json: one table, read both ways.

A .gguf file names its pre-tokenizer (``tokenizer.ggml.pre``), a tokenizer.json describes it, and both mean a list of
regular expressions, each of which cuts the pieces that the one before it left. Two tokenizers with the same list cut
every text alike, so the list is the identity; the stock converter recognises a tokenizer by what it makes of one text.
The expressions are those of the published tokenizer.json files (Llama 3, Qwen 2, SmolLM, Mistral Nemo, Phi-4 mini).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BYTE_LEVEL = "the expression built into ByteLevel"
"""Stands for GPT-2's own expression, which tokenizer.json does not spell out."""
DIGIT = r"\p{N}"
_CASELESS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_START, _UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA3 = _CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
QWEN2 = _CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
TEKKEN = f"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|{DIGIT}|{_REST_SLASH}"
GPT4O = f"{_START}{_UPPER}*{_LOWER}+{_CASELESS}?|{_START}{_UPPER}+{_LOWER}*{_CASELESS}?|\\p{{N}}{{1,3}}|{_REST_SLASH}"


@dataclass(frozen=True)
class PreTokenizer:
    """``whole_words``: a piece that is a token as it stands is never merged from smaller ones (``ignore_merges``)."""

    name: str
    steps: tuple[str, ...]
    whole_words: bool = False


# Of several names with the same meaning the first one is written; all of them are read.
KNOWN = (
    PreTokenizer("gpt-2", (BYTE_LEVEL,)),
    PreTokenizer("smollm", (DIGIT, BYTE_LEVEL)),
    PreTokenizer("llama-bpe", (LLAMA3,), whole_words=True),
    PreTokenizer("smaug-bpe", (LLAMA3,)),
    PreTokenizer("dbrx", (LLAMA3,)),
    PreTokenizer("qwen2", (QWEN2,)),
    PreTokenizer("deepseek-r1-qwen", (QWEN2,)),
    PreTokenizer("tekken", (TEKKEN,), whole_words=True),
    PreTokenizer("gpt-4o", (GPT4O,)),
)


def recognise(tokenizer: Mapping[str, Any]) -> PreTokenizer | None:
    """The pre-tokenizer of a tokenizer.json as llama.cpp knows it; None when it has no name there."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    whole = bool(tokenizer["model"].get("ignore_merges"))
    same = [known for known in KNOWN if known.steps == steps]
    return next((known for known in same if known.whole_words == whole), None)


def _steps(part: Any) -> tuple[str, ...] | None:
    """The expressions of one pre-tokenizer or a sequence of them; None for what is no list of expressions."""
    parts = part.get("pretokenizers", [part]) if isinstance(part, dict) else []
    steps: list[str] = []
    byte_level = False
    for one in parts:
        kind, pattern = one.get("type"), one.get("pattern", {})
        # "remove what does not match" is the same as "cut out what matches": these expressions match every character
        cuts = (one.get("behavior"), bool(one.get("invert"))) in (("Isolated", False), ("Removed", True))
        if kind == "ByteLevel" and not one.get("add_prefix_space"):
            byte_level = True
            if one.get("use_regex", True):
                steps.append(BYTE_LEVEL)
        elif kind == "Split" and "Regex" in pattern and cuts:
            steps.append(pattern["Regex"])
        elif kind == "Digits" and one.get("individual_digits"):
            steps.append(DIGIT)
        else:
            return None
    return tuple(steps) if byte_level else None


def describe(name: str) -> tuple[dict[str, Any], bool] | None:
    """What a name of llama.cpp's is in a tokenizer.json: ``pre_tokenizer`` and ``ignore_merges``; None: unknown."""
    known = next((known for known in KNOWN if known.name == name), None)
    if known is None:
        return None
    parts: list[dict[str, Any]] = []
    for step in known.steps:
        if step == DIGIT:
            parts.append({"type": "Digits", "individual_digits": True})
        elif step != BYTE_LEVEL:
            parts.append({"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False})
    use_regex = BYTE_LEVEL in known.steps
    parts.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex})
    return {"type": "Sequence", "pretokenizers": parts}, known.whole_words
