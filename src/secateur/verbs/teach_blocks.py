"""Training block by block on the engine: one block in memory at a time."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from secateur.checkpoint.ledger import Ledger
from secateur.checkpoint.reader import CheckpointReader
from secateur.checkpoint.source import Source
from secateur.checkpoint.writer import CheckpointWriter, layout_like
from secateur.engine.activations import ActivationStore
from secateur.engine.binding import Binding
from secateur.engine.block_training import BlockTraining
from secateur.engine.blocks import find_structure
from secateur.engine.device import activation_limit
from secateur.engine.forward import probe_inputs, stream_losses
from secateur.engine.inputs import inputs_of_window
from secateur.engine.plan import Plan
from secateur.engine.sink import CheckpointSink
from secateur.engine.skeleton import build_skeleton
from secateur.plugins import make_method
from secateur.progress import Reporter
from secateur.recovery.blocks import BlockRecovery
from secateur.verbs.lesson import Lesson
from secateur.verbs.taught import ASSESSED, Taught, generalisation


def teach_blocks(
    lesson: Lesson, source: Source, zeros_held: int, partial: Path, device: torch.device, dtype: torch.dtype,
    ledger: Ledger, reporter: Reporter,
) -> Taught:  # fmt: skip
    """Train block by block, one block in memory at a time, and write each as it is done.

    Raises:
        RunError: a loss that is not finite; finished blocks can be resumed.
    """
    assert lesson.teacher is not None
    assert lesson.windows is not None
    model = build_skeleton(source.folder)
    structure = find_structure(model)
    before = _assess(lesson, source.folder, device, partial)
    with CheckpointReader(source.folder) as reader, CheckpointReader(lesson.teacher.source.folder) as dense:
        binding = Binding(model, reader.keys)
        keys_of = {block.index: binding.keys_of(block.tensors) for block in structure.blocks}
        started = time.monotonic()
        with CheckpointWriter(partial, layout_like(reader), resume=bool(ledger.steps)) as writer:
            sink = CheckpointSink(reader, writer, ledger, keys_of)
            rows = _rows(lesson.batch_size, lesson.length)
            training = BlockTraining(
                lesson.epochs, lesson.learning_rate, lesson.batch_size // rows, tokens=lesson.tokens_per_step
            )
            stream = BlockRecovery(
                model, structure, binding, reader, sink, make_method("magnitude"), Plan(),
                ActivationStore(activation_limit("auto"), partial), device, dtype, lesson.settings.seed, reporter,
                teacher=dense, training=training,
            )  # fmt: skip
            probe = probe_inputs(model)
            cut = lesson.windows[lesson.split.train].split(rows)
            batches = [inputs_of_window(model, part) for part in cut]
            result = stream.run(batches, probe)
            sink.copy_rest()
            shards = writer.finish()
    text = (source.folder / "config.json").read_text(encoding="utf-8")
    (partial / "config.json").write_text(text, encoding="utf-8")
    seconds = time.monotonic() - started
    tokens = lesson.epochs * len(lesson.split.train) * lesson.length
    prunable = {}
    with CheckpointReader(partial) as written:
        keys = binding.keys_of([matrix.name for matrix in structure.matrices])
        prunable = {key: written.info(key).numel for key in keys}
    report = {
        "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds if seconds else None,
        "block_errors": _block_errors(ledger), **generalisation(before, _assess(lesson, partial, device, partial)),
    }  # fmt: skip
    return Taught(dict(shards), sink.zeros, prunable, None, zeros_held, probe, result.probe, report)


def _assess(lesson: Lesson, folder: Path, device: torch.device, scratch: Path) -> list[float | None]:
    """Mean loss on text that is held out and on text that is trained on, streamed as well."""
    assert lesson.windows is not None
    parts = [part[:ASSESSED] for part in (lesson.split.held_out, lesson.split.train)]
    if not type(build_skeleton(folder)).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return [None, None]  # an encoder predicts no next token
    losses = stream_losses(folder, lesson.windows[[*parts[0], *parts[1]]], device, scratch)
    halves = losses[: len(parts[0])], losses[len(parts[0]) :]
    return [sum(half) / len(half) if half else None for half in halves]


def _rows(batch_size: int, length: int) -> int:
    """Windows that go through a block together: as many as divide a step and are worth a product."""
    return max(
        rows for rows in range(1, batch_size + 1) if batch_size % rows == 0 and rows * length <= max(1024, length)
    )


def _block_errors(ledger: Ledger) -> dict[str, list[float]]:
    """Mean error of each block over the first and the last quarter of its training, those before a kill among them."""
    last = {step["block"]: step["matrices"][-1] for step in ledger.steps if step["matrices"]}
    return {
        str(index): [float(matrix["notes"][-1]), matrix["loss"]]
        for index, matrix in sorted(last.items())
        if matrix["loss"] is not None
    }
