"""One row of the table: a family built tiny, every kind of pruning tried on it, and every success looked into."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.engine.blocks import find_structure
from secateur.errors import SecateurError, SparsityError
from secateur.result import PruneResult
from tests.coverage.check import WrongResultError, check, load
from tests.coverage.families import Family
from tests.coverage.tiny import NotBuiltError, Tiny, answer, inputs_of, tiny_model

COLUMNS = ("blocks", "unstructured", "2:4", "depth", "ffn", "attention")
SHARES = (0.12, 0.03, 0.25, 0.06, 0.2, 0.006, 0.4)
"""Sparsities that are tried one after the other where the structure is refused for the amount alone."""
TOGETHER = (0.3, 0.12, 0.5)
"""The same for heads together with hidden channels, which go in larger steps."""
Row = dict[str, Any]
Prune = Callable[..., PruneResult]


def survey(family: Family, scratch: Path, prune: Prune = secateur.prune, known: Row | None = None) -> Row:
    """The row of a family.

    Args:
        scratch: an empty folder.
        prune: what is surveyed; tests put a faulty one in.
        known: a row of which everything but the attention is taken over.
    """
    row: Row = {"kind": family.kind, "family": family.model_type, "class": family.class_name}
    source = scratch / "model"
    try:
        tiny = tiny_model(family.config_class, family.model_class, decoder=family.kind == "causal")
        _check_that_stock_reloads(tiny, source)
    except Exception as error:  # noqa: BLE001 - whatever stops it: the family does not build here
        why = str(error) if isinstance(error, NotBuiltError) else f"{type(error).__name__}: {_line(error)}"
        return {**row, "built": False, "why": why}
    parts = {type(module).__name__.lower() for module in tiny.model.modules()}
    row |= {
        "built": True, "parameters": tiny.model.num_parameters(), "recipe": tiny.recipe,
        "has_attention": any("attention" in part or "attn" in part for part in parts),
    }  # fmt: skip
    work = Work(source, scratch / "out", tiny, prune)
    if known is not None:
        return {**known, "attention": _attention(work)}
    row["blocks"] = _inspected(source)
    row["unstructured"] = work.attempt({"method": "sparsegpt", "sparsity": 0.5})
    row["2:4"] = work.attempt({"method": "wanda", "pattern": "2:4"}, "2:4")
    row["depth"] = work.first_share({"structure": "depth"}, (0.25, 0.5))
    row["ffn"] = work.first_share({"structure": "ffn", "round_to": 8}, SHARES)
    if not row["ffn"]["ok"] and not row["ffn"].get("silent"):  # a ratio that is a whole number takes larger steps
        again = work.attempt({"structure": "ffn", "round_to": 64, "sparsity": 0.2})
        row["ffn"] = again if again["ok"] or again.get("silent") else row["ffn"]
    row["attention"] = _attention(work)
    return row


def _attention(work: Work) -> Row:
    """Groups, or else heads; where no config says fewer of these alone, heads or groups together with channels."""
    reason: Row = {}
    for structure, shares in (
        ("kv-groups", SHARES), ("heads", SHARES), ("heads,hidden", TOGETHER), ("kv-groups,hidden", TOGETHER)
    ):  # fmt: skip
        found = work.first_share({"structure": structure}, shares)
        if found["ok"] or found.get("silent"):
            return found
        if not reason or ("hidden" in structure and "that can be removed" not in found["why"]):
            reason = found
    return reason


def _check_that_stock_reloads(tiny: Tiny, folder: Path) -> None:
    tiny.model.save_pretrained(folder)
    tiny.model = load(folder).model  # without what the file does not hold, such as sinusoids that the class makes
    expected = answer(tiny.model, tiny.inputs)
    if not torch.allclose(answer(tiny.model, tiny.inputs), expected, rtol=1e-4, atol=1e-5):
        raise NotBuiltError("its forward is not deterministic")
    found = answer(load(folder).model, tiny.inputs)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
        raise NotBuiltError("the stock class itself does not reload what it saved")


def _inspected(source: Path) -> Row:
    try:
        found = secateur.inspect(source)
    except Exception as error:  # noqa: BLE001 - a crash is a result of the survey, too
        return _no(error)
    rows: dict[str, int] = {}
    for block in find_structure(load(source).model).blocks:
        name = block.name.rpartition(".")[0]
        rows[name] = rows.get(name, 0) + 1
    if found.obstacle is not None:
        return {"ok": False, "why": found.obstacle}
    return {"ok": True, "detail": " + ".join(map(str, rows.values()))}


class Work:
    """Tries recipes on one model."""

    def __init__(self, source: Path, out: Path, tiny: Tiny, prune: Prune) -> None:
        self._source, self._out, self._inputs, self._prune = source, out, tiny.inputs, prune
        self._dense = load(source)
        batches = next(batch for batch in inputs_of(tiny.model, 4, 48, 5) if set(batch) == set(tiny.inputs))
        plain = set(batches) <= {"input_ids", "decoder_input_ids"}
        ids = torch.cat([batches[name] for name in ("input_ids", "decoder_input_ids") if name in batches], dim=1) \
            if plain else None  # fmt: skip
        self._calibration = ids if ids is not None else [batches]

    def first_share(self, settings: Row, shares: Sequence[float]) -> Row:
        """The first of some sparsities that is not refused for its amount."""
        found: Row = {}
        for share in shares:
            found = self.attempt({**settings, "sparsity": share})
            if found["ok"] or not found.pop("amount", False):
                break
        return found

    def attempt(self, settings: Row, pattern: str = "unstructured") -> Row:
        """Prune, and look into what is reported as a success."""
        try:
            result = self._run(settings, verify=False)
        except SparsityError as error:
            return {**_no(error), "amount": True}
        except Exception as error:  # noqa: BLE001 - a crash is a result of the survey, too
            return _no(error)
        try:
            check(self._source, self._out, result, self._inputs, pattern, copy.deepcopy(self._dense))
        except WrongResultError as error:
            return self._wrong(settings, str(error))
        except Exception as error:  # noqa: BLE001 - what cannot be checked is no success
            return {"ok": False, "why": f"could not be checked, {type(error).__name__}: {_line(error)}"}
        return {"ok": True, "detail": _detail(result)}

    def _wrong(self, settings: Row, why: str) -> Row:
        """A wrong result is a silent failure unless the command's own verification catches it."""
        try:
            self._run(settings, verify=True)
        except SecateurError as error:
            return {"ok": False, "why": f"caught by the verification: {_line(error)}"}
        return {"ok": False, "silent": True, "why": why}

    def _run(self, settings: Row, *, verify: bool) -> PruneResult:
        shutil.rmtree(self._out, ignore_errors=True)
        shutil.rmtree(self._out.with_name(self._out.name + ".partial"), ignore_errors=True)
        return self._prune(
            self._source, self._out, calibration=self._calibration, verify=verify, evaluate=False, device="cpu",
            **settings,
        )  # fmt: skip


def _detail(result: PruneResult) -> str:
    """What went, in few words."""
    structure = result.recipe["structure"]
    if not structure:
        return f"{result.sparsity:.1%}"
    if structure == ["depth"]:
        return f"{len(result.blocks_kept or ())} blocks stay"
    if "hidden" in structure:
        return f"{structure[0]} with hidden channels: {len(result.channels_kept or ())} channels stay"
    units = sorted({matrix.shape[-1] for matrix in result.matrices})
    return f"{structure[0]}: {', '.join(map(str, units))} columns stay"


def _no(error: BaseException) -> Row:
    name = "" if isinstance(error, SecateurError) else f"crash, {type(error).__name__}: "
    return {"ok": False, "why": name + _line(error)}


def _line(error: BaseException) -> str:
    text = error.message if isinstance(error, SecateurError) else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:300]
