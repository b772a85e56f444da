"""LoRAMoE in a plain PyTorch loop: describe, train with sample groups, save, load.

python examples/01_plain_loop.py
"""

import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import moe_peft


def tiny_model() -> LlamaForCausalLM:
    """A random Llama; any transformers model is adapted in the same way."""
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    )


def batch_of(step: int) -> dict[str, torch.Tensor]:
    """Two kinds of sequences, counting up (group 0) and counting down (group 1)."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, 64, (16, 1), generator=generator)
    groups = torch.arange(16) % 2
    direction = 1 - 2 * groups[:, None]
    input_ids = (start + direction * torch.arange(12)) % 64
    return {"input_ids": input_ids, "labels": input_ids, "task_type": groups}


config = moe_peft.LoraMoeConfig(
    task_type="CAUSAL_LM",
    num_experts=4,
    expert_groups=[0, 0, 1, 1],
    localized_balancing_mode="specialize",
    localized_balancing_delta=0.5,
    group_column="task_type",
)
print(moe_peft.describe(tiny_model(), config))

model = get_peft_model(tiny_model(), config).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
for step in range(100):
    loss = model(**batch_of(step)).loss
    if step % 20 == 0:
        print(f"step {step:3}  loss {loss.item():.3f}  router loss {moe_peft.router_loss(model).item():.3f}")
    loss.backward()  # the router losses are in the gradient already
    optimizer.step()
    optimizer.zero_grad()

with tempfile.TemporaryDirectory() as folder:
    model.eval().save_pretrained(folder)
    loaded = PeftModel.from_pretrained(tiny_model(), folder).eval()
    batch = {"input_ids": batch_of(1000)["input_ids"]}
    with torch.no_grad():
        print("reloaded logits equal:", torch.equal(loaded(**batch).logits, model(**batch).logits))
