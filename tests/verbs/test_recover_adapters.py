"""`recover --mode adapter-moe`: what is written, loaded in a fresh process, counted, resumed and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import secateur
from secateur.errors import Interrupted, UnsupportedModelError, UsageError
from secateur.measure.model import load_model
from tests.models import calibration_for, save_tiny
from tests.verbs.recovering import StopAt, as_bytes, pruned_model, recover_tiny, tensors, weights_of

pytestmark = pytest.mark.usefixtures("cache")
ADDED = 2 * 4 * (2 * 3 * 32 + 32)
OPTIONS = {"mode": "adapter-moe", "experts": 4, "top_k": 2, "dim": 3, "learning_rate": 1e-2, "loss": "lm"}


@pytest.mark.parametrize(("family", "verify"), [("llama", True), ("gpt2", False)])
def test_adapters_come_to_a_pruned_model_and_nothing_else_changes(family, verify, root: Path, tmp_path: Path) -> None:
    pruned, out = pruned_model(root, family, family), tmp_path / "out"
    result = recover_tiny(pruned, out, root, verify=verify, **OPTIONS)
    assert result.training["held_out_loss"] < result.training["held_out_loss_before"]
    assert result.after.parameters - result.before.parameters == ADDED
    assert any(f"{ADDED:,} parameters more" in line for line in result.verdict)
    assert result.verified == verify
    old, new = tensors(pruned), tensors(out)
    assert set(old) < set(new)
    assert all(as_bytes(weight) == as_bytes(new[key][1]) for key, (_, weight) in old.items())
    assert sum(new[key][1].numel() for key in set(new) - set(old)) == ADDED
    assert "`import secateur` first" in (out / "README.md").read_text()
    model, ids = load_model(out), calibration_for("llama")[:1, :8]
    assert model.num_parameters() - load_model(pruned).num_parameters() == ADDED
    with torch.no_grad():
        found = [
            model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0).tolist()
            for cached in (True, False)
        ]
    assert found[0] == found[1]
    assert json.loads((out / "config.json").read_text())["model_type"] == "secateur"
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert load_model(tmp_path / "again")(ids).logits.equal(model(ids).logits)


def test_other_verbs_open_the_result_and_it_takes_no_second_set(root: Path, tmp_path: Path) -> None:
    pruned, out = pruned_model(root, "llama", "llama"), tmp_path / "out"
    recover_tiny(pruned, out, root, **OPTIONS)
    assert secateur.inspect(out).parameters == secateur.inspect(pruned).parameters + ADDED
    assert secateur.generate(out, "The", new_tokens=3) is not None
    with pytest.raises(UnsupportedModelError, match="converted already"):
        recover_tiny(out, tmp_path / "again", root, **OPTIONS)
    more = recover_tiny(out, tmp_path / "more", root, loss="lm", learning_rate=1e-3)  # all weights, zeros held
    assert more.zeros_held > 0
    assert secateur.inspect(tmp_path / "more").parameters == secateur.inspect(out).parameters


def test_a_run_that_was_stopped_goes_on_and_ends_the_same(root: Path, tmp_path: Path) -> None:
    pruned = pruned_model(root, "llama", "llama")
    options = {**OPTIONS, "save_minutes": 1e-6}
    recover_tiny(pruned, tmp_path / "whole", root, **options)
    with pytest.raises(Interrupted):
        recover_tiny(pruned, tmp_path / "out", root, reporter=StopAt("training", 6), **options)
    recover_tiny(pruned, tmp_path / "out", root, resume=True, **options)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_what_has_no_place_for_adapters_is_refused(root: Path, tmp_path: Path) -> None:
    pruned = pruned_model(root, "opt", "opt")
    with pytest.raises(UnsupportedModelError, match="nothing to put adapters behind"):
        recover_tiny(pruned, tmp_path / "out", root, **OPTIONS)
    rows = [json.dumps({"text": f"a text about thing {i}", "label": i % 2}) for i in range(40)]
    (tmp_path / "labels.jsonl").write_text("\n".join(rows))
    encoder = save_tiny(tmp_path / "encoder", "distilbert")
    with pytest.raises(UsageError, match="trains language models on text"):
        recover_tiny(encoder, tmp_path / "out", root, data=str(tmp_path / "labels.jsonl"), mode="adapter-moe")
    assert not (tmp_path / "out").exists()
    told = recover_tiny(pruned_model(root, "llama", "llama"), tmp_path / "full", root, loss="lm", dim=3)
    assert any("--dim has no effect" in warning for warning in told.warnings)
