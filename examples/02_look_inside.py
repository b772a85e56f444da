"""What a sparse adapter decides: load, entropy, dead experts and drop rate of every layer.

python examples/02_look_inside.py
"""

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import moe_peft
from moe_peft import telemetry

set_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
)
config = moe_peft.SiraConfig(task_type="CAUSAL_LM", num_experts=8, top_k=2, capacity_factor=1.0)
model = get_peft_model(base, config).train()

input_ids = torch.randint(0, 64, (4, 32))
attention_mask = torch.ones_like(input_ids)
attention_mask[0, 20:] = 0  # padding counts nowhere

with telemetry.record(model) as routings:
    model(input_ids=input_ids, attention_mask=attention_mask)

print(f"{'place':<36}{'entropy':>9}{'max/mean':>10}{'dead':>6}{'dropped':>9}{'confidence':>12}")
for place, (routing,) in routings.items():
    print(
        f"{place:<36}{telemetry.load_entropy(routing).item():9.3f}{telemetry.max_over_mean_load(routing).item():10.2f}"
        f"{telemetry.dead_experts(routing).item():6}{telemetry.drop_rate(routing).item():9.1%}"
        f"{telemetry.confidence(routing).item():12.3f}"
    )
