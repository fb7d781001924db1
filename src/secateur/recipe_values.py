"""Values of a recipe as plain data hold them, each brought to its type or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.errors import RecipeError

NONE_IS_DEFAULT = {
    "samples", "sequence_length", "sparsity", "budget", "refit", "permute", "error_correction", "bits",
    "group_size",
}  # fmt: skip
"""Keys whose default depends on the rest of the recipe, or on the model."""
_STRINGS = {"method", "budget", "depth_by", "pattern", "reconstruct", "allocation", "calibration", "device", "dtype"}
_INTEGERS = {"samples", "sequence_length", "seed", "round_to", "bits", "group_size"}


def checked(key: str, value: Any, where: str) -> Any:
    """One value in its type.

    Raises:
        RecipeError: saying which key is wrong, and what it must be.
    """

    def refuse(expected: str) -> RecipeError:
        return RecipeError(f"{where}: {key} is {value!r}", hint=f"{key} must be {expected}")

    if value is None:
        if key in NONE_IS_DEFAULT:
            return None
        raise refuse("set; leave the line out for the default")
    if key in _STRINGS or key == "compute_dtype":
        if key == "pattern" and isinstance(value, int):  # YAML 1.1 reads 2:4 as the base-60 number 124
            raise RecipeError(f"{where}: pattern is the number {value}", hint='write N:M in quotes: pattern: "2:4"')
        if not isinstance(value, str):
            raise refuse("a text")
    elif key in _INTEGERS:
        if isinstance(value, bool) or not isinstance(value, int):
            raise refuse("a whole number")
    elif key == "sparsity":
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise refuse("a number in [0, 1)")
        return float(value)
    elif key in {"update", "refit", "permute"}:
        if not isinstance(value, bool):
            raise refuse("true or false")
    elif key == "structure":
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            raise refuse("a name, or several divided by commas")
        return tuple(name.strip() for part in parts for name in part.split(","))
    elif key in {"targets", "ignore"}:
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise refuse("a list of patterns")
        return tuple(value)
    elif key in {"method_options", "allocation_options", "reconstruct_options"}:
        if not isinstance(value, Mapping):
            raise refuse("a mapping of option names to values")
        return dict(value)
    elif key in {"activation_memory", "error_correction"}:
        return "off" if value is False else str(value)  # YAML 1.1 reads off as false
    return value
