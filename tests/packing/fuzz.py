"""Opens damaged folders as a user's model is opened, in a process that is watched.

    python -m tests.packing.fuzz [--cases 10000] [--first 0] [--seconds 30]

Folders of every kind are made (masks of 16, 8 and 4 bits, 2:4, dense in groups, an embedding of 8 bits, biases, fused
and transposed matrices, several files). A copy of one is damaged for each seed, and opened in three ways: by the check
and the loader that `secateur generate` takes, then run; by transformers alone, where the check refused it; and by the
reader that unpacks. What must come of it is an error of ours, or a model that runs. A crash, a hang, an error that is
not ours, and a model that one way refuses and another runs, are findings, each told with its seed; any of them makes
the exit status 1.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CASES = 10_000
SECONDS = 30.0
"""For one folder; opening takes some hundredths of one."""
MEMORY = 2**30
"""More address space than at the start, in bytes: a damaged number must not be believed so far."""
_TICKS = 50
"""In which that time is counted: both processes may be stopped together for as long as someone likes."""
FINE = ("refused", "refused, transformers too", "runs")
"""What may come of a damaged folder."""


def make_folders(where: Path) -> list[Path]:
    """Packed folders of tiny models: every kind, number of bits, and way in which a matrix lies in a model."""
    import torch

    from secateur.verbs.export import export
    from tests.models import tiny_model, tiny_tokenizer

    wide = {"num_hidden_layers": 1, "hidden_size": 40, "head_dim": 10, "intermediate_size": 136}
    made: list[tuple[str, dict[str, Any], torch.dtype, dict[str, Any], str]] = [
        ("llama", wide, torch.bfloat16, {"bits": 8, "embedding_bits": 8}, "5GB"),
        ("llama", {**wide, "num_hidden_layers": 2}, torch.bfloat16, {"bits": 4, "embedding_bits": 4}, "9KB"),
        ("qwen2", wide, torch.bfloat16, {"bits": 8, "group_size": 64}, "5GB"),
        ("gpt2", {"n_layer": 1}, torch.float16, {"bits": 16, "embedding_bits": 8}, "5GB"),
        ("phi3", wide, torch.bfloat16, {"bits": 16}, "5GB"),
    ]
    found = []
    for number, (family, changes, dtype, options, shard) in enumerate(made):
        model = tiny_model(family, **changes)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                inside = weight.ndim == 2 and any(part in f".{name}" for part in (".layers.", ".h."))
                if inside and ("k_proj" in name or "up_proj" in name):
                    weight.view(len(weight), -1, 4)[..., ::2] = 0
                elif inside and "v_proj" not in name:
                    weight[weight.abs() < 0.15] = 0
        plain, out = where / f"plain{number}", where / f"packed{number}"
        model.to(dtype).save_pretrained(plain, max_shard_size=shard)
        tiny_tokenizer().save_pretrained(plain)
        export(plain, out, format="sparse", verify=False, **options)
        found.append(out)
    return found


def watch(
    folders: list[Path], first: int, cases: int, seconds: float = SECONDS, python: str = sys.executable
) -> Iterator[tuple[int, str, str]]:
    """Seed, outcome and what was done, for each case; a process that dies or hangs is told, and another goes on.

    Args:
        seconds: for one case.
        python: what the process is started with.
    """
    seed, last = first, first + cases
    while seed < last:
        process = subprocess.Popen(
            [python, "-m", "tests.packing.fuzz", "--open", *map(str, folders), "--first", str(seed), "--cases",
             str(last - seed)],
            stdout=subprocess.PIPE, bufsize=0, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        told, limit, waiting = "", 10 * seconds, bytearray()  # the first waits for the imports
        while seed < last:
            try:
                line = _line(process, waiting, limit)
            except TimeoutError:
                process.kill()
                outcome = "hangs"
            except EOFError:
                status = process.wait()
                outcome = signal.Signals(-status).name if status < 0 else f"ends with status {status}"
            else:
                kind, _, rest = line.partition("\t")
                limit = seconds
                if kind == "opens":
                    told = rest
                elif kind == "was":
                    outcome, _, detail = rest.partition("\t")
                    yield seed, outcome, f"{told}: {detail}"
                    seed += 1
                continue
            yield seed, outcome, told
            seed += 1
            break
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _line(process: subprocess.Popen[bytes], waiting: bytearray, seconds: float) -> str:
    """The next line of a process; ``waiting`` is what was read behind the one before.

    Raises:
        TimeoutError: when it does not come.
        EOFError: when there is none.
    """
    assert process.stdout is not None
    ticks = _TICKS
    while b"\n" not in waiting:
        if select.select([process.stdout], [], [], seconds / _TICKS)[0]:
            got = os.read(process.stdout.fileno(), 1 << 16)
            if not got:
                raise EOFError
            waiting += got
        elif (ticks := ticks - 1) == 0:
            raise TimeoutError
    line, _, rest = waiting.partition(b"\n")
    waiting[:] = rest
    return line.decode(errors="replace")


def open_all(folders: list[Path], first: int, cases: int) -> None:
    """Damage and open, one seed after the other; a line before each, a line after."""
    import torch
    import transformers

    from tests.packing.mutations import Folder

    faulthandler.enable()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    good = [Folder(folder) for folder in folders]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for number, folder in enumerate(good):  # undamaged, so that the limit of memory comes behind all imports
            folder.write(place)
            outcome, detail = opened(place, folder)
            if outcome != "runs":
                raise SystemExit(f"folder {number} as it was made: {outcome}: {detail}")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for seed in range(first, first + cases):
            folder = good[seed % len(good)]
            print(f"opens\t{' '.join(folder.damage(seed, place).split())}", flush=True)
            outcome, detail = opened(place, folder)
            print(f"was\t{outcome}\t{' '.join(detail.split())[:400]}", flush=True)


def opened(place: Path, folder: Any) -> tuple[str, str]:
    """What comes of a folder, and what was said."""
    from secateur.checkpoint.check import check_model_folder
    from secateur.checkpoint.unpacked import open_reader
    from secateur.errors import SecateurError
    from secateur.measure.model import load_model

    refused = ""
    try:
        check_model_folder(place, packed=True)
        model = load_model(place, device="cpu")
    except SecateurError as error:
        refused = error.message
        if not (str(place) in refused or "config.json" in refused or any(one in refused for one in folder.matrices)):
            return "names no file and no matrix", refused
    except Exception as error:  # noqa: BLE001 - any other is a finding
        return f"{type(error).__name__} is not ours", str(error)
    try:
        with open_reader(place) as reader:
            for key in reader.keys:
                if reader.tensor(key).shape != reader.info(key).shape:
                    return "unpacked in another shape", key
    except SecateurError as error:
        if not refused:
            return "refused by the reader, runs", error.message
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__} of the reader is not ours", str(error)
    if not refused:
        return run(model)
    return alone(place, refused)


def alone(place: Path, refused: str) -> tuple[str, str]:
    """A folder that was refused, opened by transformers without any check before: it must not do harm either."""
    import transformers

    from secateur.errors import SecateurError

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype="auto", local_files_only=True)
    except SecateurError:
        return "refused", refused
    except Exception:  # noqa: BLE001 - transformers has no errors of its own
        return "refused, transformers too", refused
    outcome, detail = run(model)
    return ("refused, transformers too" if outcome == "runs" else outcome), f"{refused}; {detail}"


def run(model: Any) -> tuple[str, str]:
    """Run one token, then some, then one behind these: each takes another way through the kernels."""
    import torch

    vocabulary = model.config.vocab_size
    with torch.inference_mode():
        for ids in (torch.tensor([[3]]), torch.arange(3, 15)[None]):
            found = model(ids % max(1, vocabulary), use_cache=True)
            found = model(ids[:, :1] % max(1, vocabulary), past_key_values=found.past_key_values)
            if tuple(found.logits.shape) != (1, 1, vocabulary) or not found.logits.is_floating_point():
                return "gives something else", f"{found.logits.dtype} {tuple(found.logits.shape)}"
    return "runs", "finite" if bool(found.logits.isfinite().all()) else "not finite"


def main() -> int:
    """Damage, open, and tell; 1 where something was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one folder")
    parser.add_argument("--open", nargs="+", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        open_all(options.open, options.first, options.cases)
        return 0
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as scratch:
        folders = make_folders(Path(scratch))
        for seed, outcome, told in watch(folders, options.first, options.cases, options.seconds):
            outcomes[outcome] += 1
            if outcome not in FINE:
                print(f"{outcome}: {told}", flush=True)
            if (seed + 1) % 500 == 0:
                print(f"{seed + 1 - options.first} opened", file=sys.stderr, flush=True)
    for outcome, times in outcomes.most_common():
        print(f"{times:>6} {outcome}")
    return int(any(outcome not in FINE for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
