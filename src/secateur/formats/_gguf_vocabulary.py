"""A tokenizer as llama.cpp stores it: tokens, their kinds, and merges (byte-level BPE) or scores (SentencePiece BPE).

The source is the backend of the fast tokenizer that transformers opens, so what is exported is what the folder does.
llama.cpp merges the pair with the highest score where tokenizers takes the merge of the lowest rank; the rank of the
merge that makes a token, with a minus, is therefore its score.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secateur.checkpoint.pretokenizers import recognise
from secateur.errors import UnsupportedModelError
from secateur.progress import Reporter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens, by llama.cpp's numbers."""
SPACE = "▁"
_UNREACHABLE = -1e9
_KEY = "tokenizer.ggml."


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a folder.

    Raises:
        UnsupportedModelError: when there is none that can be loaded, or only one written in Python.
    """
    from transformers import AutoTokenizer

    hint = "put the tokenizer.json of the model beside its weights"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # every tokenizer class fails in its own way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(f"{folder} has no tokenizer that can be loaded: {reason}", hint=hint) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UnsupportedModelError(f"{folder}: {type(tokenizer).__name__} has no tokenizer.json", hint=hint)
    return tokenizer


def vocabulary_facts(tokenizer: Any, rows: int, reporter: Reporter) -> dict[str, Any]:
    """Everything a file says of its tokenizer.

    Args:
        rows: rows of the embedding; the list of tokens is filled up to that number, or cut.

    Raises:
        UnsupportedModelError: for a tokenizer that llama.cpp cannot imitate; the message says what is foreign to it.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _foreign(f"its model is {model['type']}, not BPE")
    tokens, kinds = _tokens(content, rows, reporter)
    merges = [tuple(one) if isinstance(one, list) else tuple(one.split(" ", 1)) for one in model["merges"]]
    normalizer = json.dumps(content.get("normalizer"), ensure_ascii=False)
    if model.get("byte_fallback"):
        facts = _sentencepiece(tokenizer, content, tokens, kinds, merges, reporter)
    else:
        known = recognise(content)
        if known is None:
            raise _foreign("its pre-tokenizer has no name in llama.cpp")
        if content.get("normalizer") is not None and '"NFC"' not in normalizer:
            raise _foreign("it normalises text before cutting it")
        if any(" " in part for merge in merges for part in merge):
            raise _foreign("its merges hold spaces, so it does not work on bytes")
        facts = {"model": "gpt2", "pre": known.name, "merges": [" ".join(merge) for merge in merges]}
    if not merges:
        raise _foreign("it has no merges")
    if '"NFC"' in normalizer:
        reporter.note("llama.cpp does not bring text into the normal form NFC; most text is in it already")
    facts |= {"tokens": tokens, "token_type": kinds, **_special(tokenizer, rows)}
    chat = {"tokenizer.chat_template": tokenizer.chat_template} if isinstance(tokenizer.chat_template, str) else {}
    return {_KEY + key: value for key, value in facts.items()} | chat


def _foreign(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"llama.cpp cannot imitate this tokenizer: {why}",
        hint="byte-level BPE of the Llama 3, Qwen, SmolLM, GPT-2 kinds and SentencePiece BPE can be exported",
    )


def _tokens(content: dict[str, Any], rows: int, reporter: Reporter) -> tuple[list[str], list[int]]:
    """Texts and kinds by token id, exactly ``rows`` of them."""
    model = content["model"]
    found: dict[int, tuple[str, int]] = {id: (text, NORMAL) for text, id in model["vocab"].items()}
    spaces = bool(model.get("byte_fallback"))
    for added in content["added_tokens"]:
        text = added["content"]
        if added["special"]:
            found[added["id"]] = text, CONTROL
        elif spaces and SPACE in text and not added["normalized"]:
            # Looked for before spaces are replaced, so only merges find it; and llama.cpp writes it out with spaces.
            found[added["id"]] = text, NORMAL
        else:
            found[added["id"]] = text.replace(SPACE, " ") if spaces else text, USER_DEFINED
    if spaces:
        for byte in range(256):
            name = f"<0x{byte:02X}>"
            if name not in model["vocab"]:
                raise _foreign(f"it falls back to bytes but has no token {name}")
            found[model["vocab"][name]] = name, BYTE
        unknown = model.get("unk_token")
        if unknown in model["vocab"]:
            found[model["vocab"][unknown]] = unknown, UNKNOWN
    beyond = sum(id >= rows for id in found)
    if beyond:
        reporter.warn(f"{beyond} tokens of the tokenizer have no row in the embedding and are left out")
    filled = [found.get(id, (f"[PAD{id}]", UNUSED)) for id in range(rows)]
    return [text for text, _ in filled], [kind for _, kind in filled]


def _sentencepiece(
    tokenizer: Any, content: dict[str, Any], tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]],
    reporter: Reporter,
) -> dict[str, Any]:  # fmt: skip
    """Scores, and whether a text gets a space in front."""
    normalizer, cutter = (json.dumps(content.get(part), ensure_ascii=False) for part in ("normalizer", "pre_tokenizer"))
    if SPACE not in normalizer + cutter:
        raise _foreign(f"it does not write spaces as {SPACE}")
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    foreign = _merged_otherwise(tokens, kinds, merges)
    if foreign:
        reporter.warn(
            f"llama.cpp may put {len(foreign):,} tokens together where this tokenizer does not, the first is "
            f"{foreign[0]!r}: its merges are not all that its vocabulary allows"
        )
    scores = [
        -float(ranks[text]) if text in ranks else 0.0 if kind != NORMAL or len(text) == 1 else _UNREACHABLE
        for text, kind in zip(tokens, kinds, strict=True)
    ]
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)
    return {
        "model": "llama",
        "pre": "default",
        "scores": scores,
        "add_space_prefix": bool(pieces) and pieces[0].startswith(SPACE),
    }


def _merged_otherwise(tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]]) -> list[str]:
    """Tokens that are made of two others by no merge of the list; llama.cpp knows no list and would join them."""
    listed = set(merges)
    known = {text for text, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    return [
        text
        for text in known
        if any(
            text[:cut] in known and text[cut:] in known and (text[:cut], text[cut:]) not in listed
            for cut in range(1, len(text))
        )
    ]


def _special(tokenizer: Any, rows: int) -> dict[str, Any]:
    """Ids of the special tokens, and which of them every text gets: by what the tokenizer does, not by its flags."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {name: getattr(tokenizer, f"{attribute}_token_id", None) for name, attribute in names.items()}
    facts: dict[str, Any] = {f"{name}_token_id": int(id) for name, id in ids.items() if id is not None and id < rows}
    plain, full = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    facts["add_bos_token"] = ids["bos"] is not None and full[:1] == [ids["bos"]] and plain[:1] != full[:1]
    facts["add_eos_token"] = ids["eos"] is not None and full[-1:] == [ids["eos"]] and plain[-1:] != full[-1:]
    return facts
