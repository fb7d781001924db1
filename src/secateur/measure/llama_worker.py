"""Loads a .gguf file in llama.cpp (package ``xllamacpp``), in a process of its own, and answers questions about it.

A stand-alone script: ``python -P llama_worker.py FILE [--context N] [--threads N] [--exact]``. It never imports
secateur, so what it reports is what anybody gets from the file. One JSON object a line comes in on stdin, one goes out
on stdout.

    {"op": "load"}
        -> seconds, version
    {"op": "resident"}
        -> bytes_resident_before, bytes_resident          (before: with the library in memory and without the model)
    {"op": "tokenize", "texts": [TEXT, ..]}           (special tokens added and recognised)
        -> ids [[..], ..]
    {"op": "score", "tokens": [..], "top": K}         (every token but the first, given those before it)
        -> scores [{"logprob": X, "top": [[id, logprob], ..]} or null, ..]
    {"op": "speed", "tokens": [..], "new_tokens": N, "runs": 2}
        -> prefill_tokens_per_second, decode_tokens_per_second
    {"op": "quit"}

``--exact`` keeps keys and values in float32 and leaves out flash attention: for comparing, not for timing.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable
from typing import Any, TextIO

FORCE = 1e4
"""Added to the logit of the token that comes next in the text: it is then the one that is drawn. The log-probabilities
that llama.cpp reports are those before such biases."""


def resident_bytes() -> int:
    """Resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


class Llama:
    """Holds the model; one method an operation."""

    def __init__(self, file: str, context: int, threads: int, exact: bool) -> None:
        self.file, self.context, self.threads, self.exact = file, context, threads, exact
        self.server: Any = None
        self.seconds = 0.0
        self.before = 0
        self.secret = secrets.token_hex(16)  # the server also listens on a local port, to nobody but us

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request; the model is loaded by the first one."""
        operations: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self.load, "tokenize": self.tokenize, "score": self.score, "speed": self.speed,
            "resident": self.resident,
        }  # fmt: skip
        arguments = dict(request)
        name = arguments.pop("op", None)
        if name not in operations:
            raise ValueError(f"unknown op {name!r}; known: {', '.join(operations)}, quit")
        self.load()
        return operations[name](**arguments)

    def load(self) -> dict[str, Any]:
        """Open the file, once."""
        import xllamacpp

        if self.server is None:
            parameters = xllamacpp.CommonParams()
            parameters.model.path = self.file
            parameters.n_ctx, parameters.n_parallel = self.context, 1
            parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = self.threads
            parameters.n_gpu_layers = 0
            parameters.api_keys = [self.secret]
            if self.exact:
                parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
                parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
                parameters.warmup = False
            self.before = resident_bytes()
            started = time.perf_counter()
            self.server = xllamacpp.Server(parameters)
            self.seconds = time.perf_counter() - started
        return {"seconds": self.seconds, "version": str(xllamacpp.__version__)}

    def resident(self) -> dict[str, Any]:
        """Memory now and just before the model was loaded; pages of the file that were looked at count."""
        return {"bytes_resident_before": self.before, "bytes_resident": resident_bytes()}

    def tokenize(self, texts: list[str]) -> dict[str, Any]:
        """Token ids of texts, through the server's own door: the in-process calls have none for this."""
        return {"ids": [self._post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
                        for text in texts]}  # fmt: skip

    def score(self, tokens: list[int], top: int) -> dict[str, Any]:
        """Log-probability of each token given those before it, and the likeliest ``top`` there.

        The cache makes each step one token long. None where the server reports nothing, as for a part of a character.
        """
        scores: list[Any] = []
        for place in range(1, len(tokens)):
            answer = self.server.handle_completions(
                {
                    "prompt": tokens[:place], "n_predict": 1, "n_probs": top, "cache_prompt": True, "temperature": 0.0,
                    "logit_bias": [[tokens[place], FORCE]],
                }
            )  # fmt: skip
            content = (answer["choices"][0].get("logprobs") or {}).get("content") or [None]
            found = content[0]
            if found is None or found["id"] != tokens[place]:
                scores.append(None)
                continue
            likeliest = [[one["id"], one["logprob"]] for one in found["top_logprobs"]]
            scores.append({"logprob": found["logprob"], "top": likeliest})
        return {"scores": scores}

    def speed(self, tokens: list[int], new_tokens: int, runs: int = 2) -> dict[str, Any]:
        """Tokens a second by llama.cpp's own clock; the last of the runs counts, when the file is in memory."""
        request = {"prompt": tokens, "n_predict": new_tokens, "ignore_eos": True, "cache_prompt": False}
        timings: dict[str, Any] = {}
        for _ in range(runs):
            timings = self.server.handle_completions({**request, "temperature": 0.0})["timings"]
        return {
            "prefill_tokens_per_second": timings["prompt_per_second"],
            "decode_tokens_per_second": timings["predicted_per_second"],
        }

    def _post(self, path: str, **content: Any) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.secret}"}
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(content).encode(), headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request) as answer:
            return dict(json.load(answer))


def serve(llama: Llama, requests: TextIO, answers: TextIO) -> None:
    """Answer line by line until "quit" or the end of the requests."""
    for line in requests:
        try:
            request = json.loads(line)
            if request.get("op") == "quit":
                return
            answer = {"ok": True, **llama.answer(request)}
        except Exception as error:  # noqa: BLE001 - whatever it was, the asking process must hear of it
            traceback.print_exc()
            answer = {"ok": False, "type": type(error).__name__, "error": " ".join(str(error).split())}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description="Answer questions about a .gguf file, one JSON object a line.")
    parser.add_argument("file")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--exact", action="store_true")
    options = parser.parse_args()
    # Keep the real stdout to ourselves; file descriptor 1 now leads to stderr, for C libraries too.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(Llama(options.file, options.context, options.threads, options.exact), sys.stdin, answers)


if __name__ == "__main__":
    main()
