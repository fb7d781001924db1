"""The proof of a .gguf file: llama.cpp cuts text as the folder's tokenizer does, and predicts what transformers does.

Both compute with the file's own numbers, so what quantising costs is one thing (told, not judged) and whether llama.cpp
runs the same model is another (judged).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import psutil
import torch

from secateur.corpus.load import load_text
from secateur.corpus.windows import windows
from secateur.errors import CalibrationError, RunError, VerificationError
from secateur.formats._gguf_vocabulary import load_tokenizer
from secateur.formats.gguf import GGUFPlan, values_of
from secateur.measure.llama_cpp import INSTALL, PACKAGE, LlamaCpp, is_installed
from secateur.measure.model import load_model
from secateur.progress import Reporter

POSITIONS = 256
"""Next tokens that are compared; 200 at least, when the model's context is short."""
TOP = 10
"""Likeliest tokens that are compared at each position, besides the one that follows in the text."""
NEW_TOKENS = 64
TOLERANCE = {"f32": 0.005, "f16": 0.03, "bf16": 0.1}
"""Mean difference of log-probabilities, nats. llama.cpp rounds inputs of a matrix to the format of its weights."""
TOLERANCE_QUANTISED = 0.3
"""The same where it rounds them to 8 bits."""
ODD = (
    "  two spaces,\ttab\t and 12345 digits 3.14",
    "line\n\n\nlines \n  \n 7 eleven",
    "don't WON'T we'll I'M",
    "Ünïcödé, ½ of 第三, дом, עברית, हिन्दी",
    "🙂🙃 👩‍👩‍👧 e\u0301 é",
    "def f(x):\n    return x**2 # comment\n",
    "",
)
"""Where tokenizers part ways: white space, digits, contractions, scripts, emoji, combining marks, code."""


@dataclass
class _Reference:
    """What transformers says, at every position: of the whole vocabulary with the file's weights (positions,
    vocabulary), and of the tokens that follow in the text with the folder's weights (positions,).
    """

    table: torch.Tensor
    folder: torch.Tensor


def prove(plan: GGUFPlan, file: Path, quantize: str, reporter: Reporter) -> dict[str, Any]:
    """Run a file in llama.cpp and compare; empty when it could not be run, which is said.

    Raises:
        VerificationError: when llama.cpp does not open the file, cuts plain text otherwise, or predicts something else.
    """
    if not is_installed():
        reporter.warn(f"llama.cpp did not check the file: {PACKAGE} is not installed ({INSTALL})")
        return {}
    needed = 5 * sum(math.prod(one.shape) for one in plan.tensors) + file.stat().st_size
    if needed > psutil.virtual_memory().available:
        reporter.warn("llama.cpp did not check the file: the model does not fit in memory in float32 beside it")
        return {}
    tokenizer = load_tokenizer(plan.folder)
    text = load_text("builtin", "measure").text
    context = int(plan.facts[f"{plan.architecture}.context_length"])
    length = min(POSITIONS + 1, context)
    try:
        rows = windows(text, tokenizer, length, math.ceil(200 / (length - 1)))
    except CalibrationError as error:
        reporter.warn(f"llama.cpp did not check the file: {error.message}")
        return {}
    reporter.stage("compare with llama.cpp", 3)
    reference = _reference(plan, file, rows)
    reporter.advance("transformers")
    threads = torch.get_num_threads()
    try:
        with LlamaCpp(file, context=length + 8, threads=threads, exact=True) as exact:
            checked: dict[str, Any] = {"package": f"{PACKAGE} {exact.ask('load')['version']}"}
            checked |= _compare_tokens(exact, tokenizer, text, file, reporter)
            scores = [exact.ask("score", tokens=row.tolist(), top=TOP)["scores"] for row in rows]
        reporter.advance("log-probabilities")
        checked |= _compare_scores(scores, rows, reference, quantize, file)
        prompt = rows[0].tolist()[: max(1, min(length, context - NEW_TOKENS))]
        with LlamaCpp(file, context=len(prompt) + NEW_TOKENS + 8, threads=threads, exact=False) as usual:
            checked |= {"threads": threads, **usual.ask("speed", tokens=prompt, new_tokens=NEW_TOKENS)}
        reporter.advance("speed")
    except RunError as error:
        raise VerificationError(f"llama.cpp cannot run {file.name}: {error.message}", hint=error.hint) from error
    return checked


def _reference(plan: GGUFPlan, file: Path, rows: torch.Tensor) -> _Reference:
    """Ask transformers, first with the folder's weights, then with the file's."""
    model = load_model(plan.folder, device="cpu", dtype="float32")
    folder = _log_probabilities(model, rows).gather(1, rows[:, 1:].reshape(-1, 1))[:, 0]
    parameters = model.state_dict()  # the tensors themselves: what is copied into them, the model computes with
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    with torch.no_grad():
        for one in plan.tensors:
            if one.key:
                parameters[one.key].copy_(one.restore(values_of(file, stored[one.name])))
    return _Reference(_log_probabilities(model, rows), folder)


def _log_probabilities(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """(rows, length) tokens to (rows * (length - 1), vocabulary)."""
    with torch.inference_mode():
        logits = [model(row[None], use_cache=False).logits[0, :-1].float() for row in rows]
    return torch.log_softmax(torch.cat(logits), -1)


def _compare_tokens(
    llama: LlamaCpp, tokenizer: Any, text: str, file: Path, reporter: Reporter
) -> dict[str, Any]:  # fmt: skip
    """Cut texts both ways. Plain text must come out the same; where odd text does not, that is told."""
    plain = [part.strip() for part in re.split(r"\n\s*\n", text)[:40] if part.strip()]
    differing = {}
    for kind, texts in (("plain", plain), ("odd", list(ODD))):
        wanted = {one: list(tokenizer(one).input_ids) for one in texts}
        known = [one for one, ids in wanted.items() if _represents(tokenizer, one, ids)]
        found = llama.ask("tokenize", texts=known)["ids"]
        differing[kind] = [one for one, ids in zip(known, found, strict=True) if ids != wanted[one]]
    if differing["plain"]:
        raise VerificationError(
            f"{file.name}: llama.cpp cuts {len(differing['plain'])} of {len(plain)} plain texts otherwise than the "
            f"folder's tokenizer, the first begins {differing['plain'][0][:40]!r}",
            hint="please report this with the name of the model",
        )
    if differing["odd"]:
        examples = ", ".join(repr(one[:24]) for one in differing["odd"])
        reporter.warn(f"llama.cpp cuts some unusual text otherwise than the folder's tokenizer: {examples}")
    return {"texts_tokenised_alike": len(plain) + len(ODD) - len(differing["odd"]), "texts": len(plain) + len(ODD)}


def _represents(tokenizer: Any, text: str, ids: Sequence[int]) -> bool:
    """Whether a vocabulary can write a text at all; what it does with others is nobody's promise."""
    unknown = tokenizer.unk_token_id
    plain = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return (unknown is None or unknown not in ids) and plain.strip() == text.strip()


def _compare_scores(
    scores: Sequence[Sequence[Any]], rows: torch.Tensor, reference: _Reference, quantize: str, file: Path
) -> dict[str, Any]:
    """Log-probabilities of the tokens that follow in the text, and of the likeliest ones."""
    flat = [one for row in scores for one in row]
    places = [place for place, one in enumerate(flat) if one is not None]
    if len(places) < min(200, len(flat)) * 0.9:
        raise VerificationError(f"{file.name}: llama.cpp gave {len(places)} log-probabilities for {len(flat)} tokens")
    targets = rows[:, 1:].reshape(-1)
    pairs: list[tuple[float, float]] = []
    same_best = 0
    for place in places:
        expected = reference.table[place]
        pairs.append((flat[place]["logprob"], float(expected[targets[place]])))
        pairs += [(found, float(expected[token])) for token, found in flat[place]["top"]]
        same_best += flat[place]["top"][0][0] == int(expected.argmax())
    found, wanted = torch.tensor(pairs, dtype=torch.float64).T
    difference = (found - wanted).abs()
    tolerance = TOLERANCE.get(quantize.lower(), TOLERANCE_QUANTISED)
    mean = float(difference.mean())
    if not mean <= tolerance:  # also when it is NaN
        raise VerificationError(
            f"{file.name}: llama.cpp's log-probabilities are {mean:.3g} from those of transformers on average, "
            f"{tolerance:g} is what rounding explains",
            hint="please report this with the name of the model",
        )
    llama = torch.tensor([flat[place]["logprob"] for place in places])
    same = reference.table.gather(1, targets[:, None])[places, 0]
    perplexity, perplexity_same, perplexity_folder = (
        math.exp(-float(one.double().mean())) for one in (llama, same, reference.folder[places])
    )
    return {
        "positions": len(places),
        "mean_difference": mean,
        "largest_difference": float(difference.max()),
        "tolerance": tolerance,
        "same_best": same_best / len(places),
        "perplexity": perplexity,
        "perplexity_transformers": perplexity_same,
        "perplexity_folder": perplexity_folder,
        "perplexity_ratio": perplexity / perplexity_folder,
    }
