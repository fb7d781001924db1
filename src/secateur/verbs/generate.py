"""`secateur generate`: let a model continue a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.checkpoint.source import open_source
from secateur.errors import UnsupportedModelError, UsageError
from secateur.measure.model import load_model
from secateur.progress import Reporter
from secateur.runtime.loop import continue_tokens
from secateur.verbs.calibration import load_tokenizer


def generate(
    model: str | Path | transformers.PreTrainedModel,
    prompt: str,
    *,
    tokenizer: Any = None,
    new_tokens: int = 64,
    seed: int = 0,
    temperature: float = 0.0,
    chat: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    stream: Callable[[str], None] | None = None,
    reporter: Reporter | None = None,
) -> str:
    """Continue a prompt; returns the new text only.

    Args:
        model: a folder, hub id, ``.gguf`` file, ``demo``, or a model in memory (with its ``tokenizer``).
        new_tokens: at most so many; an end-of-text token ends it sooner.
        seed: of the drawing; without temperature nothing is drawn.
        temperature: 0 takes the likeliest token each time.
        chat: put the prompt into the model's chat template as the user's message.
        stream: is given the text piece by piece while it is made; the pieces together are what is returned.

    Raises:
        UsageError: for an argument that makes no sense, or ``chat`` on a model without a template.
        SourceError: when the model cannot be found or opened.
        UnsupportedModelError: when the model does not generate text.
    """
    if new_tokens < 1:
        raise UsageError(f"new_tokens is {new_tokens}", hint="it must be at least 1")
    if not temperature >= 0:
        raise UsageError(f"temperature is {temperature}", hint="0 is greedy; larger draws more freely")
    if not prompt:
        raise UsageError("the prompt is empty", hint="give a text to continue")
    if seed and not temperature and reporter is not None:
        reporter.warn("--seed has no effect: without a temperature nothing is drawn")
    if isinstance(model, str | Path):
        source = open_source(model, reporter=reporter, packed=True, torchao=True)
        opened = load_model(source.folder, device=device, dtype=dtype)
        tokenizer = tokenizer or load_tokenizer(source.folder)
    else:
        opened = model
        if tokenizer is None:
            raise UsageError("a model in memory needs its tokenizer", hint="generate(model, prompt, tokenizer=...)")
    if not opened.can_generate():
        raise UnsupportedModelError(
            f"{type(opened).__name__} does not generate text", hint="generate needs a language model with a decoder"
        )
    inputs = _inputs(tokenizer, prompt, chat).to(opened.device)
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    devices = [opened.device] if opened.device.type == "cuda" else []
    pieces = None if stream is None else _Pieces(tokenizer, stream, prompted=not opened.config.is_encoder_decoder)
    # The caller's random state is left as it was.
    with torch.inference_mode(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        tokens = _without_ceremony(opened, inputs, new_tokens, temperature, pieces)
        if tokens is None:
            found = opened.generate(
                **inputs, max_new_tokens=new_tokens, pad_token_id=padding, streamer=pieces, **drawing
            )  # fmt: skip
            tokens = found[0, 0 if opened.config.is_encoder_decoder else inputs["input_ids"].shape[1] :].tolist()
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    if pieces is not None:
        pieces.finish(text)
    return text


def _without_ceremony(
    model: Any, inputs: Any, new_tokens: int, temperature: float, pieces: _Pieces | None
) -> list[int] | None:
    """The new tokens, by the loop for packed models; None where `generate` of the model is to make them."""
    if set(inputs) != {"input_ids", "attention_mask"} or not bool(inputs["attention_mask"].all()):
        return None
    told = None if pieces is None else pieces.add
    return continue_tokens(model, inputs["input_ids"], new_tokens=new_tokens, temperature=temperature, told=told)


class _Pieces:
    """Hands on what is certain of the text: all but an unfinished character at its end."""

    def __init__(self, tokenizer: Any, stream: Callable[[str], None], *, prompted: bool) -> None:
        self._tokenizer = tokenizer
        self._stream = stream
        self._tokens: list[int] = []
        self._told = ""
        self._skip = prompted  # the first that comes is the prompt

    def put(self, value: torch.Tensor) -> None:
        """Take the next tokens."""
        if self._skip:
            self._skip = False
            return
        self.add(*value.flatten().tolist())

    def add(self, *tokens: int) -> None:
        """Take tokens that the model made."""
        self._tokens += tokens
        text = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        if text.startswith(self._told) and not text.endswith("\ufffd"):
            self._tell(text)

    def end(self) -> None:
        """No more tokens come; `finish` says what is left."""

    def finish(self, text: str) -> None:
        """Hand on the rest of the whole text."""
        if text.startswith(self._told):
            self._tell(text)

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._stream(text[len(self._told) :])
            self._told = text


def _inputs(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("this model has no chat template", hint="leave --chat out")
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs.pop("token_type_ids", None)  # some tokenizers make them, no decoder takes them
    return inputs
