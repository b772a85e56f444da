"""Adapters between file formats: a stock LoRA, tensors of each expert, ESFT's authors' form, and MixLoRA's files.

python examples/10_other_files.py
"""

import copy
import json
import tempfile
from itertools import product
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM, set_seed

import moe_peft
from moe_peft import tools

BATCH = {"input_ids": torch.arange(24).view(2, 12)}


def trained(base: torch.nn.Module, config: moe_peft.RoutedConfig) -> PeftModel:
    """An adapter after one step, for its files to hold something."""
    model = get_peft_model(copy.deepcopy(base), config).train()
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    return model.eval()


@torch.no_grad()
def difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """Largest difference of their scores."""
    return float((one.eval()(**BATCH).logits - other.eval()(**BATCH).logits).abs().max())


set_seed(0)
sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
sizes |= {"num_attention_heads": 4, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
dense = LlamaForCausalLM(LlamaConfig(**sizes))
sparse = OlmoeForCausalLM(OlmoeConfig(**sizes, num_experts=8, num_experts_per_tok=2))
folder, errors = Path(tempfile.mkdtemp()), {}

one = trained(dense, moe_peft.MoloraConfig(num_experts=1, r=4))
tools.export_lora(one, folder / "lora")
errors["a stock LoRA"] = difference(PeftModel.from_pretrained(copy.deepcopy(dense), folder / "lora"), one)

pairs = trained(sparse, moe_peft.ExpertLoraConfig(r=4))
tools.export_expert_lora(pairs, str(folder / "stock"))
errors["LoRA on experts"] = difference(tools.import_expert_lora(copy.deepcopy(sparse), str(folder / "stock")), pairs)
tools.export_per_expert(pairs, str(folder / "serving"))

tasks = {"first": BATCH["input_ids"][:1], "second": BATCH["input_ids"][1:]}
scores = {name: moe_peft.score_experts(sparse, [{"input_ids": x}], show_progress=False) for name, x in tasks.items()}
selections = {name: moe_peft.select_experts(own, max_parameters=6 * 3 * 32 * 48) for name, own in scores.items()}
print(moe_peft.overlap_table(selections))
joined = moe_peft.join_selections(selections.values())
changes = difference(one, dense), difference(pairs, sparse)
esft = trained(sparse, moe_peft.EsftConfig(experts=joined.experts))
tools.export_esft(esft, folder / "esft")
errors["ESFT's authors' form"] = difference(tools.import_esft(copy.deepcopy(sparse), folder / "esft"), esft)

# MixLoRA's files: a router for each FFN, and a pair for each matrix of each expert.
tensors = {f"mixlora.layers.{n}.mlp.moe_gate.weight": torch.randn(2, 32) for n in range(2)}
widths = {"gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32)}
for layer, (name, (width, out)), expert in product(range(2), widths.items(), range(2)):
    key = f"mixlora.layers.{layer}.mlp.{name}.experts.{expert}.lora_"
    tensors |= {f"{key}A.weight": torch.randn(4, width) / 8, f"{key}B.weight": torch.randn(out, 4) / 8}
(folder / "mix").mkdir()
save_file(tensors, folder / "mix/adapter_model.safetensors")
settings = {"peft_type": "MIXLORA", "routing_strategy": "mixlora", "num_experts": 2, "top_k": 2}
settings |= {"r": 4, "lora_alpha": 8}
(folder / "mix/adapter_config.json").write_text(json.dumps(settings))
print(tools.import_mixture(copy.deepcopy(dense), folder / "mix").peft_config["default"].summary())
print(f"adapters change scores by {changes[0]:.2f}, {changes[1]:.2f}; files differ by {errors}")
print("all equal:", max(errors.values()) < 1e-5 < min(changes))
