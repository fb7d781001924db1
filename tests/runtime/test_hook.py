"""``import secateur`` is light, and transformers knows the sparse format all the same, whichever comes first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import secateur

KNOWN = "from transformers.quantizers import auto; assert 'secateur' in auto.AUTO_QUANTIZER_MAPPING; "
KNOWN += "assert 'secateur' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING; "
AS_EVER = (
    "import sys; assert not any('secateur' in type(f).__module__ for f in sys.meta_path); "
    "assert type(auto.__spec__.loader).__module__ != 'secateur.runtime.hook'; "
    "assert auto.__loader__ is auto.__spec__.loader"
)
STARTS = {
    "secateur first": f"import secateur; {KNOWN}{AS_EVER}",
    "transformers first": f"import transformers; import secateur; {KNOWN}{AS_EVER}",
    "its registry first": f"import transformers.quantizers.auto; import secateur; {KNOWN}{AS_EVER}",
    "twice": f"import secateur; secateur.hook.install(); {KNOWN}secateur.hook.install(); {AS_EVER}",
}


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(secateur.__file__).parent.parent)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("start", STARTS)
def test_whichever_comes_first(start):
    done = python(STARTS[start])
    assert done.returncode == 0, done.stderr


def test_without_secateur_transformers_knows_nothing_of_it():
    code = "from transformers.quantizers import auto; assert 'secateur' not in auto.AUTO_QUANTIZER_MAPPING"
    assert python(code).returncode == 0


def test_waiting_loads_nothing_heavy():
    code = "import secateur, sys; print(*[name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    assert python(code).stdout.strip() == ""
