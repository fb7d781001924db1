"""How fast evaluation is, against a plain forward of the same model.

Tokens a second that `evaluate` scores (padding not counted) in minimal pairs, multiple choice and running text, and
those of the stock model's forward with its head on windows of 1,024 tokens, measured right before and after each.
Every sixth question of a file is taken.

    SECATEUR_DATA=folder python benchmarks/evaluation.py
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import _common
import _reference
import torch

from secateur.checkpoint.source import open_source
from secateur.corpus.windows import windows
from secateur.measure.choices import read_questions, score_questions
from secateur.measure.model import load_model
from secateur.measure.perplexity import perplexity
from secateur.measure.scoring import NextTokenScorer
from secateur.verbs.calibration import load_tokenizer

FORWARDS = 6


def main() -> None:
    data = _common.data_folder()
    folder = open_source("demo").folder
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    text = (data / "wikitext2-raw-test.txt").read_text(encoding="utf-8")
    cut = windows(text, tokenizer, 1024, 2 * FORWARDS)
    scored = _count_tokens()

    def forward() -> float:
        with torch.inference_mode():
            started = time.monotonic()
            for window in cut[:FORWARDS]:
                model(input_ids=window[None], use_cache=False)
            return FORWARDS * 1024 / (time.monotonic() - started)

    forward()
    rows: list[dict[str, Any]] = []
    for name in (*_reference.QUESTIONS, "running text"):
        before, scored[0] = forward(), 0
        started = time.monotonic()
        if name == "running text":
            perplexity(model, cut)
        else:
            questions = read_questions(data / name)
            score_questions(model, tokenizer, dataclasses.replace(questions, items=questions.items[::6]))
        speed = scored[0] / (time.monotonic() - started)
        plain = (before + forward()) / 2
        rows.append({"what": name, "tokens/s": speed, "forward, tokens/s": plain, "ratio": speed / plain})
    _common.store("evaluation", " ".join(__doc__.split("\n\n")[1].split()), rows)


def _count_tokens() -> list[int]:
    """Count every token that is scored from now on."""
    count = [0]
    original = NextTokenScorer.__call__

    def counted(self: Any, tokens: Any, scored: Any, attention_mask: Any = None) -> Any:
        count[0] += int(attention_mask.sum()) if attention_mask is not None else tokens.numel()
        return original(self, tokens, scored, attention_mask)

    NextTokenScorer.__call__ = counted
    return count


if __name__ == "__main__":
    main()
