"""Where a model comes from: a folder, a hub id, a .gguf file, or a demo model. All of them end as a local folder."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from secateur.checkpoint import demo
from secateur.checkpoint.check import check_model_folder
from secateur.checkpoint.dtypes import NAMES
from secateur.checkpoint.gguf import convert_gguf, read_manifest
from secateur.checkpoint.reader import CheckpointReader
from secateur.errors import SourceError
from secateur.progress import Reporter

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?")
WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
]
# The parts of a sentence encoder are in folders that begin with a digit (1_Pooling); no other folder is wanted.
UNWANTED = ["*.bin", "*.py", "*.pt", "*.pth", "*.pkl", "*.onnx", "[!0-9]*/*", "consolidated*.safetensors"]
DEMOS = " or ".join(f"'{name}'" for name in demo.NAMES)


@dataclass(frozen=True)
class Source:
    """A model that was found and checked. ``folder`` has config.json and safetensors; ``original_bytes`` and
    ``original_format`` describe the weights as they came, before any conversion; ``revision`` is that of the hub.
    ``kind`` is ``demo`` for either demo model, and ``memory`` for a model that a caller passed and that was written to
    a scratch folder.
    """

    name: str
    kind: Literal["folder", "hub", "gguf", "demo", "memory"]
    folder: Path
    original_bytes: int
    original_format: str
    revision: str | None = None


def places_of(model: str | Path) -> list[Path]:
    """The file or folder by which a user named a model; nothing for a demo or a hub id."""
    path = _path(model)
    return [path] if str(model) not in demo.NAMES and path.exists() and str(model) else []


def _path(model: str | Path) -> Path:
    """The path that a name would be.

    Raises:
        SourceError: for one that no file can have, such as a name that is too long.
    """
    try:
        path = Path(model).expanduser()
        path.exists()
        return path
    except (OSError, RuntimeError, ValueError) as error:
        shown = str(model) if len(str(model)) <= 80 else f"{str(model)[:77]}..."
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SourceError(
            f"no such file or folder: {shown}: {reason}", hint=f"give a folder, a hub id, a .gguf file or {DEMOS}"
        ) from None


def open_source(
    model: str | Path, *, reporter: Reporter | None = None, packed: bool = False, torchao: bool = False
) -> Source:
    """Find a model, fetch or convert it when that is needed, and check it.

    ``demo`` and ``demo-encoder`` are always the demo models; a folder of that name is ``./demo``. A hub id may end in a
    revision, ``@v1``.

    Args:
        packed: a model in the sparse format will do as well.
        torchao: and one that torchao has rounded.

    Raises:
        SourceError: when it cannot be found, fetched or opened (and what ``check_model_folder`` raises).
    """
    reporter = reporter or Reporter()
    text = str(model)
    path = _path(model)
    if text == demo.LANGUAGE_MODEL.name:
        return _converted(text, "demo", demo.demo_folder(reporter=reporter))
    if text == demo.ENCODER.name:
        return _plain(text, "demo", demo.encoder_folder(reporter=reporter), None)
    if text and path.is_dir():
        return _plain(path.resolve().name, "folder", path.resolve(), None, packed=packed, torchao=torchao)
    if path.is_file():
        if path.name in ("config.json", "model.safetensors", "model.safetensors.index.json"):
            raise SourceError(f"{path} is one file of a model", hint=f"give its folder: {path.parent}")
        folder = convert_gguf(path, reporter=reporter)
        return _converted(path.stem, "gguf", folder)
    if (
        not text
        or isinstance(model, Path)
        or not HUB_ID.fullmatch(text)
        or text.endswith((".gguf", ".safetensors", ".json"))
    ):
        raise SourceError(
            f"no such file or folder: {text}", hint=f"give the folder of a model, a hub id, a .gguf file or {DEMOS}"
        )
    return _from_hub(text, reporter, packed=packed, torchao=torchao)


def _converted(name: str, kind: Literal["gguf", "demo"], folder: Path) -> Source:
    check_model_folder(folder)
    manifest = read_manifest(folder)
    return Source(name, kind, folder, manifest["bytes"], manifest["format"])


def _plain(
    name: str, kind: Literal["folder", "hub", "demo"], folder: Path, revision: str | None, *, packed: bool = False,
    torchao: bool = False,
) -> Source:  # fmt: skip
    check_model_folder(folder, packed=packed, torchao=torchao)
    sizes: Counter[str] = Counter()
    with CheckpointReader(folder) as reader:
        for key in reader.keys:
            info = reader.info(key)
            sizes[NAMES[info.dtype]] += info.nbytes
        nbytes = sum(shard.path.stat().st_size for shard in reader.shards)
    widest = sizes.most_common(1)[0][0] if sizes else "empty"
    return Source(name, kind, folder, nbytes, f"safetensors {widest}", revision)


def _from_hub(text: str, reporter: Reporter, *, packed: bool, torchao: bool) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = text.partition("@")
    reporter.note(f"opening {text} from the Hugging Face hub")
    try:
        folder = snapshot_download(
            name, revision=revision or None, allow_patterns=WANTED, ignore_patterns=UNWANTED, tqdm_class=None
        )
    except GatedRepoError:
        raise SourceError(f"{name} is gated on the hub", hint="accept its licence there, then: hf auth login") from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"'{name}' is no file, no folder, and no model on the hub",
            hint="check the spelling; private models need hf auth login",
        ) from None
    except RevisionNotFoundError:
        raise SourceError(f"{name} has no revision '{revision}'", hint="leave it out for the newest") from None
    except HFValidationError:
        raise SourceError(
            f"no such file or folder: {text}", hint=f"give a folder, a hub id, a .gguf file or {DEMOS}"
        ) from None
    except LocalEntryNotFoundError:
        raise _unreachable(name, "it cannot be reached and the model is not in the local hub cache") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreachable(name, f"{type(error).__name__}: {error}".splitlines()[0]) from error
    found = Path(folder)
    return _plain(name, "hub", found, found.name, packed=packed, torchao=torchao)


def _unreachable(name: str, reason: str) -> SourceError:
    return SourceError(
        f"'{name}' is no file and no folder here, and the hub did not give it: {reason}",
        hint="check the path or the network, or download the model and give its folder",
    )
