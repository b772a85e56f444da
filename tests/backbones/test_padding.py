"""Padding counts in no router loss: every place of a padded batch has the tokens of its rows, on every text model.

A place whose mask is not known is refused. The rows alone, without padding, say what is right.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, Conv1D
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_peft import MoePeftWarning, RoutedConfig, router_loss
from moe_peft.telemetry.functions import record

LENGTHS, WIDTH = (7, 4, 6), 9
# The same sizes under all the names that types have for them; a type is given the names it knows.
SIZES: dict[str, object] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner", "hidden_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "state_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    "num_key_value_heads": 2,
    "moe_intermediate_size": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "attention_window": 4,
    "block_size": 2,
}
NAMES = """
    bert gpt2 t5 xlnet longformer llama
    albert apertus arcee bart big_bird bigbird_pegasus biogpt bitnet blenderbot bloom camembert cohere cohere2
    convbert ctrl deberta deberta-v2 diffllama distilbert doge dpr electra ernie ernie4_5 esm eurobert exaone4
    falcon falcon_mamba flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe gpt_bigcode gpt_neox
    gpt_neox_japanese gpt_oss granite granitemoe granitemoeshared helium hunyuan_v1_dense ibert imagegpt
    internlm3 led lfm2 longt5 m2m_100 mamba marian mbart megatron-bert minimax ministral mistral mixtral
    mobilebert modernbert modernbert-decoder mpnet mpt mra mt5 mvp nemotron nllb-moe nomic_bert nystromformer
    olmo olmo2 olmo3 olmoe openai-gpt opt pegasus pegasus_x persimmon phi phi3 plbart prophetnet
    qwen2 qwen3 qwen3_moe rembert roberta roberta-prelayernorm roformer rwkv seed_oss smollm3
    splinter squeezebert stablelm starcoder2 switch_transformers tapas umt5 vaultgemma visual_bert xglm
    xlm-roberta xlm-roberta-xl yoso
"""
TYPES = NAMES.split()
IN_EVERY_RUN = TYPES[:6]


def tiny(model_type: str) -> nn.Module:
    """A model of a type with the sizes above, without dropout."""
    cls = CONFIG_MAPPING[model_type]
    known = {*inspect.signature(cls.__init__).parameters, *(defaults := cls().to_dict())}
    fields = {name: value for name, value in SIZES.items() if name in known}
    quiet = {name: 0.0 for name, value in defaults.items() if "drop" in name and isinstance(value, float)}
    kinds = defaults.get("layer_types")
    config = AutoConfig.for_model(
        model_type, **fields, **quiet, **({"layer_types": kinds[:2]} if isinstance(kinds, list) else {})
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def adapted(base: nn.Module) -> nn.Module:
    """Adapters at all linear layers that are called."""
    read = ("dt_proj", "out_proj", "x_proj", "embed_proj") if "mamba" in base.config.model_type else ()
    names = [name for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    targets = [name for name in names if not name.endswith((*read, "router.classifier", "mlp.gate"))]
    fields = {"num_experts": 2, "r": 2, "lora_dropout": 0.0, "router_aux_loss_coef": 0.5}
    return get_peft_model(base, RoutedConfig(target_modules=targets, **fields)).train()


def counts(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """Place -> tokens that count there."""
    with record(model) as routings:
        model(**batch)
    return {
        place: sum(len(made.probs) if made.valid is None else int(made.valid.sum()) for made in own)
        for place, own in routings.items()
    }


def batch_of(lengths: tuple[int, ...], width: int, *, left: bool, seq_to_seq: bool) -> dict[str, torch.Tensor]:
    positions = torch.arange(width)
    mask = torch.stack([positions >= width - n if left else positions < n for n in lengths]).long()
    ids = (3 + (7 * positions + 5 * torch.arange(len(lengths))[:, None]) % 50) * mask
    batch = {"input_ids": ids, "attention_mask": mask}
    return {**batch, **({f"decoder_{name}": value for name, value in batch.items()} if seq_to_seq else {})}


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=[] if name in IN_EVERY_RUN else pytest.mark.slow)
        for name in TYPES
        if name in CONFIG_MAPPING
    ],
)
def test_the_places_of_a_padded_batch_have_the_tokens_of_its_rows(model_type):
    model = adapted(tiny(model_type))
    seq_to_seq = model.config.is_encoder_decoder
    alone = [counts(model, batch_of((n,), n, left=False, seq_to_seq=seq_to_seq)) for n in LENGTHS]
    for left in (False, True):
        found = counts(model, batch_of(LENGTHS, WIDTH, left=left, seq_to_seq=seq_to_seq))
        assert found
        for place, number in found.items():
            # Which tokens reach an expert that is a module of its own is not known, and the package says so.
            if ".experts." not in place:
                assert number == sum(own.get(place, 0) for own in alone), place


def test_experts_that_are_modules_of_their_own_warn_once_that_their_padding_counts():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_experts": 4, "vocab_size": 64}
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0}
    sparse = {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "decoder_layerdrop": 0.0, "moe_token_dropout": 0.0}
    torch.manual_seed(0)
    base = AutoModel.from_config(AutoConfig.for_model("nllb-moe", **sizes, **heads, **quiet, **sparse))
    fields = {"num_experts": 2, "r": 2, "lora_dropout": 0.0, "router_aux_loss_coef": 0.5}
    model = get_peft_model(base, RoutedConfig(target_modules=r".*encoder\..*\.experts\..*fc1", **fields)).train()
    batch = batch_of(LENGTHS, WIDTH, left=False, seq_to_seq=True)
    with pytest.warns(
        MoePeftWarning, match=r"experts\.expert_\d\.fc1' reads some tokens of the batch alone"
    ) as warned:
        assert counts(model, batch)
        assert counts(model, batch)
    assert len([one for one in warned if issubclass(one.category, MoePeftWarning)]) == 1
    assert torch.isfinite(router_loss(model))
