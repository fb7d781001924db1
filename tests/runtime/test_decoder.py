"""Single tokens through all blocks in one call: logits, tokens and caches of the model's own forward, or that."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

from secateur.errors import UsageError
from secateur.runtime import cache as caches
from secateur.runtime import kernels
from secateur.runtime.decoder import FastModel, take_single_tokens
from secateur.runtime.plan import Plan
from tests.models import tiny_tokenizer
from tests.runtime.test_blocks import IDS, WIDER, decoded, near, packed, slow

pytestmark = pytest.mark.skipif(
    not hasattr(kernels.find().module, "Decoder"), reason="secateur-kernels is not installed, or older: make kernels"
)
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def own(model):
    """A copy that goes through the model's own forward, block by block."""
    other = copy.deepcopy(model)
    assert isinstance(vars(other).pop("forward"), FastModel)
    return other


@pytest.fixture
def counted(monkeypatch):
    """Of every single token whether it went the fast way; those of the comparison at the first are not counted."""
    calls = []
    real = FastModel._one_token

    def one_token(self, plan, given, activations=None):
        found = real(self, plan, given, activations)
        if activations is None:
            calls.append(found is not None)
        return found

    monkeypatch.setattr(FastModel, "_one_token", one_token)
    return calls


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("llama"), "llama", **WIDER)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """With a window that is smaller than the text."""
    return packed(tmp_path_factory.mktemp("mistral"), "mistral")


@pytest.mark.parametrize(
    ("family", "bits", "dtype", "share", "changes"),
    [
        ("llama", 16, torch.bfloat16, 0.03, {"attention_bias": True, "num_key_value_heads": 1}),
        ("llama", 4, torch.float16, 0.02, {"num_key_value_heads": 4}),
        ("mistral", 8, torch.bfloat16, 0.04, {}),
        ("qwen2", 8, torch.float32, 0.01, {"tie_word_embeddings": True}),
        ("qwen2", 8, torch.float32, 0.01, {"tie_word_embeddings": False, "fours": True}),
        ("smollm3", 8, torch.float32, 0.01, {"num_hidden_layers": 4}),
    ],
)
def test_logits_are_those_of_the_model_block_by_block_and_step_by_step(
    family, bits, dtype, share, changes, tmp_path, counted
):
    model = packed(tmp_path, family, bits, dtype, **changes)
    ours = decoded(model)
    assert counted == [True] * 20
    plain = own(model)
    assert near(ours, decoded(plain), share)
    assert near(ours, decoded(slow(plain)), share)
    assert len(counted) == 20


def test_a_window_a_plain_head_and_a_plain_embedding(mistral, counted):
    ours, plain = decoded(mistral), own(mistral)
    assert near(ours, decoded(plain), 0.01)
    assert sum(counted) == 20
    other = own(mistral)
    for place in ("model.embed_tokens", "lm_head"):
        packed_one = other.get_submodule(place)
        made = torch.nn.Embedding if "embed" in place else torch.nn.Linear
        dense = made(*reversed(packed_one.weight.shape), **({} if "embed" in place else {"bias": False}))
        dense.weight = torch.nn.Parameter(packed_one.weight)
        if "embed" in place:
            dense.num_embeddings, dense.embedding_dim = packed_one.weight.shape
        other.set_submodule(place, dense)
    assert take_single_tokens(other)
    counted.clear()
    assert near(decoded(other), decoded(plain), 0.01)
    assert counted == [True] * 20


def test_generation_with_a_sample_a_streamer_and_what_stops_it(llama, counted):
    class Heard:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    plain = own(llama)
    for asked in (
        GREEDY,
        {"max_new_tokens": 12, "do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
        {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.5, "output_scores": True,
         "return_dict_in_generate": True},
    ):  # fmt: skip
        found = []
        for model in (llama, plain):
            torch.manual_seed(5)
            heard = Heard()
            made = model.generate(IDS, streamer=heard, **asked)
            tokens = made if isinstance(made, torch.Tensor) else made.sequences
            assert heard.tokens == tokens[0].tolist()
            assert heard.ended
            found.append(tokens)
        assert torch.equal(*found)
        assert counted
        assert all(counted)
        counted.clear()
    greedy = llama.generate(IDS, **GREEDY)[0, IDS.shape[1] :].tolist()
    stopped = llama.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=greedy[2])
    assert stopped[0, IDS.shape[1] :].tolist() == greedy[: greedy.index(greedy[2]) + 1]
    tokenizer = tiny_tokenizer()
    asked = {"max_new_tokens": 8, "do_sample": False, "stop_strings": [tokenizer.decode(greedy[1:2])],
             "tokenizer": tokenizer}  # fmt: skip
    assert torch.equal(llama.generate(IDS, **asked), plain.generate(IDS, **asked))


def test_a_prompt_of_one_token_and_a_cache_that_grows(llama, mistral, counted, monkeypatch):
    monkeypatch.setattr(caches, "LEAST_ROOM", 3)
    monkeypatch.setattr(caches, "MOST_ROOM", 5)
    for model in (llama, mistral):
        counted.clear()
        ours = decoded(model, prompt=1)
        assert counted == [True] * 23
        assert near(ours, decoded(own(model), prompt=1), 0.01)


@pytest.mark.parametrize("which", ["llama", "mistral"])
def test_whatever_is_done_to_a_cache_has_its_old_meaning(which, request, counted):
    """Several tokens at once in between, copies, cropping, and looking at keys and values."""
    model = request.getfixturevalue(which)
    plain, found = own(model), []
    for one in (model, plain):
        past = DynamicCache(config=one.config)
        with torch.inference_mode():
            logits = []
            for first, last in ((0, 4), (4, 5), (5, 6), (6, 20), (20, 21), (21, 22)):
                logits.append(one(IDS[:, first:last], past_key_values=past).logits[:, -1])
            other = copy.deepcopy(past)
            logits += [one(IDS[:, 3:4], past_key_values=cache).logits[:, -1] for cache in (past, other, past)]
            assert past.get_seq_length() == other.get_seq_length() + 1 == 24
            if which == "llama":
                past.crop(-3)
                assert past.get_seq_length() == 21
                logits.append(one(IDS[:, 21:22], past_key_values=past).logits[:, -1])
            past.reorder_cache(torch.tensor([0]))
            logits.append(one(IDS[:, 2:3], past_key_values=past).logits[:, -1])
        found.append((torch.cat(logits), past))
    assert all(counted)
    assert near(found[0][0], found[1][0], 0.01)
    for ours, theirs in zip(found[0][1].layers, found[1][1].layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape
        assert near(ours.keys, theirs.keys, 0.01)
        assert near(ours.values, theirs.values, 0.01)
    found[0][1].reset()
    assert found[0][1].get_seq_length() == 0


def test_threads_change_no_bit(llama):
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                past = llama(IDS[:, :1]).past_key_values
                found.append(torch.cat([llama(IDS[:, [place]], past_key_values=past).logits for place in range(1, 24)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_is_unusual_goes_the_models_own_way(llama, mistral, counted):
    plain, model = own(llama), copy.deepcopy(llama)
    for asked in ({"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}):
        assert torch.equal(model.generate(IDS, **GREEDY, **asked), plain.generate(IDS, **GREEDY, **asked))
    both = IDS.repeat(2, 1)
    assert torch.equal(model.generate(both, **GREEDY), plain.generate(both, **GREEDY))
    assert not any(counted)
    mask = torch.ones_like(IDS)
    mask[:, :6] = 0
    found = [one.generate(IDS, attention_mask=mask, **GREEDY) for one in (model, plain)]
    assert torch.equal(*found)
    assert not any(counted)
    with torch.inference_mode():
        # A window whose cache keeps all places is held back by a mask only.
        past = [DynamicCache(), DynamicCache()]
        for tokens in (IDS[:, :20], IDS[:, 20:21]):
            first, second = (
                one(tokens, past_key_values=cache).logits
                for one, cache in zip((mistral, own(mistral)), past, strict=True)
            )
        assert torch.equal(first, second)
        assert not any(counted)
        past = model(IDS[:, :4]).past_key_values
        model(IDS[:, :1], past_key_values=past, position_ids=torch.tensor([[7]]))
        assert not any(counted)
        assert len(model(IDS[:, :1], past_key_values=past, output_hidden_states=True).hidden_states) == 3
        with pytest.raises(IndexError):
            llama(torch.tensor([[500]]), past_key_values=llama(IDS).past_key_values)
    assert not any(counted)


def test_gradients_hooks_and_replaced_parts_go_the_models_own_way(llama, counted):
    def next_token(model):
        with torch.inference_mode():
            past = model(IDS[:, :4]).past_key_values
            counted.clear()
            model(IDS[:, 4:5], past_key_values=past)
        return counted == [True]

    model = copy.deepcopy(llama)
    assert next_token(model)
    model(IDS[:, 4:5], past_key_values=model(IDS[:, :4]).past_key_values)
    assert counted == [True]  # gradients are on
    seen = []
    hook = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    assert not next_token(model)
    assert len(seen) == 2
    hook.remove()
    assert next_token(model)
    model.model.norm.forward = lambda x: x
    assert not next_token(model)
    del model.model.norm.forward
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 96)  # as an adapter would be put there
    assert not next_token(model)
    half = copy.deepcopy(llama).to(torch.bfloat16)
    assert next_token(half)
    assert near(decoded(half).float(), decoded(own(half)).float(), 0.04)


def test_weights_that_are_changed_in_place_or_exchanged_are_seen(llama):
    model = copy.deepcopy(llama)
    with torch.inference_mode():
        before = decoded(model)
        model.model.norm.weight.mul_(-1.5)
        changed = decoded(model)
        assert not near(changed, before, 0.1)
        assert near(changed, decoded(own(model)), 0.01)
    model.model.norm.weight.data = model.model.norm.weight.data.clone() * 3
    assert near(decoded(model), decoded(own(model)), 0.01)


def test_a_model_that_computes_something_else_is_found_out(llama, counted, monkeypatch):
    model, real = copy.deepcopy(llama), Plan.turns
    monkeypatch.setattr(Plan, "turns", lambda self, first, count: real(self, first + 1, count))
    assert torch.equal(model.generate(IDS, **GREEDY), own(model).generate(IDS, **GREEDY))
    assert not counted


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma3", {}),
        ("qwen3", {}),
        ("gpt2", {}),
        ("bert", {}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    ],
)
def test_other_models_stay_as_they_are(family, changes, tmp_path):
    assert "forward" not in vars(packed(tmp_path, family, **changes))


def test_it_can_be_left_out_and_is_asked_for_by_name(llama, monkeypatch):
    for wanted, taken in (("off", False), ("on", True)):
        monkeypatch.setenv(kernels.DECODER, wanted)
        kernels.decodes.cache_clear()
        assert take_single_tokens(own(llama)) is taken
        assert ("block by block" in kernels.told()) is not taken
    monkeypatch.setenv(kernels.DECODER, "maybe")
    kernels.decodes.cache_clear()
    with pytest.raises(UsageError, match="maybe"):
        take_single_tokens(own(llama))
    monkeypatch.undo()
    kernels.decodes.cache_clear()


def test_its_arguments_are_those_of_the_model_and_it_is_saved_as_ever(llama, tmp_path):
    assert inspect.signature(llama.forward) == inspect.signature(own(llama).forward)
    llama.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert torch.equal(decoded(again), decoded(llama))
