"""Blocks like Llama's through two calls a token: the same outputs as step by step, and only where it is safe."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from secateur.runtime import blocks, kernels
from secateur.runtime.blocks import FastBlock
from secateur.verbs.export import export
from tests.models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(
    not hasattr(kernels.find().module, "Block"), reason="secateur-kernels is not installed, or older: make kernels"
)
IDS = torch.randint(3, 120, (1, 24), generator=torch.Generator().manual_seed(0))
WIDER = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def packed(folder, family, bits=8, dtype=torch.float32, fours=False, **changes):
    model = tiny_model(family, **changes).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "layers" in name:
                drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2))
                if fours:
                    drawn = drawn.view(-1, 4).argsort(-1).argsort(-1).view(weight.shape) / 4
                weight[drawn < 0.5] = 0
            if "norm" in name or "bias" in name:
                weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    model.save_pretrained(folder / "m")
    tiny_tokenizer().save_pretrained(folder / "m")
    export(folder / "m", folder / "out", format="sparse", bits=bits, force=True, verify=False)
    return type(model).from_pretrained(folder / "out", dtype="auto").eval()


def packed_blocks(*given, **changes):
    """A model whose single tokens go block by block."""
    model = packed(*given, **changes)
    vars(model).pop("forward", None)
    return model


def fast_blocks(model):
    return [part.forward for part in model.modules() if isinstance(vars(part).get("forward"), FastBlock)]


def slow(model):
    """A copy that goes step by step."""
    other = copy.deepcopy(model)
    for part in other.modules():
        if isinstance(vars(part).get("forward"), FastBlock):
            del part.forward
    return other


@pytest.fixture
def counted(monkeypatch):
    """How often a block went the fast way."""
    calls = []
    real = FastBlock._one_token
    monkeypatch.setattr(FastBlock, "_one_token", lambda self, *given: calls.append(self) or real(self, *given))
    return calls


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return packed_blocks(tmp_path_factory.mktemp("llama"), "llama", **WIDER)


def decoded(model, prompt=4, **options):
    """Logits of every token after the prompt, each with the true one before it."""
    with torch.inference_mode():
        result = model(IDS[:, :prompt], use_cache=True, **options)
        found = [result.logits[:, -1]]
        for place in range(prompt, IDS.shape[1]):
            result = model(IDS[:, place : place + 1], past_key_values=result.past_key_values, use_cache=True, **options)
            found.append(result.logits[:, -1])
    return torch.cat(found)


def near(ours, theirs, share):
    return (ours - theirs).abs().max() <= share * theirs.abs().max()


@pytest.mark.parametrize(
    ("family", "bits", "dtype", "share"),
    [
        ("llama", 8, torch.float32, 0.01), ("llama", 16, torch.bfloat16, 0.03), ("llama", 4, torch.float16, 0.02),
        ("mistral", 8, torch.float32, 0.01), ("qwen2", 8, torch.bfloat16, 0.04), ("smollm3", 8, torch.float32, 0.01),
    ],
)  # fmt: skip
def test_logits_are_those_of_the_model_step_by_step(family, bits, dtype, share, tmp_path, counted):
    model = packed_blocks(tmp_path, family, bits, dtype)
    assert len(fast_blocks(model)) == 2
    counted.clear()
    ours = decoded(model)
    assert len(counted) == 2 * 20
    assert near(ours, decoded(slow(model)), share)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3", "gpt2", "bert", "mixtral"])
def test_other_blocks_stay_as_they_are(family, tmp_path):
    assert not fast_blocks(packed_blocks(tmp_path, family))


def test_blocks_that_compute_something_else_are_found_out(llama, monkeypatch):
    plain = slow(llama)
    plain.model.layers[0].mlp.act_fn = torch.nn.GELU()
    own = type(plain.model.layers[1].input_layernorm).forward
    monkeypatch.setattr(
        plain.model.layers[1].input_layernorm, "forward", lambda x: own(plain.model.layers[1].input_layernorm, x) * 1.1
    )
    assert blocks.speed_up(plain) == 0
    assert blocks.speed_up(slow(llama)) == 2


@pytest.mark.parametrize("other", ["forward of its own", "activation", "scaling"])
def test_of_blocks_that_are_built_alike_one_is_compared(llama, monkeypatch, other):
    compared = []
    real = blocks._agree
    monkeypatch.setattr(blocks, "_agree", lambda *given: compared.append(given[0]) or real(*given))
    plain = slow(llama)
    assert blocks.speed_up(plain) == 2
    assert len(compared) == 1
    compared.clear()
    plain = slow(llama)
    last = plain.model.layers[1]
    if other == "forward of its own":
        own = type(last.input_layernorm).forward
        last.input_layernorm.forward = lambda x: own(last.input_layernorm, x) * 1.1
    elif other == "activation":
        last.mlp.act_fn = torch.nn.GELU()
    else:
        last.self_attn.scaling *= 1.1  # the calls take it as it is
    assert blocks.speed_up(plain) == (2 if other == "scaling" else 1)
    assert len(compared) == 2


def test_generation_and_caches(llama, counted):
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    wanted = slow(llama).generate(IDS, **asked)
    counted.clear()
    assert torch.equal(llama.generate(IDS, **asked), wanted)
    assert len(counted) == 2 * 7
    assert torch.equal(llama.generate(IDS, cache_implementation="static", disable_compile=True, **asked), wanted)
    assert len(counted) == 4 * 7


def test_batches_padding_and_attentions_go_step_by_step_or_come_out_the_same(llama, counted):
    asked = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    both = IDS.repeat(2, 1)
    mask = torch.ones_like(IDS)
    mask[:, :6] = 0
    model, plain = copy.deepcopy(llama), slow(llama)
    assert torch.equal(
        model.generate(IDS, attention_mask=mask, **asked), plain.generate(IDS, attention_mask=mask, **asked)
    )
    assert counted
    counted.clear()
    assert torch.equal(model.generate(both, **asked), plain.generate(both, **asked))
    assert not counted
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        found = model(IDS[:, :1], output_attentions=True)
    assert found.attentions[0] is not None
    assert not counted


def test_gradients_hooks_and_replaced_parts_go_step_by_step(llama, counted):
    model = copy.deepcopy(llama)
    model(IDS[:, :1])
    assert not counted
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 96)
    with torch.inference_mode():
        model(IDS[:, :1])
    assert seen
    assert not counted


def test_a_copy_and_other_number_formats_compute_with_their_own_tensors(llama, counted):
    with torch.inference_mode():
        before = llama(IDS[:, :1]).logits
        other = copy.deepcopy(llama)
        assert all(one.block in list(other.modules()) for one in fast_blocks(other))
        for norm in (other.model.layers[0].input_layernorm, other.model.layers[1].input_layernorm):
            norm.weight.mul_(1.5)
        changed = other(IDS[:, :1]).logits
        assert near(changed, slow(other)(IDS[:, :1]).logits, 0.01)
        assert not torch.equal(changed, before)
        assert torch.equal(llama(IDS[:, :1]).logits, before)
        counted.clear()
        half = other.to(torch.bfloat16)
        assert near(half(IDS[:, :1]).logits.float(), slow(half)(IDS[:, :1]).logits.float(), 0.04)
        assert len(counted) == 2


def test_what_is_traced_is_the_model_itself(llama):
    with torch.no_grad():
        traced = torch.export.export(llama, (), {"input_ids": IDS[:, :1], "use_cache": False}, strict=False)
        assert "secateur.packed_linear" in traced.graph_module.code
        assert near(traced.module()(input_ids=IDS[:, :1], use_cache=False).logits, llama(IDS[:, :1]).logits, 0.01)


def test_saved_again_it_is_the_same(llama, tmp_path):
    llama.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto").eval()
    vars(again).pop("forward", None)
    assert len(fast_blocks(again)) == 2
    assert torch.equal(decoded(again), decoded(llama))
