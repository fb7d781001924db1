"""``import secateur`` is light, and transformers knows the sparse format all the same, whichever comes first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import secateur
from secateur.runtime import hook

KNOWN = "from transformers.quantizers import auto; from transformers.models.auto import configuration_auto; "
KNOWN += "assert {'secateur', 'secateur-layers'} <= set(auto.AUTO_QUANTIZER_MAPPING); "
KNOWN += "assert {'secateur', 'secateur-layers'} <= set(auto.AUTO_QUANTIZATION_CONFIG_MAPPING); "
KNOWN += "assert 'secateur' in configuration_auto.CONFIG_MAPPING; "
AS_EVER = (
    "import sys; assert not any('secateur' in type(f).__module__ for f in sys.meta_path); "
    "assert type(auto.__spec__.loader).__module__ != 'secateur.runtime.hook'; "
    "assert auto.__loader__ is auto.__spec__.loader"
)
STARTS = {
    "secateur first, twice": "import secateur, sys; secateur.hook.install(); "
    f"assert not {{'torch', 'transformers', 'numpy'}} & set(sys.modules); {KNOWN}{AS_EVER}",
    "transformers first": "from transformers.quantizers import auto; "
    "assert 'secateur' not in auto.AUTO_QUANTIZER_MAPPING; "
    f"import secateur; {KNOWN}secateur.hook.install(); {AS_EVER}",
}


@pytest.mark.parametrize("start", STARTS)
def test_whichever_comes_first(start):
    environment = {**os.environ, "PYTHONPATH": str(Path(secateur.__file__).parent.parent)}
    command = [sys.executable, "-c", STARTS[start]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_only_the_registry_is_looked_at():
    finder = hook._Finder(list(hook.FOLLOWERS))
    assert finder.find_spec("transformers") is None
    assert finder.find_spec("transformers.quantizers") is None
