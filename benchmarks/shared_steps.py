"""Larger steps of a shared block against leaving its repetitions out: loss at the same number of iterations.

A byte-level Llama whose eight blocks are one (hidden size 64), trained on the calibration half of the built-in text, as
usual (step 1), and with small steps (1/8), between which the states change little; then the loss in nats a byte on the
measuring half, with all iterations and with fewer: their steps scaled by 8 / N, or not. Three seeds.

    python benchmarks/shared_steps.py [--steps 400]
"""

from __future__ import annotations

import argparse
import statistics

import _common
import torch
import transformers

from secateur.corpus.builtin import builtin_text
from secateur.layers.replace import replace_layers
from secateur.layers.spec import Sharing, Spec

BLOCKS, LENGTH, BATCH = 8, 64, 8
ITERATIONS = (8, 6, 4, 2)
STEPS = (1.0, 1 / 8)


def model_of(
    iterations: int, step: float, weights: dict[str, torch.Tensor] | None = None
) -> transformers.LlamaForCausalLM:
    """A model whose blocks are one, run so often."""
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=iterations, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    leaves = [name for name, _ in model.model.layers[0].named_parameters()]
    row = "model.layers"
    ties = {f"{row}.{n}.{leaf}": f"{row}.0.{leaf}" for n in range(1, iterations) for leaf in leaves}
    replace_layers(model, Spec("shared", {}, ties, Sharing(row, [0] * iterations, step)))
    if weights is not None:
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model


def windows(part: str) -> torch.Tensor:
    """Bytes of a half of the built-in text, (n, LENGTH)."""
    text = builtin_text(part).encode("ascii", "replace")
    return torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).reshape(-1, LENGTH)


def train(seed: int, steps: int, step: float) -> dict[str, torch.Tensor]:
    """Weights of a model that was trained with steps of this size."""
    torch.manual_seed(seed)
    data, model = windows("calibration"), model_of(BLOCKS, step)
    parameters = list(model.parameters())
    adam = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, total_steps=steps)
    for _ in range(steps):
        ids = data[torch.randint(len(data), (BATCH,))]
        loss = model(ids, labels=ids).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        schedule.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    measured = windows("measure")[:200]
    losses: dict[tuple[float, int, str], list[float]] = {}
    for seed in range(3):
        for trained in STEPS:
            weights = train(seed, steps, trained)
            for count in ITERATIONS:
                for name, step in (("scaled", trained * BLOCKS / count), ("truncated", trained)):
                    with torch.no_grad():
                        loss = float(model_of(count, step, weights).eval()(measured, labels=measured).loss)
                    losses.setdefault((trained, count, name), []).append(loss)
    rows = []
    for trained in STEPS:
        for count in ITERATIONS:
            scaled, truncated = losses[trained, count, "scaled"], losses[trained, count, "truncated"]
            rows.append({
                "step": trained, "iterations": count, "scaled": statistics.mean(scaled),
                "truncated": statistics.mean(truncated),
                "seeds_in_which_scaled_is_better": sum(a < b for a, b in zip(scaled, truncated, strict=True)),
            })  # fmt: skip
    _common.store(
        "shared_steps", f"one block of hidden size 64 run 8 times, {steps} steps of {BATCH} windows of {LENGTH} bytes, "
        "nats a byte on 200 windows of other text, mean of 3 seeds", rows,
        losses={" ".join(map(str, key)): values for key, values in losses.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
