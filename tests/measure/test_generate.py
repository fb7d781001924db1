"""The generate verb."""

from __future__ import annotations

import pytest
import torch

from secateur.errors import UnsupportedModelError, UsageError
from secateur.progress import Recorder
from secateur.verbs.generate import generate
from tests.models import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


def greedy(model, prompt: str, count: int) -> str:
    tokens = [ord(character) for character in prompt]
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == 2:  # end of text
            break
    return tiny_tokenizer().decode(tokens[len(prompt) :], skip_special_tokens=True)


def test_greedy_by_default_and_only_the_new_text(folder):
    expected = greedy(tiny_model("llama"), "abc", 12)
    assert generate(folder, "abc", new_tokens=12, device="cpu") == expected
    assert generate(tiny_model("llama"), "abc", new_tokens=12, tokenizer=tiny_tokenizer()) == expected


def test_drawing_follows_the_seed_and_leaves_the_random_state_alone(folder):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    texts = [generate(folder, "abc", new_tokens=20, temperature=2.0, seed=seed, device="cpu") for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_without_a_drawing_is_told(folder):
    for options, told in (({"seed": 3}, True), ({}, False), ({"seed": 3, "temperature": 1.0}, False)):
        recorder = Recorder()
        generate(folder, "abc", new_tokens=1, device="cpu", reporter=recorder, **options)
        assert any("--seed has no effect" in line for line in recorder.warnings) == told


def test_chat_needs_and_uses_the_template(folder):
    with pytest.raises(UsageError, match="chat template"):
        generate(folder, "abc", chat=True, device="cpu")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    model = tiny_model("llama")
    assert generate(model, "abc", tokenizer=tokenizer, chat=True, new_tokens=6) == greedy(model, "[abc]>", 6)


@pytest.mark.parametrize(
    ("prompt", "arguments"),
    [("", {}), ("abc", {"new_tokens": 0}), ("abc", {"temperature": -1.0}), ("abc", {"temperature": float("nan")})],
)
def test_arguments_that_make_no_sense(folder, prompt, arguments):
    with pytest.raises(UsageError):
        generate(folder, prompt, device="cpu", **arguments)


def test_models_that_do_not_generate_are_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM"):
        generate(save_tiny(tmp_path / "bert", "bert"), "abc", device="cpu")


def test_an_encoder_decoder_answers_with_its_own_text(tmp_path):
    assert isinstance(generate(save_tiny(tmp_path / "t5", "t5"), "abc", new_tokens=5, device="cpu"), str)
