"""What rounding costs a model that has learnt something: with random weights perplexity would hardly move."""

from __future__ import annotations

import pytest
import torch

import secateur
from secateur.corpus.load import load_text
from secateur.verbs.export import export
from tests.models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A Llama of 64 channels that was trained on the built-in text for some seconds, half of its weights removed."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = tiny_tokenizer()
    text = load_text("builtin", "calibration").text.encode("ascii", "ignore").decode()
    ids = torch.tensor(tokenizer(text[:200_000])["input_ids"])
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3 if parameter.ndim > 1 else 1.0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        starts = torch.randint(len(ids) - 65, (16,), generator=generator)
        batch = ids[starts[:, None] + torch.arange(64)]
        model(batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    given = {"samples": 32, "sequence_length": 64, "device": "cpu", "verify": False, "evaluate": False}
    secateur.prune(folder / "dense", folder / "pruned", method="sparsegpt", sparsity=0.5, **given)
    return folder / "pruned"


def perplexity(folder):
    return secateur.evaluate(folder, sequence_length=128, samples=24, device="cpu").perplexity


def test_eight_bits_cost_one_in_a_hundred_at_most_and_four_bits_five(pruned, tmp_path):
    whole = perplexity(pruned)
    assert whole < 20  # of 128 characters: it has learnt something
    export(pruned, tmp_path / "16", format="sparse", verify=False)
    assert perplexity(tmp_path / "16") == pytest.approx(whole, rel=1e-5)
    for bits, most in ((8, 0.01), (4, 0.05)):
        export(pruned, tmp_path / str(bits), format="sparse", bits=bits, verify=False)
        assert abs(perplexity(tmp_path / str(bits)) / whole - 1) <= most
