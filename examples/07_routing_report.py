"""A page on what an adapter's routers decide about two kinds of texts, with advice.

python examples/07_routing_report.py
"""

import tempfile

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import moe_peft
from moe_peft.tools import routing_report

set_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
model = get_peft_model(base, moe_peft.RoutedConfig(task_type="CAUSAL_LM", num_experts=4, top_k=1))

# Two kinds of texts, of other tokens each; the adapter learns to repeat them.
kinds = {"low": torch.randint(4, 12, (8, 24)), "high": torch.randint(52, 60, (8, 24))}
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for _ in range(20):
    for input_ids in kinds.values():
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

batches = {kind: [{"input_ids": rows} for rows in input_ids.split(4)] for kind, input_ids in kinds.items()}
report = routing_report(model, batches, title="a tiny example")
for advice in report.advice:
    print(f"{advice.title}: {advice.evidence}")
apart = sum(report.divergences().values()) / len(report.places)
print(f"divergence of the two kinds: {apart:.2f}, by chance {report.chance():.2f}")
page = report.save(tempfile.mkdtemp(), plots=False)
print(f"page written: {page.is_file()}")
