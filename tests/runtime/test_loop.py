"""The loop of our own: the tokens of `generate`, or None."""

from __future__ import annotations

import copy

import pytest
import torch

from secateur.runtime import cache as caches
from secateur.runtime import kernels
from secateur.runtime.decoder import FastModel
from secateur.runtime.loop import continue_tokens
from secateur.verbs import generate as verb
from tests.models import tiny_tokenizer
from tests.runtime.test_blocks import IDS, WIDER, packed

pytestmark = pytest.mark.skipif(
    not hasattr(kernels.find().module, "Decoder"), reason="secateur-kernels is not installed, or older: make kernels"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("llama"), "llama", **WIDER)


def by_generate(model, prompt, count, **asked):
    return model.generate(prompt, max_new_tokens=count, **asked)[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("family", "bits", "dtype"),
    [("llama", 16, torch.bfloat16), ("mistral", 8, torch.float32), ("qwen2", 4, torch.float16)],
)
def test_the_likeliest_tokens_are_those_of_generate(family, bits, dtype, tmp_path, monkeypatch):
    model = packed(tmp_path, family, bits, dtype)
    for prompt in (IDS[:, :7], IDS[:, :1]):
        expected = by_generate(model, prompt, 17, do_sample=False)
        told = []
        assert continue_tokens(model, prompt, new_tokens=17, told=told.append) == expected == told
        monkeypatch.setattr(caches, "MOST_ROOM", 5)  # keys and values move now and then
        assert continue_tokens(model, prompt, new_tokens=17) == expected
        monkeypatch.undo()


def test_drawn_tokens_are_those_of_generate_with_the_same_random_state(llama):
    torch.manual_seed(3)
    expected = by_generate(llama, IDS[:, :5], 20, do_sample=True, temperature=1.7, top_k=0)
    torch.manual_seed(3)
    assert continue_tokens(llama, IDS[:, :5], new_tokens=20, temperature=1.7) == expected


def test_an_end_of_text_ends_it_and_may_be_passed_over(llama):
    model = copy.deepcopy(llama)
    model.generation_config.eos_token_id = None
    whole = continue_tokens(model, IDS[:, :5], new_tokens=12)
    model.generation_config.eos_token_id = [whole[4], whole[7]]
    first = min(whole.index(whole[4]), whole.index(whole[7]))
    assert continue_tokens(model, IDS[:, :5], new_tokens=12) == whole[: first + 1]
    assert continue_tokens(model, IDS[:, :5], new_tokens=12) == by_generate(model, IDS[:, :5], 12, do_sample=False)
    assert continue_tokens(model, IDS[:, :5], new_tokens=12, stop=False) == whole


def test_it_leaves_to_generate_what_has_a_say_in_the_tokens(llama):
    state = torch.get_rng_state()

    def refuses(change, prompt=IDS[:, :5], **options):
        model = copy.deepcopy(llama)
        change(model)
        return continue_tokens(model, prompt, new_tokens=4, **options) is None

    assert not refuses(lambda model: None)
    for name, value in (("repetition_penalty", 1.2), ("min_new_tokens", 3), ("use_cache", False), ("num_beams", 2),
                        ("cache_implementation", "static"), ("forced_eos_token_id", 3)):  # fmt: skip
        assert refuses(lambda model: setattr(model.generation_config, name, value)), name  # noqa: B023 - called at once
    assert refuses(lambda model: setattr(model.generation_config, "top_p", 0.9), temperature=1.0)
    assert not refuses(lambda model: setattr(model.generation_config, "top_p", 0.9))
    assert refuses(lambda model: model.train())
    assert refuses(lambda model: model.model.layers[0].register_forward_hook(lambda *given: None))
    assert refuses(lambda model: vars(model).pop("forward"))
    assert refuses(lambda model: None, prompt=IDS[:, :4].view(2, 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_verb_says_the_same_with_it_and_without(llama, monkeypatch):
    assert isinstance(vars(llama)["forward"], FastModel)
    asked = [{}, {"temperature": 1.5, "seed": 4}]
    found = []
    for _ in range(2):
        for options in asked:
            pieces = []
            text = verb.generate(
                llama, "abc", tokenizer=tiny_tokenizer(), new_tokens=15, stream=pieces.append, **options
            )
            assert "".join(pieces) == text
            found.append(text)
        monkeypatch.setattr(verb, "continue_tokens", lambda *given, **options: None)
    assert found[:2] == found[2:]
