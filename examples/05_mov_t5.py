"""MoV on an encoder-decoder: a T5 that finds the smallest or largest symbol learns instructions it has never seen.

python examples/05_mov_t5.py
"""

import copy
import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration, set_seed

import moe_peft
from moe_peft import telemetry

# Instruction tokens: the first of a pair asks for the smallest symbol, the second for the largest.
OLD, NEW = (2, 3), (4, 5)


def batch_of(step: int, instructions: tuple[int, int]) -> dict[str, torch.Tensor]:
    """An instruction and four symbols; the answer is one of them."""
    generator = torch.Generator().manual_seed(step)
    symbols = torch.randint(8, 24, (32, 4), generator=generator)
    largest = torch.arange(32)[:, None] % 2
    instruction = torch.where(largest == 0, *instructions)
    labels = torch.where(largest == 0, symbols.amin(1, keepdim=True), symbols.amax(1, keepdim=True))
    return {"input_ids": torch.cat([instruction, symbols], dim=1), "labels": labels}


def train(model: torch.nn.Module, instructions: tuple[int, int], steps: int, lr: float, name: str) -> None:
    """A plain loop."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        loss = model.train()(**batch_of(step, instructions)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % (steps // 4) == 0 or step == steps - 1:
            print(f"{name}  step {step:4}  loss {loss.item():.3f}")


set_seed(0)
base = T5ForConditionalGeneration(
    T5Config(
        **{"vocab_size": 24, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
        **{"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "decoder_start_token_id": 0},
    )
)
train(base, OLD, steps=160, lr=3e-3, name="backbone")

for num_experts in (1, 4):  # a single vector at each place is (IA)3
    config = moe_peft.MovConfig(task_type="SEQ_2_SEQ_LM", num_experts=num_experts)
    name = "(IA)3" if num_experts == 1 else f"MoV-{num_experts}"
    model = get_peft_model(copy.deepcopy(base), config)
    sizes = {place: p.numel() for place, p in model.named_parameters() if p.requires_grad}
    vectors = sum(size for place, size in sizes.items() if place.endswith(".vectors"))
    print(f"\n{name}: {vectors:,} parameters in vectors, {sum(sizes.values()) - vectors:,} in routers")
    train(model, NEW, steps=160, lr=1e-2, name=name)

model.eval()
with telemetry.record(model) as routings, torch.no_grad():
    expected = model(**batch_of(1000, NEW)).logits
print("\nshare of each vector, over tokens and heads")
for place, (routing,) in routings.items():
    if "block.0." in place:
        print(f"{place:<50}", *(f"{share:.2f}" for share in routing.probs.mean(0).tolist()))

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    with torch.no_grad():
        print("reloaded logits equal:", torch.equal(loaded(**batch_of(1000, NEW)).logits, expected))
