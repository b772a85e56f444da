"""ESFT: pretrain a small mixture of experts, find the experts that a new task uses, and train those alone.

python examples/04_esft.py
"""

import copy

import torch
from peft import get_peft_model
from transformers import OlmoeConfig, OlmoeForCausalLM, set_seed

import moe_peft

# Counting in the letters (tokens 0 to 19) or the numbers (20 to 39): first token, step, token that names the task.
OLD = {"letters up": (0, 1, 40), "letters down": (0, -1, 41), "numbers up": (20, 1, 42), "numbers down": (20, -1, 43)}
NEW = {"numbers by 3": (20, 3, 44)}


def batch_of(tasks: dict, seed: int) -> dict[str, torch.Tensor]:
    """64 rows of [name, x, x + step, x + 2 step, ...] modulo 20, with a loss from the third token on."""
    generator = torch.Generator().manual_seed(seed)
    task = torch.tensor(list(tasks.values()))[torch.randint(len(tasks), (64,), generator=generator)]
    first, step, name = task.T[:, :, None]
    start = torch.randint(20, (64, 1), generator=generator)
    input_ids = torch.cat([name, first + (start + step * torch.arange(11)) % 20], dim=1)
    return {"input_ids": input_ids, "labels": input_ids.where(torch.arange(12) > 1, -100)}


def balance(router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Load balancing layer by layer; pooled over layers, as the model's own, a layer may use a few experts only."""
    probs = torch.stack(router_logits).softmax(-1)
    load = torch.zeros_like(probs).scatter(-1, probs.topk(2).indices, 0.5).mean(1)
    return (probs.shape[-1] * load * probs.mean(1)).sum(-1).mean()


def train(model: torch.nn.Module, tasks: dict, steps: int, lr: float, balance_coef: float = 0.0) -> None:
    """Plain AdamW on what requires a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        output = model(**batch_of(tasks, step), output_router_logits=True)
        (output.loss + balance_coef * balance(output.router_logits)).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def losses(model: torch.nn.Module) -> str:
    """Loss on new rows of every task."""
    tasks = {**OLD, **NEW}
    return ", ".join(f"{n} {model.eval()(**batch_of({n: tasks[n]}, 10**6)).loss:.3f}" for n in tasks)


set_seed(0)
sizes = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 16}
tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
routing = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
base = OlmoeForCausalLM(OlmoeConfig(**sizes, **tokens, **routing, num_attention_heads=4))
train(base, OLD, steps=400, lr=3e-3, balance_coef=0.01)

selections = {}
for name, task in {**OLD, **NEW}.items():
    scores = moe_peft.score_experts(base, [batch_of({name: task}, 7)], show_progress=False)
    selections[name] = moe_peft.select_experts(scores, p=0.5)
selected = selections["numbers by 3"].experts
print(moe_peft.selection_table(selections["numbers by 3"], scores))
print(moe_peft.overlap_table({name: selections[name] for name in ("numbers by 3", "numbers up", "letters up")}))

print(f"before: {losses(base)}")
others = {layer: [e for e in range(16) if e not in ids][: len(ids)] for layer, ids in selected.items()}
for name, experts in {"selected": selected, "other": others, "all": dict.fromkeys(selected, range(16))}.items():
    config = moe_peft.EsftConfig(task_type="CAUSAL_LM", experts=experts)
    model = get_peft_model(copy.deepcopy(base), config)
    train(model, NEW, steps=200, lr=1e-3)
    print(f"{name} experts trained: {losses(model)}")
    changed = {key: tensor != base.state_dict()[key] for key, tensor in model.merge_and_unload().state_dict().items()}
    moved = {
        key.split(".")[2]: c.flatten(1).any(1).nonzero().flatten().tolist() for key, c in changed.items() if c.any()
    }
    print(f"nothing but the {name} experts changed: {moved == {layer: sorted(ids) for layer, ids in experts.items()}}")
