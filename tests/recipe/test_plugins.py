import subprocess
import sys
from dataclasses import dataclass

import pytest

from secateur import plugins
from secateur.errors import SparsityError, UnknownNameError, UsageError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a made-up plug-in."""

    size: int = 3
    """How many
    there are."""
    share: float = 0.5
    """A share."""
    fast: bool = False
    """Whether to hurry."""
    scope: str = "row"
    """A word."""


def test_listing_and_describing_import_no_torch():
    code = (
        "import sys; from secateur import plugins\n"
        "for kind in ('methods', 'allocation'):\n"
        "    for name in plugins.available(kind):\n"
        "        plugins.describe(kind, name, kind)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_available_gives_the_first_line_of_each_docstring():
    methods = plugins.available("methods")
    assert not any(name.startswith("_") for name in methods)
    assert all(line.endswith(".") for line in methods.values())
    assert list(methods) == sorted(methods)


def test_every_listed_name_loads_a_class_of_that_name():
    for kind in ("methods", "allocation"):
        for name in plugins.available(kind):
            assert plugins.load_class(kind, name, kind).name == name


def test_unknown_method_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown method 'sparsgpt'") as caught:
        plugins.make_method("sparsgpt")
    assert caught.value.nearest == "sparsegpt"
    assert "wanda" in caught.value.hint
    with pytest.raises(UnknownNameError):
        plugins.describe("methods", "nothing-like-it", "method")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Options()),
        ({"size": "7", "share": "0.25"}, Options(size=7, share=0.25)),
        ({"fast": "True", "scope": "matrix"}, Options(fast=True, scope="matrix")),
        ({"fast": False, "size": 7.0, "share": 1}, Options(size=7, share=1.0)),
    ],
)
def test_texts_become_the_types_of_the_fields(given, expected):
    assert plugins.build(Options, given, "it") == expected


@pytest.mark.parametrize(
    "given",
    [
        {"size": "seven"},
        {"size": 7.5},
        {"size": True},
        {"size": None},
        {"share": "much"},
        {"share": [1]},
        {"fast": "yes"},
    ],
)
def test_other_values_are_refused(given):
    with pytest.raises(UsageError, match=f"option {next(iter(given))} of it"):
        plugins.build(Options, given, "it")


def test_unknown_option_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown option of it 'siize'") as caught:
        plugins.build(Options, {"siize": 1}, "it")
    assert caught.value.nearest == "size"
    assert plugins.make_method("sparsegpt", {"block-size": "64"}).block_size == 64


def test_help_is_the_text_under_each_field():
    assert plugins.option_help(Options) == {
        "size": "How many there are.",
        "share": "A share.",
        "fast": "Whether to hurry.",
        "scope": "A word.",
    }


def test_description_has_options_with_type_and_default():
    description = plugins.describe("methods", "sparsegpt", "method")
    assert [(o.name, o.type, o.default) for o in description.options] == [
        ("block_size", "int", "128"),
        ("damping", "float", "0.01"),
    ]
    assert "|X (W - Q)^T|^2" in description.doc
    assert plugins.describe("methods", "random", "method").options == ()


def test_a_target_outside_the_range_is_refused():
    with pytest.raises(SparsityError):
        plugins.Target(1.0)
