"""The engine on this machine: what a rank builds, and that padding never enters the loss."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from torch.nn.functional import cross_entropy

from megatron_adapt.config import Layout
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.parallel import start_engine
from megatron_adapt.engine.trainable import TRAINABLE, freeze_rest
from megatron_adapt.errors import EngineError
from megatron_adapt.shape import LlamaShape
from tests.helpers.spawn import run_ranks

SHAPE = LlamaShape(
    num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=8,
    vocab_size=90, max_position_embeddings=64, layernorm_epsilon=1e-5, rotary_base=1e4, rope_scaling=None, tied=False,
)  # fmt: skip
PADDED = 128


def build(layout=Layout(), bf16=False):  # noqa: B008
    model = build_model(SHAPE, padded_vocab_size=PADDED, layout=layout, seq_length=16, bf16=bf16)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def make_batch():
    ids_BT = torch.randint(0, SHAPE.vocab_size, (2, 17), generator=torch.Generator().manual_seed(5))
    return ids_BT[:, :-1], torch.arange(16).expand(2, 16), ids_BT[:, 1:].contiguous()


def test_padding_logits_never_enter_the_loss():
    with start_engine(Layout(), seed=1):
        model = build()
        inputs_BT, positions_BT, labels_BT = make_batch()
        # Rows of padding that would win every softmax if they took part.
        model.output_layer.weight.data[SHAPE.vocab_size :] = 50.0
        logits_BTV = model(inputs_BT, positions_BT, None)
        loss_BT = model(inputs_BT, positions_BT, None, labels=labels_BT)
        expected_BT = cross_entropy(
            logits_BTV[..., : SHAPE.vocab_size].flatten(0, 1), labels_BT.flatten(), reduction="none"
        ).view_as(labels_BT)
        assert torch.allclose(loss_BT, expected_BT, atol=1e-5)
        loss_BT.sum().backward()
        assert model.output_layer.weight.grad[SHAPE.vocab_size :].abs().max() == 0
        assert model.output_layer.weight.grad[: SHAPE.vocab_size].abs().max() > 0


def _losses_of_a_rank():
    with start_engine(Layout(tensor_model_parallel_size=2), seed=1):
        model = build(Layout(tensor_model_parallel_size=2))
        full_VH = torch.randn(PADDED, SHAPE.hidden_size, generator=torch.Generator().manual_seed(9))
        full_VH[SHAPE.vocab_size :] = 50.0
        rank = parallel_state.get_tensor_model_parallel_rank()
        model.output_layer.weight.data.copy_(full_VH.chunk(2)[rank])
        inputs_BT, positions_BT, labels_BT = make_batch()
        loss_BT = model(inputs_BT, positions_BT, None, labels=labels_BT)
        logits_BTV = model(inputs_BT, positions_BT, None)
        return loss_BT.tolist(), logits_BTV.tolist(), labels_BT.tolist()


def test_padding_is_cut_where_it_lies_on_the_last_tensor_parallel_rank():
    (loss_BT, left, labels_BT), (other_loss_BT, right, _) = run_ranks(_losses_of_a_rank, 2)
    logits_BTV = torch.cat([torch.tensor(left), torch.tensor(right)], dim=-1)[..., : SHAPE.vocab_size]
    expected = cross_entropy(logits_BTV.flatten(0, 1), torch.tensor(labels_BT).flatten(), reduction="none")
    assert torch.allclose(torch.tensor(loss_BT).flatten(), expected, atol=1e-5)
    assert loss_BT == other_loss_BT


def test_bf16_model_has_bf16_weights_and_fp32_losses():
    with start_engine(Layout(), seed=1):
        model = build(bf16=True)
        inputs_BT, positions_BT, labels_BT = make_batch()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model(inputs_BT, positions_BT, None, labels=labels_BT).dtype == torch.float32


def test_embeddings_stage_learns_input_and_head_only():
    with start_engine(Layout(), seed=1):
        model = build()
        learning = freeze_rest(model, "embeddings")
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert names == {"embedding.word_embeddings.weight", "output_layer.weight"}
        assert learning == 2 * PADDED * SHAPE.hidden_size
        assert freeze_rest(model, "all") == sum(parameter.numel() for parameter in model.parameters())


def test_every_setting_of_trainable_has_its_rule():
    import typing

    from megatron_adapt.config import StageSettings

    words, _ = typing.get_args(typing.get_type_hints(StageSettings)["trainable"])
    assert set(TRAINABLE) == set(typing.get_args(words))


@pytest.mark.skipif(HAVE_TE, reason="Transformer Engine is installed")
def test_transformer_engine_is_refused_where_it_is_not_installed():
    layout = Layout(transformer_impl="transformer_engine")
    message = r'train\.transformer_impl: "transformer_engine" is not installed here; install .*, or use "local"'
    with start_engine(layout, seed=1), pytest.raises(EngineError, match=message):
        build(layout)
