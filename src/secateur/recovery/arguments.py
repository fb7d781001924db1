"""The arguments of the stock Trainer: ours, the user's over them, and what a launcher asks for."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.errors import UnknownNameError, UsageError
from secateur.progress import Reporter

DECIDED = frozenset({
    "output_dir", "max_steps", "num_train_epochs", "save_strategy", "save_steps", "save_total_limit",
    "load_best_model_at_end", "eval_strategy", "do_eval", "do_predict", "remove_unused_columns",
    "label_smoothing_factor", "resume_from_checkpoint", "push_to_hub", "auto_find_batch_size", "use_cpu", "seed",
    "save_only_model", "learning_rate", "gradient_checkpointing", "activation_checkpointing", "logging_strategy",
})  # fmt: skip
"""Arguments of the stock Trainer that would contradict what recover does itself."""
UNUSED = ("eval_", "hub_", "per_device_eval_", "metric_for_best_model", "greater_is_better", "batch_eval_metrics")
"""How those begin that nothing looks at: recover measures in its own way, and uploads nothing."""
REFUSED = {
    "deepspeed": "DeepSpeed updates copies of the weights that no mask is held on",
    "parallelism_config": "tensor and context parallelism cut layers apart, and masks are not cut alike",
}
"""Arguments of the stock Trainer for which held zeros cannot be promised, and why."""
_LAUNCHED = {
    "ACCELERATE_USE_DEEPSPEED": REFUSED["deepspeed"],
    "ACCELERATE_USE_PARALLELISM_CONFIG": REFUSED["parallelism_config"],
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM trains a model of its own",
}
_FSDP1 = "FSDP1 flattens the weights, and masks do not fit them any more"
_HINT = "use data parallelism or FSDP2 (fsdp_version: 2)"


def _on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def asks_for_parts(given: Mapping[str, Any]) -> bool:
    """Whether the weights shall be divided among the processes, by an argument or by the launcher's configuration."""
    value = next((value for key, value in given.items() if key.replace("-", "_") == "fsdp"), None)
    return _on("ACCELERATE_USE_FSDP") if value is None else str(value).lower() not in ("", "false", "0")


def check_launch(given: Mapping[str, Any], mode: str, processes: int) -> None:
    """Refuse what cannot be trained that way, before anything is read.

    Args:
        given: arguments for the Trainer, as the user names them.
        processes: how many the launcher has started.

    Raises:
        UsageError: naming the reason.
    """
    if mode == "blocks" and processes > 1:
        raise UsageError(
            f"--mode blocks runs in one process, and {processes} were started",
            hint="start it without a launcher, or use --mode full, lora or norms-and-biases",
        )
    for key in given:
        if (name := key.replace("-", "_")) in REFUSED:
            raise UsageError(f"--trainer {key} is not supported: {REFUSED[name]}", hint=_HINT)
    for variable, reason in _LAUNCHED.items():
        if _on(variable):
            raise UsageError(f"{variable} is not supported: {reason}", hint=_HINT)
    if asks_for_parts(given):
        if processes == 1:
            raise UsageError(
                "FSDP divides a model among processes, and there is one",
                hint="start with torchrun or accelerate launch",
            )
        configured = not any(key == "fsdp" for key in given)
        if configured and os.environ.get("FSDP_VERSION", "1") != "2":
            raise UsageError(f"FSDP_VERSION 1 is not supported: {_FSDP1}", hint=_HINT)


def local_device(device: torch.device, processes: int) -> torch.device:
    """The device of this process: each has one of its own.

    Raises:
        UsageError: when one device is named for several processes, or there are too few.
    """
    if processes == 1 or device.type == "cpu":
        return device
    if device != torch.device(device.type):
        raise UsageError(
            f"--device {device} is one device, and {processes} processes were started",
            hint=f"give --device {device.type}: each process takes its own",
        )
    own, there = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if own >= there:
        raise UsageError(
            f"process {own} of this machine has no device: there are {there}",
            hint="start as many processes as there are devices, or use --device cpu",
        )
    return torch.device(device.type, own)


def read_whole_models(reporter: Reporter) -> None:
    """Switch off what makes all processes but one read empty weights: a teacher and the zeros would be empty too."""
    if _on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        reporter.note("fsdp_cpu_ram_efficient_loading is off: each process reads the whole model")


def training_arguments(
    folder: Path, given: Mapping[str, Any], *, seed: int, device: torch.device, steps: int, rate: float, batch: int,
    single_texts: bool, checkpointing: bool, processes: int = 1,
) -> transformers.TrainingArguments:  # fmt: skip
    """Our defaults with what the user gave laid over them, values turned into the types of the fields.

    Windows of running text are long: they go through the model one by one and their gradients are added up.

    Args:
        batch: sequences of one process in an optimiser step.
        processes: how many train together.

    Raises:
        UnknownNameError: for a name that TrainingArguments does not have.
        UsageError: for a value that it refuses, or a step of another number of sequences than ``batch``.
    """
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch if single_texts else 1,
        "gradient_accumulation_steps": 1 if single_texts else batch,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": device.type == "cuda",
        "seed": seed,
        "use_cpu": device.type == "cpu",
        "activation_checkpointing": checkpointing,
    }
    if checkpointing:
        defaults["activation_checkpointing_kwargs"] = {"use_reentrant": False}
    known = {entry.name for entry in dataclasses.fields(transformers.TrainingArguments) if entry.init}
    words: list[str] = []
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UnknownNameError("training argument", key, known)
        if name in DECIDED:
            raise UsageError(f"--trainer {key} is decided by secateur", hint="use the flags of recover")
        if name.startswith(UNUSED):
            raise UsageError(
                f"--trainer {key} has no effect: recover measures in its own way and uploads nothing",
                hint="leave it out; --held-out and --evaluate are what recover measures with",
            )
        defaults.pop(name, None)
        if name == "fsdp" and str(value).lower() in ("true", "1"):
            words.append("--fsdp")  # its value is a text of an older kind
            continue
        words += [f"--{name}", json.dumps(value) if isinstance(value, dict | list | bool) else str(value)]
    for name, value in defaults.items():
        if isinstance(value, dict | bool):
            value = json.dumps(value)
        words += [f"--{name}", str(value)]
    parser = transformers.HfArgumentParser(transformers.TrainingArguments)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as told:
            (arguments,) = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except (SystemExit, ValueError, TypeError, ImportError) as error:
        reason = (told.getvalue().strip().splitlines() or [str(error)])[-1]
        raise UsageError(f"--trainer: {reason}", hint="see transformers.TrainingArguments") from None
    each, times = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    if each * times != batch:
        raise UsageError(
            f"--trainer: per_device_train_batch_size {each} x gradient_accumulation_steps {times} is not the batch "
            f"size of {batch}",
            hint="give both so that their product is --batch-size",
        )
    if device.type != "cpu":
        if arguments.device != device and device.index is not None:
            raise UsageError(
                f"training runs on {arguments.device}, not on {device}", hint="choose with CUDA_VISIBLE_DEVICES"
            )
        arguments._n_gpu = 1  # several would each take a batch, behind the back of the budget
    _check_processes(arguments, processes)
    return arguments


def _check_processes(arguments: transformers.TrainingArguments, processes: int) -> None:
    """See that what was asked for several processes is what `recover` counts on.

    Raises:
        UsageError: naming the argument.
    """
    if arguments.world_size != processes:
        raise UsageError(
            f"the Trainer sees {arguments.world_size} processes, the launcher has started {processes}",
            hint="start with torchrun or accelerate launch",
        )
    if processes > 1 and arguments.accelerator_config.split_batches:
        raise UsageError(
            "--trainer accelerator_config: split_batches divides a batch among the processes",
            hint="leave it out: --batch-size is that of each process",
        )
    own = _on("FSDP_ACTIVATION_CHECKPOINTING") if _on("ACCELERATE_USE_FSDP") else False
    if own or (arguments.fsdp_plugin_args or {}).get("activation_checkpointing"):
        arguments.activation_checkpointing = False  # FSDP does it itself, and the Trainer refuses both
    if not arguments.fsdp:
        return
    if arguments.fsdp_plugin_args is None:
        raise UsageError("--trainer fsdp_config: xla is not supported", hint=_HINT)
    if arguments.fsdp_plugin_args["fsdp_version"] != 2:
        raise UsageError(f"--trainer fsdp_config: version 1 is not supported: {_FSDP1}", hint=_HINT)
    arguments.fsdp_plugin_args["cpu_ram_efficient_loading"] = False
