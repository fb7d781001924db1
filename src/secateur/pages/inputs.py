"""What a page is made of: the result of a folder, a study or a benchmark, or an allocation; the file says which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.allocation_file import AllocationFile, is_allocation_file, read_allocation
from secateur.bench_result import BenchResult
from secateur.errors import UsageError
from secateur.pages.decode import EXPECTED, decode, read_json
from secateur.result import RESULT_FILE, ConvertResult, PruneResult, RecoverResult
from secateur.study_result import StudyResult

Result = PruneResult | RecoverResult | ConvertResult | StudyResult | BenchResult | AllocationFile
MARKS: dict[type[Result], tuple[str, ...]] = {
    PruneResult: ("recipe", "matrices", "before", "after"),
    ConvertResult: ("conversion", "matrices", "before", "after"),
    RecoverResult: ("student", "settings", "before", "after"),
    StudyResult: ("objectives", "trials"),
    BenchResult: ("runtime", "against"),
}
"""Keys by which a file is known."""
EXPORTED = ("format", "options", "bytes_folder")
"""The same for what `export` has written."""


@dataclass(frozen=True)
class Input:
    """One input. ``folder`` is where its model is, None for a study, a benchmark or an allocation."""

    name: str
    """Short, and different from that of every other input."""
    path: Path
    result: Result
    folder: Path | None = None


def read_inputs(paths: Sequence[str | Path]) -> list[Input]:
    """Read every input, in order.

    Raises:
        UsageError: for no input, one that is given twice, is not there, or is no result; what was expected is said.
    """
    if not paths:
        raise UsageError("nothing to report on", hint=EXPECTED)
    found: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        path = path.parent if path.name == RESULT_FILE and path.is_file() else path
        if any(path.resolve() == other.resolve() for other in found):
            raise UsageError(f"{given} is given twice", hint="give each input once")
        found.append(path)
    return [
        Input(name, path, _read(path), path if path.is_dir() else None)
        for name, path in zip(_names(found), found, strict=True)
    ]


@dataclass(frozen=True)
class Kept:
    """A model that a study has kept."""

    number: int
    """Of its trial."""
    folder: Path
    source: Mapping[str, Any]
    """The dense model."""
    made: PruneResult | RecoverResult | None
    """What the folder says of itself; None of one that is stored in few bits, which says that only."""


def kept_models(study: StudyResult) -> list[Kept]:
    """Finalists, or before there are any what is recommended, whose models are still where the study left them.

    What cannot be read is left out.
    """
    dense: Mapping[str, Any] = {"name": study.model, "model": study.model}
    asked = study.finalists or [trial for trial in study.trials if trial.number == study.recommended]
    found: list[Kept] = []
    for trial in asked:
        folder = Path(trial.out)
        try:
            if not trial.out or not (folder / RESULT_FILE).is_file():
                continue
            if all(mark in read_json(folder / RESULT_FILE) for mark in EXPORTED):
                found.append(Kept(trial.number, folder, dense, None))
            elif isinstance(result := _read(folder), PruneResult | RecoverResult):
                found.append(Kept(trial.number, folder, result.source, result))
        except (UsageError, OSError, ValueError):
            continue
    told = next((one.source for one in found if one.made is not None), dense)  # with its hash, where one has it
    return [one if one.made is not None else replace(one, source=told) for one in found]


def _read(path: Path) -> Result:
    file = path
    if path.is_dir():
        file = path / RESULT_FILE
        if not file.is_file():
            raise UsageError(
                f"{path} has no {RESULT_FILE}: prune, recover and convert write one beside the model", hint=EXPECTED
            )
    elif not path.exists():
        raise UsageError(f"no such file or folder: {path}", hint=EXPECTED)
    if is_allocation_file(file):
        return read_allocation(file)
    if path.suffix in (".yaml", ".yml", ".db"):
        raise UsageError(
            f"{path} is what a study was made from, not its result",
            hint="give the .json beside the storage of the study; `secateur study status` writes it",
        )
    data = read_json(file)
    for cls, marks in MARKS.items():
        if all(mark in data for mark in marks):
            if path.is_dir() and cls in (StudyResult, BenchResult):
                break
            return decode(cls, data, str(file))
    raise UsageError(f"{file} is no result that can be reported on", hint=EXPECTED)


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    names = []
    for own in parts:
        count = 1
        while count < len(own) and sum(other[-count:] == own[-count:] for other in parts) > 1:
            count += 1
        names.append("/".join(own[-count:]))
    return names
