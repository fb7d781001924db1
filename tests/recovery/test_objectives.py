"""The loss of a batch is the sum of its named parts, with a teacher on disk and with a live one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from secateur.recovery.objectives import LanguageObjective
from secateur.recovery.teacher import top_logits
from tests.models import tiny_model

VOCABULARY = 128


@pytest.fixture(scope="module")
def parts() -> dict[str, torch.Tensor]:
    """Each part, written out for the whole vocabulary."""
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = student(input_ids=ids).logits, teacher(input_ids=ids).logits
    kept = range(ids.shape[1])
    divergence = [
        F.kl_div(ours[row, at].log_softmax(-1), theirs[row, at].log_softmax(-1), log_target=True, reduction="sum")
        for row in range(2) for at in kept
    ]  # fmt: skip
    text = [-ours[row, at].log_softmax(-1)[ids[row, at + 1]] for row in range(2) for at in kept[:-1]]
    return {"kd": torch.stack(divergence).mean(), "lm": torch.stack(text).mean(), "ids": ids, "theirs": theirs}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("loss", ["lm", "kd", "kd+lm"])
def test_the_loss_is_the_sum_of_its_parts(loss: str, cached: bool, parts: dict[str, torch.Tensor]) -> None:
    batch = {"input_ids": parts["ids"]}
    if cached:
        batch["teacher_ids"], batch["teacher_log_probabilities"] = top_logits(parts["theirs"], VOCABULARY)
    objective = LanguageObjective(loss, teacher=None if cached else tiny_model("llama", seed=1), top_k=VOCABULARY)
    with torch.no_grad():
        found = objective(tiny_model("llama"), batch)
    expected = torch.stack([parts[name] for name in loss.split("+")]).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
