"""Two LoRAs of stock peft become one routed adapter, which is trained, distilled and exported; one LoRA four experts.

python examples/08_compose_and_export.py
"""

import copy
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import moe_peft
from moe_peft import tools

# Counting in the letters (tokens 0 to 19) or the numbers (20 to 39): first token, step, token that names the task.
OLD = {"letters up": (0, 1, 40), "numbers up": (20, 1, 41)}
NEW = {"letters by 3": (0, 3, 42), "numbers by 7": (20, 7, 43)}


def batch_of(tasks: dict, seed: int) -> dict[str, torch.Tensor]:
    """32 rows of [name, x, x + step, x + 2 step, ...] modulo 20, with a loss from the third token on."""
    generator = torch.Generator().manual_seed(seed)
    task = torch.tensor(list(tasks.values()))[torch.randint(len(tasks), (32,), generator=generator)]
    first, step, name = task.T[:, :, None]
    start = torch.randint(20, (32, 1), generator=generator)
    input_ids = torch.cat([name, first + (start + step * torch.arange(9)) % 20], dim=1)
    return {"input_ids": input_ids, "labels": input_ids.where(torch.arange(10) > 1, -100)}


def train(model: torch.nn.Module, tasks: dict, steps: int, lr: float) -> None:
    """Plain AdamW on what requires a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        model(**batch_of(tasks, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def losses(model: torch.nn.Module) -> str:
    """Loss on new rows of both new tasks."""
    return ", ".join(f"{name} {model.eval()(**batch_of({name: NEW[name]}, 10**6)).loss:.3f}" for name in NEW)


set_seed(0)
sizes = {"vocab_size": 48, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=None, bos_token_id=None))
train(base, OLD, steps=150, lr=3e-3)
folder, loras = Path(tempfile.mkdtemp()), {}
base.save_pretrained(folder / "base")
print(f"base: {losses(base)}")
for name, rank in zip(NEW, (4, 6), strict=True):
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    train(model, {name: NEW[name]}, steps=100, lr=5e-3)
    loras[name] = str(folder / name)
    model.save_pretrained(loras[name])
    print(f"LoRA of {name}: {losses(model)}")

both = tools.compose(copy.deepcopy(base), loras, moe_peft.RoutedConfig(router="dense"), trained="router")
train(both, NEW, steps=60, lr=1e-2)
print(f"both, router trained: {losses(both)}")
texts, settings = [batch_of(NEW, seed) for seed in range(4)], {"rank": 8, "steps": 100, "learning_rate": 3e-3}
own = {**settings, "fresh_base": lambda: copy.deepcopy(base), "held_out": [batch_of(NEW, 10**6)]}
print(f"distilled, {tools.distil_to_lora(both, folder / 'lora', texts, **own)}")

four = tools.upcycle(copy.deepcopy(base), loras["letters by 3"], num_experts=4, rho=0.5)
train(four, NEW, steps=100, lr=5e-3)
print(f"upcycled and trained: {losses(four)}")
print(f"two of four experts: {tools.prune_experts(four, 'two', 2, [batch_of(NEW, 5)], merge=True).difference}")

tools.upcycle(copy.deepcopy(base), loras["letters by 3"], num_experts=1).save_pretrained(folder / "one")
tools.export_merged(tools.load_without_base(folder / "one", folder / "base"), folder / "base", folder / "merged")
merged = LlamaForCausalLM.from_pretrained(folder / "merged")
stock = PeftModel.from_pretrained(base, loras["letters by 3"])
with torch.no_grad():
    error = (merged.eval()(**batch_of(NEW, 7)).logits - stock.eval()(**batch_of(NEW, 7)).logits).abs().max()
print(f"the merged checkpoint differs from its LoRA by {error:.1e}: exact: {bool(error < 1e-4)}")
