"""LoRA on the experts of a tiny OLMoE: stock peft and the same adapter accelerated, side by side.

python examples/06_expert_lora.py
"""

import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import OlmoeConfig, OlmoeForCausalLM, set_seed

import moe_peft

torch.set_num_threads(1)
set_seed(0)
sizes = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_experts": 64}
base = OlmoeForCausalLM(OlmoeConfig(**sizes, num_experts_per_tok=4, num_attention_heads=4, pad_token_id=0))
config = LoraConfig(r=8, target_modules=[], target_parameters=moe_peft.expert_parameters(base), task_type="CAUSAL_LM")
model = get_peft_model(base, config)
generator = torch.Generator().manual_seed(0)
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
batch = torch.randint(3, 128, (2, 64), generator=generator)


def measure() -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Loss, a gradient, seconds of a training step and seconds of one decoded token; the best of five."""
    steps, tokens = [], []
    for _ in range(5):
        model.zero_grad()
        start = time.perf_counter()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        steps.append(time.perf_counter() - start)
        start = time.perf_counter()
        with torch.no_grad():
            model(input_ids=batch[:1, :1])
        tokens.append(time.perf_counter() - start)
    gradient = next(p.grad for n, p in model.named_parameters() if "lora_B" in n)
    return loss.detach(), gradient.clone(), min(steps), min(tokens)


stock = measure()
moe_peft.accelerate_expert_lora(model)
fast = measure()
same = torch.allclose(stock[0], fast[0], atol=1e-6) and torch.allclose(stock[1], fast[1], atol=1e-6)
print(f"training step: stock {stock[2] * 1e3:.1f} ms, accelerated {fast[2] * 1e3:.1f} ms")
print(f"one token:     stock {stock[3] * 1e3:.1f} ms, accelerated {fast[3] * 1e3:.1f} ms")
print(f"losses and gradients equal: {same}")
