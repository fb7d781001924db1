"""Cuts the feed-forward networks of a model into experts, block by block, from the inputs that calibration text makes.

All networks see the inputs of the dense model, as in the publication: what an earlier one loses does not change what a
later router is trained on.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from secateur.checkpoint.folder import copy_side_files
from secateur.checkpoint.ledger import LEDGER, Ledger
from secateur.checkpoint.writer import CheckpointWriter
from secateur.conversions.moe import Moe
from secateur.converting.activity import is_zero_below
from secateur.converting.opened import Converted, Opened
from secateur.converting.output import ConvertSink, Replaced, copied_keys, layout_of, write_config
from secateur.engine.activations import ActivationStore
from secateur.engine.blocks import Block
from secateur.engine.capture import Lane
from secateur.engine.device import activation_limit
from secateur.engine.feed_forward import FeedForward, FeedForwards, fill
from secateur.engine.forward import probe_inputs, stream_forward
from secateur.engine.plan import Plan
from secateur.engine.stream import BlockStream
from secateur.errors import UnsupportedModelError
from secateur.layers.moe import BIASES, MoeFfn, router_shapes
from secateur.layers.spec import Spec
from secateur.plugins import make_method
from secateur.progress import Reporter
from secateur.result import ConvertedMatrix, PrunedMatrix
from secateur.seeds import derived_seed

LIMIT = 8192
"""Calibration tokens that a router is trained on, spread over the text."""
UNREACHED = "no calibration token came: experts and router from the weights alone"
ZERO = " of its activity is exactly zero"
"""How a note ends that begins with a share; it is read back of blocks that were done before a run was resumed."""


@dataclass
class Ffn:
    """One feed-forward network that is cut: its parts, its config entry, and how its neurons were arranged."""

    parts: FeedForward
    entry: dict[str, Any]
    replaced: dict[str, Replaced]
    """Role of a matrix -> what takes its place."""
    made: dict[str, Tensor] = field(default_factory=dict)
    """Tensors by their names in the layer; those of the block at hand only."""


class MoeWork:
    """A conversion that was found possible."""

    def __init__(
        self, conversion: Moe, opened: Opened, batches: Sequence[Mapping[str, Tensor]], reporter: Reporter
    ) -> None:
        self.models: list[dict[str, Any]] = []
        self.conversion, self.opened, self.batches = conversion, opened, batches
        found = FeedForwards(opened.model)
        self.by_block: dict[int, list[Ffn]] = {}
        without = []
        for block in opened.structure.blocks:
            plain = [one for one in found.of(block) if set(one.matrices.values()) <= set(opened.specs)]
            self.by_block[block.index] = [self._named(one) for one in plain]
            if not plain:
                without.append(block.name)
        if not self.networks:
            raise UnsupportedModelError(
                f"no block of {type(opened.model).__name__} has a plain feed-forward network among the chosen matrices",
                hint="it must be a module of its own: two linear layers around an activation, or three with a gate",
            )
        if without:
            reporter.note(
                f"{len(without)} blocks have no plain feed-forward network and stay as they are: {without[0]}"
            )
        self.changed = {one.key: one for ffn in self.networks for one in ffn.replaced.values()}
        self.ffn_of = {one.key: ffn for ffn in self.networks for one in ffn.replaced.values()}
        layout = layout_of(opened, self.changed)
        self.nbytes, self.parameters = layout.nbytes, (layout.parameters, layout.parameters)

    @property
    def networks(self) -> list[Ffn]:
        return [ffn for found in self.by_block.values() for ffn in found]

    def _named(self, parts: FeedForward) -> Ffn:
        """The tensors of the layer under the checkpoint's name of the network."""
        opened, conversion = self.opened, self.conversion
        up = opened.specs[parts.matrices["up"]]
        down = opened.specs[parts.matrices["down"]]
        conversion.check(parts.module, up.out_features)
        entry = {
            "kind": "moe", **parts.entry(experts=conversion.count, top=conversion.chosen, router=conversion.router),
        }  # fmt: skip
        shapes = {
            "gate": (up.out_features, up.in_features), "up": (up.out_features, up.in_features),
            "down": (down.in_features, down.out_features),
        }  # fmt: skip
        made = {}
        for role, name in parts.matrices.items():
            key = opened.key_of(name)
            child = name.removeprefix(parts.module)
            if not key.endswith(child):
                raise UnsupportedModelError(f"{name} has another name in the checkpoint: {key}", hint="use --ignore")
            stem = key.removesuffix(child)
            tensors: dict[str, tuple[str, tuple[int, ...]]] = {role: (f"{stem}.{role}", shapes[role])}
            if role == "down":
                routers = router_shapes(conversion.count, up.in_features, conversion.router)
                tensors |= {leaf: (f"{stem}.{leaf}", shape) for leaf, shape in routers.items()}
            bias = name.removesuffix("weight") + "bias"
            renamed = {}
            if opened.binding.bound(bias):
                renamed[opened.binding.unit_of(bias).keys[0]] = f"{stem}.{BIASES[role]}"
            made[role] = Replaced(name, key, entry, tensors, renamed)
        return Ffn(parts, entry, made)

    def solve(self, ffn: Ffn, tensors: Mapping[str, Tensor], inputs: Tensor | None) -> list[PrunedMatrix]:
        """Arrange the neurons of a network and make its router.

        Args:
            tensors: of the block by full name.
            inputs: (tokens, in) float32, None where no token came.
        """
        conversion, parts, opened = self.conversion, ffn.parts, self.opened
        old = opened.model.get_submodule(parts.module)
        own = {name.removeprefix(parts.module + "."): tensor for name, tensor in tensors.items()}
        layer = _empty(old, ffn.entry).to(opened.device).eval()
        fill(layer, {name: tensor.to(opened.device, torch.float32) for name, tensor in own.items()}, ffn.entry, old)
        generator = torch.Generator().manual_seed(derived_seed(opened.recipe.seed, parts.module))
        with torch.no_grad():
            order = conversion.arrange(layer, inputs, generator)
            for name in ("gate", "up", "down", "gate_bias", "up_bias"):
                tensor = getattr(layer, name)
                if tensor is not None:
                    tensor.data = tensor.data[order]
            for name, tensor in conversion.route(layer, inputs, generator).items():
                layer.get_parameter(name).data = tensor
            ffn.made = {name: tensor.detach().cpu() for name, tensor in layer.named_parameters()}
            lost = None if inputs is None else conversion.lost(layer, inputs)
            zero = 0.0 if inputs is None else float((layer.hidden(inputs) == 0).float().mean())
        told = [UNREACHED]
        if lost is not None:
            told = [
                f"the chosen experts hold {lost['captured']:.1%} of the activity, the oracle's {lost['best']:.1%}",
                f"{zero:.2%}{ZERO}",
            ]
        return [
            PrunedMatrix(
                one.name, opened.specs[one.name].shape, 0, 0.0, lost["error"] if lost and role == "down" else None,
                notes=told if role == "down" else [],
            )
            for role, one in ffn.replaced.items()
        ]  # fmt: skip

    def write(self, partial: Path, fingerprint: dict[str, Any], resume: bool, reporter: Reporter) -> Converted:
        """Convert block by block."""
        opened = self.opened
        ledger = Ledger.begin(partial / LEDGER, fingerprint, resume=resume)
        with CheckpointWriter(partial, layout_of(opened, self.changed), resume=resume) as writer:
            sink = _MoeSink(opened, writer, ledger, self.changed, lambda one: self.ffn_of[one.key].made, _never)
            sink.permuted = {
                old: (self.ffn_of[one.key], new.rpartition(".")[2])
                for one in self.changed.values() for old, new in one.renamed.items() if not new.endswith("down_bias")
            }  # fmt: skip
            if sink.blocks_done:
                reporter.note(f"resuming: {sink.blocks_done} of {len(opened.structure.blocks)} blocks are done")
            store = ActivationStore(activation_limit(opened.recipe.activation_memory), partial)
            stream = _MoeStream(
                opened.model, opened.structure, opened.binding, opened.reader, sink, make_method("magnitude"), Plan(),
                store, opened.device, opened.compute, opened.recipe.seed, reporter, "cutting into experts",
            )  # fmt: skip
            stream.work = self
            found = stream.run(self.batches)
            sink.copy_rest()
            shards = writer.finish()
        copy_side_files(opened.source.folder, partial)
        spec = Spec("moe", {ffn.parts.module: ffn.entry for ffn in self.networks})
        write_config(partial, opened, spec)
        probe = probe_inputs(opened.model)
        rows = self._rows(found.matrices)
        for row in rows:
            if UNREACHED in row.notes:
                reporter.warn(f"{row.name}: {UNREACHED}")
        copied = copied_keys(opened, list(self.changed.values()))
        return Converted(
            spec=spec,
            matrices=rows,
            shards=shards,
            probe=probe,
            answer=stream_forward(partial, probe),
            prunable=self._prunable(),
            renamed={new: old for new, old in copied.items() if old not in sink.permuted},
            told=self._told(rows),
        )

    def _prunable(self) -> dict[str, int]:
        kept = {key: count for key, count in self.opened.prunable().items() if key not in self.changed}
        made = [ffn.replaced[role].tensors[role] for ffn in self.networks for role in ffn.replaced]
        return kept | {key: prod(shape) for key, shape in made}

    def _rows(self, found: Sequence[PrunedMatrix]) -> list[ConvertedMatrix]:
        solved = {matrix.name: matrix for matrix in found}
        replaced = {one.name: one for one in self.changed.values()}
        rows = []
        for name, spec in self.opened.specs.items():
            one = replaced.get(name)
            if one is None:
                rows.append(ConvertedMatrix(name, spec.shape, "dense", spec.size, None, 0.0))
            else:
                row = solved[name]
                rows.append(ConvertedMatrix(name, spec.shape, "moe", one.parameters, None, row.loss, list(row.notes)))
        return rows

    def _told(self, rows: Sequence[ConvertedMatrix]) -> list[str]:
        conversion, first = self.conversion, self.networks[0]
        sizes = {self.opened.specs[ffn.parts.matrices["up"]].out_features for ffn in self.networks}
        each = " or ".join(f"{size // conversion.count:,}" for size in sorted(sizes))
        share = conversion.chosen / conversion.count
        more = sum(conversion.added(self.opened.specs[ffn.parts.matrices["up"]].in_features) for ffn in self.networks)
        said = [
            f"{len(self.networks)} feed-forward networks became {conversion.count} experts of {each} neurons each, of "
            f"which {conversion.chosen} are computed for a token ({share:.0%}). "
            f"The weights are the same; routers added {more:,} parameters.",
        ]
        errors = [row.error for row in rows if row.kind == "moe" and row.error is not None]
        if errors:
            said.append(
                f"On calibration text that no router saw, {median(errors):.2%} of the squares of the networks'"
                f" outputs are lost (median; at most {max(errors):.2%})."
            )
        shares = [float(note.removesuffix("%" + ZERO)) for row in rows for note in row.notes if note.endswith(ZERO)]
        if shares:
            said.append(
                f"Of the networks' activity there {median(shares):.1f} % is exactly zero (median; {min(shares):.1f} to "
                f"{max(shares):.1f} %)."
            )
        act = self.opened.model.get_submodule(f"{first.parts.module}.{first.parts.act}")
        if share < 1 and not is_zero_below(act):
            said.append(
                f"The activation is {type(act).__name__}: it is not sparse, so expect more loss than published for "
                "ReLU; --to relu and secateur recover make it one."
            )
        if share < 1 and conversion.router == "oracle":
            said.append("The oracle computes all neurons in order to choose: it is a bound on quality, not a saving.")
        return said


def _empty(old: nn.Module, entry: Mapping[str, Any]) -> MoeFfn:
    """The layer with room for float32 weights, which the skeleton has none of."""
    made: MoeFfn = importlib.import_module("secateur.layers.moe").build(old, entry)
    return made.to_empty(device="cpu").float()


def _tokens(batch: Mapping[str, Tensor]) -> int:
    """About how many a batch has; of an image, as many as usual."""
    return max(value.shape[0] * 256 if value.is_floating_point() else value.numel() for value in batch.values())


def _never(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> Tensor:
    raise NotImplementedError("a resumed run looks at the source, not at what was written")


class _MoeSink(ConvertSink):
    """Copies biases of neurons in the order of the neurons."""

    permuted: dict[str, tuple[Ffn, str]]
    """Key of a bias -> its network and its name in the layer."""

    def copy(self, key: str) -> None:
        if key in self.permuted:
            ffn, leaf = self.permuted[key]
            new = self._renames[key]
            self._writer.write(new, ffn.made[leaf].to(self._dtypes[new]))
        else:
            super().copy(key)


class _MoeStream(BlockStream):
    """Runs the dense model, and looks at what enters its feed-forward networks."""

    work: MoeWork

    def _prune_block(self, block: Block, lanes: list[Lane], final: dict[str, Tensor]) -> list[PrunedMatrix]:
        networks = self.work.by_block[block.index]
        self._install(block, final, self.compute_dtype, frozen=True)
        with self._watched(networks) as seen:
            for lane in lanes:
                self._pass(lane)
        for other in self.work.networks:
            other.made = {}
        rows = []
        for ffn in networks:
            inputs = torch.cat(seen[ffn.parts.module]) if seen[ffn.parts.module] else None
            rows += self.work.solve(ffn, final, inputs)
        return rows

    def _written_block(self, block: Block, names: Sequence[str], done: list[PrunedMatrix]) -> dict[str, Tensor]:
        return self.binding.load(names, self.source)

    @contextmanager
    def _watched(self, networks: Sequence[Ffn]) -> Iterator[dict[str, list[Tensor]]]:
        """While it lasts, every so many-th row of what enters the networks is kept, float32."""
        seen: dict[str, list[Tensor]] = {ffn.parts.module: [] for ffn in networks}
        step = max(1, sum(map(_tokens, self.work.batches)) // LIMIT)
        handles = []

        def watch(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                with torch._C.DisableTorchFunction():  # a copy that the lane's watcher does not know and never empties
                    seen[path].append(x.detach().reshape(-1, x.shape[-1])[::step].float().clone())

            return hook

        try:
            for ffn in networks:
                module = self.model.get_submodule(ffn.parts.module)
                handles.append(module.register_forward_pre_hook(watch(ffn.parts.module), with_kwargs=True))
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def prepare(conversion: Moe, opened: Opened, batches: Sequence[Mapping[str, Tensor]], reporter: Reporter) -> MoeWork:
    """Check that the model has feed-forward networks that can be cut as asked.

    Raises:
        SecateurError: where it has not.
    """
    return MoeWork(conversion, opened, batches, reporter)
