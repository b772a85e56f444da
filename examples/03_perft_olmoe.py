"""PERFT on a sparse backbone: the four variants side by side, and where their routers send the tokens.

python examples/03_perft_olmoe.py
"""

import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import OlmoeConfig, OlmoeForCausalLM, set_seed

import moe_peft
from moe_peft import telemetry

VARIANTS = {
    "R": "adapters with a router of their own beside the block",
    "E": "one adapter inside each expert, routed by the backbone",
    "D": "adapters that every token uses",
    "S": "one adapter",
}


def tiny_model() -> OlmoeForCausalLM:
    """A random OLMoE with 8 experts in each layer, of which a token uses 2; its blocks hold no linear layer."""
    set_seed(0)
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        eos_token_id=2,
    )
    return OlmoeForCausalLM(config)


def batch_of(step: int) -> dict[str, torch.Tensor]:
    """Sequences that count up in steps of one or three."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, 64, (16, 1), generator=generator)
    input_ids = (start + (1 + 2 * (torch.arange(16) % 2))[:, None] * torch.arange(12)) % 64
    return {"input_ids": input_ids, "labels": input_ids}


def train(variant: str) -> tuple[PeftModel, float, float]:
    """The trained model, and the loss on a held-out batch before and after."""
    config = moe_peft.PerftConfig(variant=variant, r=8, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = model.eval()(**batch_of(1000)).loss.item()
    model.train()
    for step in range(60):
        model(**batch_of(step)).loss.backward()  # R's balance loss is in the gradient already
        optimizer.step()
        optimizer.zero_grad()
    return model, before, model.eval()(**batch_of(1000)).loss.item()


print(moe_peft.describe(tiny_model(), moe_peft.PerftConfig(r=8)))
models = {}
for variant, meaning in VARIANTS.items():
    models[variant], before, after = train(variant)
    parameters = models[variant].get_nb_trainable_parameters()[0]
    print(f"{variant}  {parameters:6,} parameters  loss {before:.2f} -> {after:.2f}   {meaning}")

for variant in ("R", "E"):
    with torch.no_grad(), telemetry.record(models[variant]) as routings:
        models[variant](**batch_of(1000))
    for place, (routing,) in routings.items():
        shares = "  ".join(f"{share:4.0%}" for share in telemetry.load(routing).tolist())
        print(f"{variant}  share of the tokens' choices at {place}: {shares}")

with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    models["R"].save_pretrained(folder)
    loaded = PeftModel.from_pretrained(tiny_model(), folder).eval()
    print("reloaded logits equal:", torch.equal(loaded(**batch_of(0)).logits, models["R"](**batch_of(0)).logits))
