"""Choose LoRAs by a few examples, compose them, add an expert, prune, and compress the result for upload.

python examples/09_larger_and_smaller.py
"""

import copy
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import moe_peft
from moe_peft import tools

# Counting in 40 numbers: the step, and the token that names the task.
TASKS = {"by 1": (1, 40), "by 3": (3, 41), "by 7": (7, 42)}


def batch_of(names: list[str], seed: int) -> dict[str, torch.Tensor]:
    """32 rows of [name, x, x + step, x + 2 step, ...] modulo 40, with a loss from the third token on."""
    generator = torch.Generator().manual_seed(seed)
    step, name = torch.tensor([TASKS[names[row % len(names)]] for row in range(32)]).T[:, :, None]
    start = torch.randint(40, (32, 1), generator=generator)
    input_ids = torch.cat([name, (start + step * torch.arange(8)) % 40], dim=1)
    return {"input_ids": input_ids, "labels": input_ids.where(torch.arange(9) > 1, -100)}


def train(model: torch.nn.Module, names: list[str], steps: int, lr: float) -> None:
    """Plain AdamW on what requires a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        model(**batch_of(names, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss(model: torch.nn.Module, names: list[str]) -> str:
    """On rows that no training has seen."""
    return f"{model.eval()(**batch_of(names, 10**6)).loss:.3f}"


set_seed(0)
sizes = {"vocab_size": 44, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=None, bos_token_id=None))
folder, loras = Path(tempfile.mkdtemp()), {}
for name in TASKS:
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    train(model, [name], steps=60, lr=1e-2)
    loras[name] = str(folder / name)
    model.save_pretrained(loras[name])

task = ["by 1", "by 7"]
chosen = tools.choose_loras(base, loras, [batch_of(task, 7)], k=2)
print(f"chosen for {task}: {chosen}")
model = tools.compose(copy.deepcopy(base), chosen.adapters, moe_peft.RoutedConfig(router="dense"))
tools.add_expert(model, "three", lora=loras["by 3"])
start = tools.router_norms(model, "three")
train(model, [*TASKS], steps=40, lr=5e-3)
print(f"three experts, trained on all tasks: {loss(model, [*TASKS])}")

own = {"by": "router_change", "initial_norms": start, "adapter_name": "three"}
smaller = tools.prune_experts(model, "two", 2, [batch_of([*TASKS], 8)], **own)
print(f"two of the three: {smaller.difference}")
model.save_pretrained(folder, selected_adapters=["three", "two"])
smaller.write_card(folder / "two")

print(tools.compress_adapter(folder / "three", folder / "small", density=0.3, alpha=None))
tools.decompress_adapter(folder / "small", folder / "again")
again = PeftModel.from_pretrained(copy.deepcopy(base), folder / "again")
print(f"after the way: {loss(again, [*TASKS])}")
before, after = (load_file(folder / name / "adapter_model.safetensors") for name in ("three", "again"))
same = all(torch.equal(own, after[key]) for key, own in before.items() if ".routed_router." in key)
print(f"routers as they were: {same}")
