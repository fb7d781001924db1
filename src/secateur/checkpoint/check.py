"""Everything about a model folder that can be refused before work starts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint.dtypes import NAMES, PLAIN_FLOATS
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.writer import hash_file
from secateur.errors import SourceError, UnsafeCheckpointError, UnsupportedModelError, WeightValueError
from secateur.layers.spec import is_converted, read_spec, stock_config
from secateur.packing.header import check_places, header_of
from secateur.progress import Reporter

WITH_CODE = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
SHOWN = 3  # tensors named in a message


def check_model_folder(folder: str | Path, *, packed: bool = False, torchao: bool = False) -> dict[str, Any]:
    """Refuse a folder that is not a plain, whole model which stock transformers opens without running foreign code.

    Reads the configs and the headers of the weights, not the weights. Returns the content of config.json.

    Args:
        packed: a model in the sparse format will do as well.
        torchao: and one that torchao has rounded.

    Raises:
        SourceError: no such folder, or no readable config.json.
        CheckpointError: weights that are missing, truncated, corrupt, or outside the folder; a converted model whose
            config does not say how its layers are built.
        UnsafeCheckpointError: pickled weights, or a config that asks for remote code.
        UnsupportedModelError: quantised weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SourceError(
            f"no such folder: {folder}", hint="give the folder of a model, a hub id, a .gguf file or 'demo'"
        )
    config = read_config(folder)
    check_no_code(folder, config)
    header = header_of(config)
    if header is not None and not packed:
        raise UnsupportedModelError(
            f"{folder} is packed in the sparse format; this needs plain floating-point weights",
            hint=f"secateur export {folder} --format hf -o FOLDER unpacks it",
        )
    if is_converted(config):
        read_spec(config)
    elif header is None and config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        if not (torchao and method == "torchao"):
            raise UnsupportedModelError(
                f"{folder} is quantised ({method}); pruning needs plain floating-point weights",
                hint="use the model it was made from, or a dequantised copy",
            )
    if (folder / "adapter_config.json").exists():
        raise UnsupportedModelError(
            f"{folder} holds an adapter (adapter_config.json) beside the weights: both together are the model",
            hint="merge it into the weights first (merge_and_unload of PEFT), or remove the file to prune without it",
        )
    with CheckpointReader(folder) as reader:
        if header is not None:
            infos = [reader.info(key) for key in reader.keys]
            check_places(header, {info.key: (info.dtype, info.shape, info.offset) for info in infos}, folder)
        for key in reader.keys:
            info = reader.info(key)
            narrow = len(info.shape) > 1 and key.endswith("weight") and info.dtype not in PLAIN_FLOATS
            if narrow or "float8" in str(info.dtype):
                raise UnsupportedModelError(
                    f"{folder}: {key} is stored as {NAMES[info.dtype]}; pruning needs plain floating-point weights",
                    hint="use the model it was made from, or a dequantised copy",
                )
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        SourceError: when there is none, or it cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(f"{folder} has no config.json", hint="give a folder written by save_pretrained")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read: {error}", hint="download the model again") from None
    if not isinstance(config, dict):
        raise SourceError(f"{path} is not a JSON object", hint="download the model again")
    return config


def check_no_code(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a model that needs Python code of its own, whether it brings it or leaves it on the hub.

    Raises:
        UnsafeCheckpointError: when it does.
        SourceError: when config.json does not say which model this is.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = stock_config(config).get("model_type")
    for name in WITH_CODE:
        path = folder / name
        try:
            side = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise SourceError(f"{path} cannot be read: {error}", hint="download the model again") from None
        if isinstance(side, dict) and side.get("auto_map"):
            hint = "remote code is never run"
            if model_type in CONFIG_MAPPING_NAMES:
                hint += f"; transformers knows '{model_type}' itself: a copy without the 'auto_map' entry will open"
            raise UnsafeCheckpointError(f"{path} asks for remote code (auto_map)", hint=hint)
    if not isinstance(model_type, str):
        raise SourceError(
            f"{folder / 'config.json'} has no model_type", hint="give a folder written by save_pretrained"
        )
    if model_type not in CONFIG_MAPPING_NAMES:
        raise UnsafeCheckpointError(
            f"{folder / 'config.json'}: transformers does not know model type '{model_type}': it needs remote code",
            hint="remote code is never run; a newer transformers may know the model",
        )
    architectures = config.get("architectures")
    if architectures is not None:
        check_architecture(folder, architectures)


def check_architecture(folder: Path, architectures: Any) -> None:
    """Refuse a model class that transformers does not have.

    Raises:
        UnsafeCheckpointError: when it has not.
    """
    import transformers

    names = architectures if isinstance(architectures, list) else [architectures]
    for name in names:
        if not isinstance(name, str) or not hasattr(transformers, name):
            raise UnsafeCheckpointError(
                f"{folder / 'config.json'}: transformers has no class '{name}', the model would need remote code",
                hint="remote code is never run; a newer transformers may know the model",
            )


def check_finite(reader: CheckpointReader, reporter: Reporter | None = None) -> None:
    """Refuse weights with NaN or infinity. Reads every floating tensor once, in pieces.

    Raises:
        WeightValueError: naming the first such tensors.
    """
    reporter = reporter or Reporter()
    reporter.stage("check weights", len(reader.keys))
    bad = []
    for key in reader.keys:
        if reader.info(key).dtype.is_floating_point and not all(is_finite(chunk) for chunk in reader.chunks(key)):
            bad.append(key)
        reporter.advance(key)
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise WeightValueError(
            f"{reader.folder} has NaN or infinite weights in {', '.join(bad[:SHOWN])}{more}",
            hint="the model is broken; download it again, or use another checkpoint of it",
        )


def is_finite(values: torch.Tensor) -> bool:
    """Whether a tensor of any shape holds neither NaN nor infinity, without a temporary of its size."""
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values)  # NaN in, NaN out
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def hash_folder(folder: str | Path) -> str:
    """Hex sha256 of all weights of a model: of the lines ``sha256 name`` of its shards, sorted by name.

    Raises:
        CheckpointError: when they cannot be read.
    """
    with CheckpointReader(folder) as reader:
        lines = [
            f"{hash_file(shard.path)} {shard.name}\n" for shard in sorted(reader.shards, key=lambda shard: shard.name)
        ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
