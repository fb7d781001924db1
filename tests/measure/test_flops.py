"""Operations of one token, against closed forms."""

from __future__ import annotations

import pytest
import transformers

from secateur.engine.blocks import find_structure
from secateur.engine.skeleton import skeleton_of
from secateur.errors import UnsupportedModelError
from secateur.measure.flops import count_flops
from tests.models import FAMILIES, MIXTURES

CONTEXT = 16


def skeleton(family: str, **changes):
    config_name, class_name, values = {**FAMILIES, **MIXTURES}[family]
    config = getattr(transformers, config_name)(**{**values, **changes})
    config.architectures = [class_name]
    return skeleton_of(config)


@pytest.mark.parametrize("context", [4, 16, 100])
def test_a_decoder_is_its_matrices_its_head_and_its_attention(context):
    model = skeleton("llama")
    config = model.config
    matrices = sum(matrix.size for matrix in find_structure(model).matrices)
    head = config.vocab_size * config.hidden_size
    # Scores and the mean of values, for each of the tokens so far, in every head of every block.
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * 2 * (context + 1)
    assert count_flops(model, context=context).per_token == 2 * (matrices + head + attention)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "falcon", "gemma3", "phi3", "bert", "roberta"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_zeros_spare_their_share_of_the_matrices_and_nothing_else(family, share):
    model = skeleton(family)
    matrices = find_structure(model).matrices
    found = count_flops(model, {matrix.name: share for matrix in matrices}, context=CONTEXT)
    assert found.per_token - found.sparse_per_token == pytest.approx(2 * share * sum(one.size for one in matrices))


def test_each_matrix_counts_by_its_own_zeros():
    model = skeleton("llama")
    some = find_structure(model).matrices[3]
    found = count_flops(model, {some.name: 0.25}, context=CONTEXT)
    assert found.per_token - found.sparse_per_token == pytest.approx(2 * 0.25 * some.size)


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_of_experts_those_count_that_a_token_goes_through(chosen):
    one, more = (
        count_flops(skeleton("mixtral", num_experts_per_tok=count), context=CONTEXT).per_token for count in (1, chosen)
    )
    config = skeleton("mixtral").config
    expert = 3 * config.hidden_size * config.intermediate_size
    assert more - one == 2 * (chosen - 1) * expert * config.num_hidden_layers


def test_a_model_without_a_cache_counts_the_mean_of_a_text():
    model = skeleton("bert")
    once, twice = (count_flops(model, context=length) for length in (CONTEXT, 2 * CONTEXT))
    config = model.config
    # Only the attention grows with the length of the text: scores and means over as many tokens more.
    assert twice.per_token - once.per_token == 2 * config.num_hidden_layers * 2 * config.hidden_size * CONTEXT
    assert "mean of" in once.protocol


def test_the_skeleton_stays_as_it_was():
    model = skeleton("llama")
    before = model.config.to_dict()
    count_flops(model, context=CONTEXT)
    assert model.config.to_dict() == before
    assert any(buffer.device.type == "cpu" for buffer in model.buffers())


@pytest.mark.parametrize("family", ["t5", "vit"])
def test_models_that_take_no_row_of_tokens_are_refused(family):
    with pytest.raises(UnsupportedModelError, match="not defined"):
        count_flops(skeleton(family))
