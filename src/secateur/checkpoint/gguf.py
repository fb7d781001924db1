"""Turns a .gguf file into a Hugging Face folder, one tensor in memory at a time, and keeps it in the cache.

Names, permutations and dequantisation are those of transformers and gguf; only the order of work is ours: the stock
loader holds the whole model, this does not. The weights are the same, bit for bit. The tokenizer is transformers' too,
but for the pre-tokenizer, which is the one that the file names.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.checkpoint.cache import build_once, cache_folder
from secateur.checkpoint.pretokenizers import describe
from secateur.checkpoint.writer import CheckpointWriter, Entry, hash_file, layout_for
from secateur.errors import CheckpointError, DiskSpaceError, MissingExtraError, SourceError, UnsupportedModelError
from secateur.progress import Reporter

VERSION = 2  # raised when a conversion would come out differently
MANIFEST = ".source.json"  # in the converted folder: what it was made from; hidden, so results do not inherit it


def convert_gguf(path: str | Path, *, reporter: Reporter | None = None) -> Path:
    """The Hugging Face folder of a .gguf file, in float32, from the cache when it was converted before.

    Raises:
        SourceError: no such file, or not a GGUF file.
        CheckpointError: a truncated or corrupt file.
        UnsupportedModelError: an architecture or tensor that transformers cannot read.
        MissingExtraError: the gguf package is not installed.
        DiskSpaceError: the cache's disk is full.
    """
    path = Path(path).expanduser().resolve()
    reporter = reporter or Reporter()
    check_is_gguf(path)
    digest = hash_file(path)
    target = converted_folder(digest)
    try:
        return build_once(target, lambda partial: _convert(path, digest, partial, reporter))
    except DiskSpaceError as error:
        raise DiskSpaceError(error.message, hint="free some space, or move the cache with SECATEUR_CACHE") from error


def converted_folder(digest: str) -> Path:
    """Where the conversion of a file with this sha256 is kept."""
    return cache_folder() / "gguf" / f"{digest[:32]}-v{VERSION}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a converted folder was made from: name, format, bytes, sha256.

    Raises:
        CheckpointError: when the cache was tampered with.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {"name": str(manifest["name"]), "format": str(manifest["format"]), "bytes": int(manifest["bytes"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder} is damaged", hint="remove that folder; it will be made again") from None


def check_is_gguf(path: Path) -> None:
    """Refuse what is not a GGUF file.

    Raises:
        SourceError: when it is not there or something else.
    """
    if not path.is_file():
        raise SourceError(f"no such file: {path}", hint="give the path of a .gguf file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}", hint="check the file's permissions") from None
    if magic != b"GGUF":
        raise SourceError(f"{path} is not a GGUF file", hint="give a .gguf file, or the folder of a model")


def _convert(path: Path, digest: str, partial: Path, reporter: Reporter) -> None:
    reporter.note(f"converting {path.name} to float32 safetensors, once; kept in {cache_folder()}")
    architecture, tensors, pre = _open(path)
    with _transformers_errors(path):
        _save_tokenizer(path, partial, pre)
        if _can_stream(architecture, tensors):
            _stream(path, architecture, tensors, partial, reporter)
        else:
            _load_whole(path, partial, reporter)
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    manifest = {
        "name": path.stem,
        "format": f"GGUF {sizes.most_common(1)[0][0]}",
        "bytes": path.stat().st_size,
        "sha256": digest,
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _open(path: Path) -> tuple[str, list[Any], str]:
    """The file's architecture, its tensors (names, shapes, formats and places; their numbers stay on the disk), and the
    name of its pre-tokenizer, empty when it has none.
    """
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("reading GGUF files needs the gguf package", hint="pip install gguf") from None
    try:
        reader = gguf.GGUFReader(path)
        architecture, tensors = str(reader.fields["general.architecture"].contents()), list(reader.tensors)
        pre = reader.fields.get("tokenizer.ggml.pre")
        named = str(pre.contents()) if pre is not None else ""
    except Exception as error:  # noqa: BLE001 - the reader checks nothing: any error in it means a bad file
        raise CheckpointError(
            f"{path} is truncated or corrupt: {str(error) or type(error).__name__}", hint="download or copy it again"
        ) from None
    size = path.stat().st_size
    if not tensors or any(int(tensor.data_offset) + int(tensor.n_bytes) > size for tensor in tensors):
        raise CheckpointError(f"{path} is truncated or corrupt: tensors are missing", hint="download or copy it again")
    return architecture, tensors, named


@contextlib.contextmanager
def _transformers_errors(path: Path) -> Iterator[None]:
    """Say it as ours when transformers refuses a file."""
    try:
        yield
    except (ValueError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UnsupportedModelError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UnsupportedModelError(
        f"{path}: transformers cannot read this GGUF file: {reason}", hint="use the model's safetensors folder instead"
    )


def _can_stream(architecture: str, tensors: list[Any]) -> bool:
    """Whether every tensor of the file becomes one tensor of the model. Experts are joined from several, and newer
    architectures take another way through transformers; both are left to its own loader.
    """
    if any("_exps." in tensor.name for tensor in tensors):
        return False
    try:
        from transformers.integrations.gguf import is_gguf_arch_supported
    except ImportError:  # transformers of before that other way
        return True
    return not is_gguf_arch_supported(architecture)


def _save_tokenizer(path: Path, partial: Path, pre: str) -> None:
    from transformers import AutoTokenizer

    # Opened "in" the empty partial folder, so that nothing that lies beside the file is read.
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(partial), gguf_file=str(path), trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing more special for a bad vocabulary
        raise _unreadable(path, error) from error
    tokenizer.save_pretrained(partial)
    _cut_as_the_file(partial / "tokenizer.json", pre)


def _cut_as_the_file(path: Path, pre: str) -> None:
    """Give a byte-level tokenizer the pre-tokenizer that the file names; transformers passes some of them over."""
    described = describe(pre)
    tokenizer = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and described else None
    if described is None or tokenizer is None or "ByteLevel" not in json.dumps(tokenizer["pre_tokenizer"]):
        return
    tokenizer["pre_tokenizer"], tokenizer["model"]["ignore_merges"] = described
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _stream(path: Path, architecture: str, tensors: list[Any], partial: Path, reporter: Reporter) -> None:
    from accelerate import init_empty_weights
    from gguf import dequantize
    from transformers import AutoConfig, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    parsed = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    config = AutoConfig.for_model(**parsed)
    with init_empty_weights():
        model = _auto_class(config).from_config(config, dtype=torch.float32)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=parsed)
    names = get_gguf_hf_weights_map(model, processor)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {names[tensor.name] for tensor in tensors if names.get(tensor.name) in expected}
    _check_complete(path, model, set(expected) - found)
    with CheckpointWriter(partial, layout_for((key, torch.float32, expected[key]) for key in sorted(found))) as writer:
        reporter.stage("convert GGUF", len(tensors))
        for tensor in tensors:
            key = names.get(tensor.name)
            if key in found:
                data = np.fromfile(path, tensor.data.dtype, tensor.data.size, offset=int(tensor.data_offset))
                values = dequantize(data.reshape(tensor.data.shape), tensor.tensor_type)
                # A processor returns the tensor, or (GPT-2's head) puts it into this table itself.
                table: dict[str, Any] = {"tensors": {}}
                done = processor.process(
                    weights=values, name=tensor.name, tensor_key_mapping=names, parsed_parameters=table
                )
                if not table["tensors"]:
                    table["tensors"][key] = torch.from_numpy(np.ascontiguousarray(done.weights, dtype=np.float32))
                for made, value in table["tensors"].items():
                    _write(path, writer, Entry(made, torch.float32, expected[made]), value)
            else:
                reporter.warn(f"{path.name}: tensor {tensor.name} has no place in transformers' model and is left out")
            reporter.advance(tensor.name)
        writer.finish()
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    config.save_pretrained(partial)
    if model.can_generate():
        GenerationConfig.from_model_config(config).save_pretrained(partial)


def _write(path: Path, writer: CheckpointWriter, entry: Entry, tensor: torch.Tensor) -> None:
    if tuple(tensor.shape) != entry.shape:
        raise CheckpointError(
            f"{path}: {entry.key} has shape {list(tensor.shape)}, the model's is {list(entry.shape)}",
            hint="the file's metadata and tensors do not agree; use the model's safetensors folder instead",
        )
    writer.write(entry.key, tensor)


def _auto_class(config: Any) -> Any:
    """The class of the whole model with its head where it is a language model, as its safetensors folder would have."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    if config.architectures:
        return getattr(transformers, config.architectures[0])
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    if config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModel


def _check_complete(path: Path, model: Any, missing: set[str]) -> None:
    """Refuse when a part of the model is not in the file: the stock loader would fill it with random numbers.

    Raises:
        UnsupportedModelError: naming the parts.
    """
    if model.config.tie_word_embeddings:
        missing -= set(model._tied_weights_keys or ())
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    absent = sorted(key for key in missing if not any(pattern.search(key) for pattern in ignored))
    if absent:
        raise UnsupportedModelError(
            f"{path}: {len(absent)} tensors of {type(model).__name__} are not in the file, the first is {absent[0]}",
            hint="use the model's safetensors folder instead",
        )


def _load_whole(path: Path, partial: Path, reporter: Reporter) -> None:
    from transformers import AutoConfig
    from transformers.utils import logging

    reporter.warn(f"{path.name}: this architecture can only be converted with the whole float32 model in memory")
    config = AutoConfig.from_pretrained(str(partial), gguf_file=str(path), trust_remote_code=False)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # progress goes through the reporter only
    try:
        model, info = _auto_class(config).from_pretrained(
            str(partial), gguf_file=str(path), dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
        _check_complete(path, model, set(info["missing_keys"]))
        # The numbers are plain now; what the loader remembers of their old form would be saved as a promise.
        model.hf_quantizer = model.quantization_method = None
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(partial)
    finally:
        if bars:
            logging.enable_progress_bar()
