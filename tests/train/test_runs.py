"""Every file of configs/runs: its script's parser takes every key, and its adapter fits its model at full size."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from pathlib import Path

import common
import dry_run
import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import DeepseekV2Config, GptOssConfig, LlamaConfig, OlmoeConfig, Qwen3Config, Qwen3MoeConfig
from transformers.distributed import DistributedConfig

import moe_peft
from moe_peft import describe
from moe_peft.backbone.without_weights import meta_model
from tests.train.tiny_run import ROOT

RUNS = sorted((ROOT / "configs/runs").glob("*.yaml"))
HUB_RUNS = [path for path in RUNS if path.stem != "quickstart"]
# The sizes that each model's config.json on the Hub gives; no network is needed to build it on the meta device.
MODELS = {
    "Qwen/Qwen3-1.7B": Qwen3Config(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-4B": Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-8B": Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    ),
    "openai/gpt-oss-20b": GptOssConfig(
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_local_experts=32,
        num_experts_per_tok=4,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=201088,
    ),
    "Qwen/Qwen3-30B-A3B": Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        vocab_size=151936,
    ),
    "allenai/OLMoE-1B-7B-0924-Instruct": OlmoeConfig(
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        vocab_size=50304,
    ),
    "deepseek-ai/DeepSeek-V2-Lite-Chat": DeepseekV2Config(
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        first_k_dense_replace=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        head_dim=64,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        norm_topk_prob=False,
        vocab_size=102400,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}
# Adapted layers and trainable parameters, by hand: N r (in + out) for the experts and N in for the router of a layer.
SIZES = {
    # gate and up 4096 -> 12288, down 12288 -> 4096
    "qwen3_8b_4bit_loramoe": (3 * 36, 36 * (3 * 6 * 4 * (4096 + 12288) + 6 * (2 * 4096 + 12288))),
    # q, o 4096 -> 4096, k, v 4096 -> 1024, gate 4096 -> 14336, down 14336 -> 4096; no up, as in MoLORA's T5
    "llama31_8b_4bit_dpo_molora": (
        6 * 32,
        32 * 8 * (4 * (2 * 8192 + 2 * 5120 + 2 * 18432) + 5 * 4096 + 14336),
    ),
    # q 2560 -> 4096, k, v 2560 -> 1024, o 4096 -> 2560
    "qwen3_4b_kto_sira": (4 * 36, 36 * 16 * (4 * (2 * 6656 + 2 * 3584) + 3 * 2560 + 4096)),
    # gate and up 2560 -> 9728, down 9728 -> 2560; the score head is 2560 -> 1
    "qwen3_4b_reward_loramoe": (3 * 36, 36 * 6 * (3 * 4 * (2560 + 9728) + 2 * 2560 + 9728)),
    # gate and up 2048 -> 6144, down 6144 -> 2048
    "qwen3_1b7_grpo_routed": (3 * 28, 28 * 8 * (3 * 4 * (2048 + 6144) + 2 * 2048 + 6144)),
    "qwen3_1b7_rloo_routed": (3 * 28, 28 * 8 * (3 * 4 * (2048 + 6144) + 2 * 2048 + 6144)),
    # q 2048 -> 4096, k, v 2048 -> 512, o 4096 -> 2048
    "qwen3_30b_a3b_sira": (4 * 48, 48 * 16 * (4 * (2 * 6144 + 2 * 2560) + 3 * 2048 + 4096)),
    # one block a layer: N 2 D r for the adapters and N D for the router
    "olmoe_1b_7b_perft_r": (16, 16 * (8 * 2 * 2048 * 16 + 8 * 2048)),
    "deepseek_v2_lite_perft_s": (26, 26 * 2 * 2048 * 16),
    # one adapter an expert
    "qwen3_30b_a3b_4bit_perft_e": (48, 48 * 128 * 2 * 2048 * 4),
    "qwen3_30b_a3b_ep_perft_e": (48, 48 * 128 * 2 * 2048 * 4),
    "qwen3_30b_a3b_ep_fsdp_perft_r": (48, 48 * (8 * 2 * 2048 * 16 + 8 * 2048)),
    # the selection of `selection_file`: three matrices of D x I an expert, or two of D x r
    "olmoe_1b_7b_esft": (16, 5 * 16 * 3 * 2048 * 1024),
    "deepseek_v2_lite_esft": (26, 5 * 26 * 3 * 2048 * 1408),
    "qwen3_30b_a3b_4bit_esft_lora": (48, 5 * 48 * 2 * 2048 * 16),
    # every expert of every layer: r (D + 2 I) for gate and up, r (I + D) for down
    "olmoe_1b_7b_expert_lora": (16, 16 * 64 * 16 * (2048 + 2 * 1024 + 1024 + 2048)),
    "qwen3_30b_a3b_4bit_expert_lora": (48, 48 * 128 * 16 * (2048 + 2 * 768 + 768 + 2048)),
    "gpt_oss_20b_expert_lora": (24, 24 * 32 * 16 * (2880 + 2 * 2880 + 2880 + 2880)),
    # keys and values of every layer: a vector of the output's width, and a router of one head's, 128
    "olmoe_1b_7b_mov": (2 * 16, 2 * 16 * 10 * (2048 + 128)),
    "qwen3_30b_a3b_4bit_mov": (2 * 48, 2 * 48 * 10 * (512 + 128)),
    # keys without rotary part and values, 16 heads of 128 + 128 in one matrix; intermediates of the dense layer's FFN
    # and of two shared experts; a router as wide as each
    "deepseek_v2_lite_mov": (27 + 27, 2 * 10 * (27 * 4096 + 10944 + 26 * 2816)),
}
SCORE_HEAD = {"qwen3_4b_reward_loramoe": 2560}


def commands(path: Path) -> list[str]:
    """The commands in the comment that a file begins with, one line each."""
    comment = "\n".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    lines = comment.replace("\\\n", "").splitlines()
    found = [line[line.index("accelerate launch") :] for line in lines if "accelerate launch" in line]
    return [re.sub(" +", " ", line) for line in found]


def command(path: Path) -> str:
    """The command that trains: the last one, after a selection of experts where there is one."""
    return commands(path)[-1]


def parse(path: Path, *arguments: str):
    """The parsed arguments of a file by the script that its command names, on a CPU without bfloat16."""
    module = importlib.import_module(re.search(r"train/(\w+)\.py", command(path))[1])
    on_cpu = ["--config", str(path), "--use_cpu", "true", "--bf16", "false"]
    return module.make_parser().parse_args_and_config([*on_cpu, *arguments])


def selection_file(folder: Path, model_config) -> Path:
    """Five experts of every sparse layer, as train/select_experts.py would write them."""
    first = getattr(model_config, "first_k_dense_replace", 0)
    experts = {str(layer): [0, 3, 5, 21, 63] for layer in range(first, model_config.num_hidden_layers)}
    path = folder / "expert_config.json"
    path.write_text(json.dumps({"experts": experts, "shared_experts": False, "non_expert_modules": False}))
    return path


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_begins_with_its_command_and_every_key_takes_effect(path):
    assert command(path).endswith(f"--config configs/runs/{path.name}")
    script, training, model, dataset, moe = parse(path)
    parsed = {}
    for part in (script, training, model, dataset, moe):
        parsed |= {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    for key, value in yaml.safe_load(path.read_text()).items():
        if key not in ("bf16", "use_cpu", "report_to", "dataset_name"):
            assert str(getattr(parsed[key], "value", parsed[key])) == str(value), key
    common.refuse_plain_lora(model)
    for quantize in (False, True):
        quantization = common.model_init_kwargs(model, training, quantize).get("quantization_config")
        assert (quantization is not None) == model.load_in_4bit
        if quantization is None:
            continue
        assert isinstance(quantization, moe_peft.MoeBitsAndBytesConfig) == quantize
        assert quantization.bnb_4bit_quant_type == "nf4" and quantization.bnb_4bit_use_double_quant


def test_every_script_has_a_run_and_every_run_of_the_hub_a_size():
    scripts = {re.search(r"train/(\w+)\.py", command(path))[1] for path in RUNS}
    assert scripts == {"sft", "dpo", "grpo", "rloo", "reward", "kto"}
    assert {path.stem for path in HUB_RUNS} == set(SIZES)


@pytest.mark.parametrize("path", HUB_RUNS, ids=lambda path: path.stem)
def test_the_adapter_of_a_run_fits_its_model_at_full_size(path, tmp_path):
    *_, model_args, _, moe = parse(path)
    if moe.moe_method == "esft":
        moe.moe_experts = str(selection_file(tmp_path, MODELS[model_args.model_name_or_path]))
    task_type = "SEQ_CLS" if "train/reward.py" in command(path) else "CAUSAL_LM"
    config = common.moe_config(moe, task_type)
    model = meta_model(MODELS[model_args.model_name_or_path], task_type)
    description = describe(model, config)
    assert (len(description.places), description.num_parameters) == SIZES[path.stem]
    with torch.device("meta"):
        adapted = get_peft_model(model, config)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trainable == description.num_parameters + SCORE_HEAD.get(path.stem, 0)
    assert all(p.is_meta for p in adapted.parameters())


def test_runs_on_a_mixture_of_experts_backbone_switch_its_own_balance_loss_off():
    sparse = [path for path in HUB_RUNS if "30b_a3b" in path.stem or "olmoe" in path.stem or "v2_lite" in path.stem]
    assert len(sparse) == 14
    assert {yaml.safe_load(path.read_text())["router_aux_loss_coef"] for path in sparse} == {0.0}


@pytest.mark.parametrize("path", [path for path in HUB_RUNS if "_ep_" in path.stem], ids=lambda path: path.stem)
def test_a_run_that_splits_its_model_is_one_that_transformers_and_its_launcher_take(path):
    _, training, model_args, *_ = parse(path)
    given = common.model_init_kwargs(model_args, training)["distributed_config"]
    split, model = DistributedConfig.from_dict(given), MODELS[model_args.model_name_or_path]
    processes = int(re.search(r"--num_processes (\d+)", command(path))[1])
    assert split.tp_size * split.fsdp_size == processes and "configs/accelerate/ddp.yaml" in command(path)
    assert model.num_experts % split.ep_size == 0 and model.num_key_value_heads % split.tp_size == 0
    # transformers' trainer refuses to save the optimizer's state of such a model.
    assert training.save_only_model


def test_a_run_on_selected_experts_reads_what_its_first_command_writes():
    selecting = [path for path in HUB_RUNS if "esft" in path.stem]
    assert len(selecting) == 3
    for path in selecting:
        select, run = commands(path)[0], yaml.safe_load(path.read_text())
        folder = re.search(r"--output_dir (\S+)", select)[1]
        assert run["moe_experts"] == f"{folder}/expert_config.json"
        assert f"--model_name_or_path {run['model_name_or_path']} " in select
        assert (ROOT / re.search(r"train/\w+\.py", select)[0]).is_file()


@pytest.mark.parametrize(
    "path", [path for path in HUB_RUNS if "30b_a3b_4bit" in path.stem], ids=lambda path: path.stem
)
def test_a_run_in_four_bits_says_what_its_experts_weigh(path, capsys):
    *_, model_args, _, moe = parse(path)
    model = meta_model(MODELS[model_args.model_name_or_path], "CAUSAL_LM")
    assert moe.moe_quantize_experts and dry_run.can_quantize_experts(model_args, model)
    dry_run.print_expert_bytes(model, model_args)
    # Two bytes a weight; half a byte, a byte for 64 of them, and four bytes for 64 x 256.
    weights = 48 * 128 * 3 * 2048 * 768
    assert capsys.readouterr().out == "Fused experts: 57,982.1 MB in bfloat16, 14,955.6 MB in 4 bits\n"
    assert (2 * weights, weights // 2 + weights // 64 + weights // 4096) == (57_982_058_496, 14_955_577_344)
    assert dry_run.expert_sizes(model, torch.bfloat16, True) == (
        2 * weights,
        weights // 2 + weights // 64 + weights // 4096,
    )
