"""Loads a model folder with the stock classes, in a process of its own, and answers questions about it.

A stand-alone script: ``python -P worker.py FOLDER [--dtype auto] [--device cpu] [--threads N]``. It imports secateur
only for a folder in the sparse format or a converted one, which need it, so what it reports is what anybody gets from
the folder. One JSON object a line comes in on stdin, one goes out on stdout; whatever libraries print goes to stderr.

    {"op": "load"}
        -> seconds, class, dtype, parameters, bytes_resident_before, bytes_resident
    {"op": "resident"}
        -> bytes_resident_before, bytes_resident
    {"op": "logits", "inputs": PATH, "out": PATH}     (both safetensors: tensors named like the forward's arguments)
        -> outputs {name: shape}
    {"op": "decode", "prompt_tokens": [..], "new_tokens": N, "rows": 1}      (the same prompt in every row of a batch)
        -> tokens (of all rows), seconds, prefill_seconds, new_tokens [..] (of the first row)
    {"op": "write", "prompt_tokens": [..], "new_tokens": N, "way": "loop"}  (of secateur, packed models; or "generate")
        -> the same, of one row
    {"op": "encode", "tokens": [..], "rows": 1}
        -> tokens, seconds
    {"op": "read", "texts": [[..], ..], "batch": N, "padding": TOKEN}        (those of a batch padded to its longest)
        -> texts, seconds
    {"op": "continue", "prompt": TEXT, "new_tokens": N, "chat": false}
        -> text
    {"op": "quit"}

Every answer has "ok"; when it is false, "error" and "type" say why.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO


def resident_bytes() -> int:
    """Resident memory of this process, after freed memory was handed back to the system where that is possible."""
    gc.collect()
    # Elsewhere than on glibc the figure includes what the allocator holds in reserve.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        import psutil

        return int(psutil.Process().memory_info().rss)


def held_bytes(device: str) -> int:
    """What a model can take here: memory of the process, or on an accelerator what PyTorch has allocated there."""
    import torch

    kind = torch.device(device).type
    if kind == "cpu":
        return resident_bytes()
    if kind == "mps":  # not among those that torch.accelerator counts for
        return int(torch.mps.current_allocated_memory())
    return int(torch.accelerator.memory_allocated(torch.device(device)))


class Server:
    """Holds the model; one method an operation."""

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        self.folder = folder
        self.dtype = dtype
        self.device = device
        self.model: Any = None
        self.tokenizer: Any = None
        self.before = 0
        self.seconds = 0.0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request; the model is loaded by the first one."""
        operations: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self.load,
            "resident": self.resident,
            "logits": self.logits,
            "decode": self.decode,
            "write": self.write,
            "encode": self.encode,
            "read": self.read,
            "continue": self.continue_text,
        }
        import torch

        arguments = dict(request)
        name = arguments.pop("op", None)
        if name not in operations:
            raise ValueError(f"unknown op {name!r}; known: {', '.join(operations)}, quit")
        self.load()
        with torch.inference_mode():
            return operations[name](**arguments)

    def load(self) -> dict[str, Any]:
        """Open the folder by its stock class, once."""
        import transformers

        if self.model is None:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            if str((config.get("quantization_config") or {}).get("quant_method", "")).startswith("secateur"):
                sys.path.insert(0, str(Path(__file__).parents[2]))  # the secateur that asks, not another one
                import secateur  # noqa: F401 - transformers then knows how such weights are stored
            known = transformers.AutoConfig.from_pretrained(self.folder, local_files_only=True)
            architecture = (config.get("architectures") or [""])[0]
            stock: Any = transformers.AutoModelForCausalLM
            if not architecture:
                stock = stock if type(known) in stock._model_mapping else transformers.AutoModel
            elif not architecture.endswith("CausalLM"):
                stock = getattr(transformers, architecture)
            self.before = held_bytes(self.device)  # torch and transformers are in memory by now, the weights are not
            start = time.perf_counter()
            model, info = stock.from_pretrained(
                self.folder,
                config=known,
                dtype=self.dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            for kind in ("missing_keys", "mismatched_keys"):  # the loader only warns, and makes weights up
                if info[kind]:
                    raise ValueError(f"{kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:3]}")
            self.model = model.eval().to(self.device)
            self.seconds = time.perf_counter() - start
        return {
            "seconds": self.seconds,
            "class": type(self.model).__name__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "parameters": self.model.num_parameters(),
            **self.resident(),
        }

    def resident(self) -> dict[str, Any]:
        """Memory now and just before the model was loaded; the difference is what the model takes.

        Weights are mapped from their file: until a page is looked at it takes no memory, so each is looked at first.
        """
        for tensor in _pieces([*self.model.parameters(), *self.model.buffers()]):
            if tensor.device.type == "cpu":
                tensor.detach().reshape(-1)[:: max(1, 4096 // tensor.element_size())].sum()
        return {"bytes_resident_before": self.before, "bytes_resident": held_bytes(self.device)}

    def logits(self, inputs: str, out: str) -> dict[str, Any]:
        """Run the forward pass once and write each tensor it returns, under its own name."""
        from safetensors.torch import load_file, save_file

        tensors = {name: tensor.to(self.device) for name, tensor in load_file(inputs).items()}
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.to(self.model.dtype)
        extra = {"use_cache": False} if self._accepts("use_cache") else {}
        result = self.model(**tensors, **extra)
        found = {key: value.cpu().contiguous() for key, value in result.items() if hasattr(value, "is_floating_point")}
        save_file(found, out)
        return {"outputs": {name: list(tensor.shape) for name, tensor in found.items()}}

    def decode(self, prompt_tokens: list[int], new_tokens: int, rows: int = 1) -> dict[str, Any]:
        """Greedy decoding with the cache, to the full length whatever tokens come; the prompt's pass is timed apart."""
        import torch

        self._check_decoder()
        # Logits of the last position only, where the model can: the others would be thrown away.
        keep = {"logits_to_keep": 1} if self._accepts("logits_to_keep") else {}
        start = time.perf_counter()
        result = self.model(torch.tensor([prompt_tokens] * rows, device=self.device), use_cache=True, **keep)
        token = result.logits[:, -1:].argmax(-1)
        chosen = [int(token[0])]
        middle = time.perf_counter()
        for _ in range(new_tokens):
            result = self.model(token, past_key_values=result.past_key_values, use_cache=True, **keep)
            token = result.logits[:, -1:].argmax(-1)
            chosen.append(int(token[0]))  # waits for the device, so the clock is right there too
        seconds = time.perf_counter() - middle
        return {
            "tokens": new_tokens * rows,
            "seconds": seconds,
            "prefill_seconds": middle - start,
            "new_tokens": chosen,
        }

    def write(self, prompt_tokens: list[int], new_tokens: int, way: str) -> dict[str, Any]:
        """Greedy decoding by a loop that is not ours, to the full length; from the first new token on it is timed."""
        import copy

        import torch

        self._check_decoder()
        prompt = torch.tensor([prompt_tokens], device=self.device)
        heard = _Heard(skip=way == "generate")
        start = time.perf_counter()
        if way == "loop":
            from secateur.runtime.loop import continue_tokens

            if continue_tokens(self.model, prompt, new_tokens=new_tokens + 1, stop=False, told=heard.add) is None:
                raise TypeError(f"{type(self.model).__name__} does not go through all blocks in one call")
        else:
            config = copy.deepcopy(self.model.generation_config)
            config.eos_token_id = None
            self.model.generate(
                prompt, generation_config=config, max_new_tokens=new_tokens + 1, do_sample=False, streamer=heard
            )
        return {
            "tokens": len(heard.tokens) - 1,
            "seconds": heard.times[-1] - heard.times[0],
            "prefill_seconds": heard.times[0] - start,
            "new_tokens": heard.tokens,
        }

    def encode(self, tokens: list[int], rows: int = 1) -> dict[str, Any]:
        """One forward over whole texts, for models that do not decode."""
        import torch

        batch = torch.tensor([tokens] * rows, device=self.device)
        start = time.perf_counter()
        result = self.model(batch)
        float(next(value for value in result.values() if hasattr(value, "is_floating_point")).flatten()[0])
        return {"tokens": batch.numel(), "seconds": time.perf_counter() - start}

    def read(self, texts: list[list[int]], batch: int, padding: int = 0) -> dict[str, Any]:
        """One forward for every batch of texts, in their order."""
        import torch

        batches = []
        for first in range(0, len(texts), batch):
            part = texts[first : first + batch]
            width = max(map(len, part))
            ids = [tokens + [padding] * (width - len(tokens)) for tokens in part]
            mask = [[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in part]
            batches.append((torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)))
        extra = {"use_cache": False} if self._accepts("use_cache") else {}
        start = time.perf_counter()
        for ids_of, mask_of in batches:
            result = self.model(input_ids=ids_of, attention_mask=mask_of, **extra)
            float(next(value for value in result.values() if hasattr(value, "is_floating_point")).flatten()[0])
        return {"texts": len(texts), "seconds": time.perf_counter() - start}

    def continue_text(self, prompt: str, new_tokens: int, chat: bool = False) -> dict[str, Any]:
        """Greedy continuation of a text; the answer holds the new text only."""
        from transformers import AutoTokenizer

        self._check_decoder()
        if self.tokenizer is None:
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        if chat:
            message = [{"role": "user", "content": prompt}]
            inputs = self.tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = self.tokenizer(prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        result = self.model.generate(
            **inputs.to(self.device),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=_first(self.tokenizer.pad_token_id, self.tokenizer.eos_token_id),
        )
        length = inputs["input_ids"].shape[1]
        return {"text": self.tokenizer.decode(result[0, length:], skip_special_tokens=True)}

    def _accepts(self, name: str) -> bool:
        return name in inspect.signature(self.model.forward).parameters

    def _check_decoder(self) -> None:
        if self.model.config.is_encoder_decoder or not self.model.can_generate():
            raise TypeError(f"{type(self.model).__name__} does not decode token by token")


class _Heard:
    """Tokens and when they came; a streamer of `generate`, which is given the prompt first."""

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip
        self.tokens: list[int] = []
        self.times: list[float] = []

    def add(self, token: int) -> None:
        """A new token."""
        self.tokens.append(token)
        self.times.append(time.perf_counter())

    def put(self, value: Any) -> None:
        """What `generate` has."""
        if not self.skip:
            self.add(int(value))
        self.skip = False

    def end(self) -> None:
        """Nothing more comes."""


def _pieces(tensors: Iterable[Any]) -> Iterator[Any]:
    """Plain tensors: of one that is made of several (rounded numbers and their scales) these."""
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            yield from _pieces(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            yield tensor


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def serve(server: Server, requests: TextIO, answers: TextIO) -> None:
    """Answer line by line until "quit" or the end of the requests."""
    for line in requests:
        try:
            request = json.loads(line)
            if request.get("op") == "quit":
                return
            answer = {"ok": True, **server.answer(request)}
        except Exception as error:  # noqa: BLE001 - whatever it was, the asking process must hear of it
            traceback.print_exc()
            answer = {"ok": False, "type": type(error).__name__, "error": " ".join(str(error).split())}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description="Answer questions about a model folder, one JSON object a line.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    # Keep the real stdout to ourselves; file descriptor 1 now leads to stderr, for C libraries too.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    serve(Server(options.folder, options.dtype, options.device), sys.stdin, answers)


if __name__ == "__main__":
    main()
