"""A whole training step: routed experts against stock peft LoRA of equal rank, and against a loop over experts.

    python benchmarks/train_step.py [--output results.json]

Every contestant adapts the same FFN linears of the same Llama-like model; E = 8 experts of rank 4 stand against LoRA
of rank 32. Outputs and gradients of the routed layer are checked against the loop before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from timing import interleave, report
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import moe_peft
from moe_peft.forward.tracker import find_tracker
from moe_peft.telemetry.meter import RoutingMeter, metrics_of

TARGETS = ["gate_proj", "up_proj", "down_proj"]


class LoopedExperts(nn.Module):
    """One expert after the other, as the formula reads: y = W0 x + s sum_e g_e B_e A_e x, with a balance loss."""

    def __init__(self, base_layer: nn.Linear, num_experts: int, r: int, scaling: float) -> None:
        super().__init__()
        self.base_layer, self.scaling = base_layer, scaling
        features = base_layer.in_features, base_layer.out_features
        self.router = nn.Linear(features[0], num_experts, bias=False)
        self.lora_A = nn.ModuleList(nn.Linear(features[0], r, bias=False) for _ in range(num_experts))
        self.lora_B = nn.ModuleList(nn.Linear(r, features[1], bias=False) for _ in range(num_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x.to(self.router.weight.dtype)).softmax(-1)
        out = self.base_layer(x)
        for e, (lora_A, lora_B) in enumerate(zip(self.lora_A, self.lora_B, strict=True)):
            out = out + self.scaling * weights[..., e : e + 1] * lora_B(lora_A(x))
        mass = weights.mean(1).flatten()
        self.balance = mass.var() / mass.mean().square()
        return out


def loop_over_experts(model: nn.Module, num_experts: int, r: int, scaling: float) -> nn.Module:
    """Freeze a model and put a `LoopedExperts` at each target."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in TARGETS:
                setattr(parent, name, LoopedExperts(child, num_experts, r, scaling))
    return model


def training_step(
    model: nn.Module, input_ids: torch.Tensor, coef: float = 0.0, meter: RoutingMeter | None = None
) -> Callable[[], None]:
    """One forward, backward and AdamW step on a fixed batch; a meter is read in every step, its worst case."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    layers = [m for m in model.modules() if isinstance(m, LoopedExperts)]
    tracker = find_tracker(model)
    if meter is not None:
        tracker.training_observers.append(meter.observe)
    model.train()

    def step() -> None:
        loss = model(input_ids=input_ids, labels=input_ids).loss
        if layers:
            loss = loss + coef * torch.stack([layer.balance for layer in layers]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if meter is not None:
            meter.add_losses(tracker)
            metrics_of(meter.read(), layer_groups=4)

    return step


def check_agreement(device: torch.device) -> None:
    """Compare the routed layer with the loop in float64, output and input gradient."""
    config = moe_peft.RoutedConfig(router="dense", target_modules=["0"], init_weights=False, router_aux_loss_coef=0.0)
    routed = get_peft_model(nn.Sequential(nn.Linear(24, 40)).double().to(device), config)
    layer = routed.base_model.model[0]
    experts, router = layer.experts["default"].double(), layer.router["default"].double()
    loop = LoopedExperts(copy.deepcopy(layer.base_layer), config.num_experts, config.r, config.scaling).double()
    loop = loop.to(device)
    loop.router.weight.data = router.weight.data
    for e in range(config.num_experts):
        loop.lora_A[e].weight.data, loop.lora_B[e].weight.data = experts.A.data[e], experts.B.data[e].T
    x = torch.randn(3, 5, 24, dtype=torch.float64, device=device)
    results = []
    for module in (routed, loop):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_agreement(device)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=args.hidden,
            intermediate_size=4 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=8,
            max_position_embeddings=args.length,
        )
    ).to(device)
    input_ids = torch.randint(2048, (args.batch, args.length), device=device)
    shared = {"r": 4, "lora_alpha": 32, "num_experts": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    lora = LoraConfig(r=32, lora_alpha=64, target_modules=TARGETS, task_type="CAUSAL_LM")
    loramoe = moe_peft.LoraMoeConfig(lora_dropout=0.0, **shared)
    top_2 = moe_peft.RoutedConfig(router="top_k", top_k=2, router_z_loss_coef=0.001, **shared)
    contestants = {
        "peft LoRA r=32": training_step(get_peft_model(copy.deepcopy(base), lora), input_ids),
        "LoRAMoE E=8 r=4, balance on": training_step(get_peft_model(copy.deepcopy(base), loramoe), input_ids),
        "top-2 of 8 r=4, balance and z-loss on": training_step(get_peft_model(copy.deepcopy(base), top_2), input_ids),
        "top-2 of 8 r=4, losses and telemetry on": training_step(
            get_peft_model(copy.deepcopy(base), top_2), input_ids, meter=RoutingMeter()
        ),
        "loop over experts, balance on": training_step(
            loop_over_experts(copy.deepcopy(base), 8, 4, 8.0), input_ids, coef=0.1
        ),
    }
    title = (
        f"Whole training step, {args.layers} layers, width {args.hidden}, {args.batch * args.length} tokens, {device}"
    )
    report(title, interleave(contestants, rounds=args.rounds), "peft LoRA r=32", args.output)


if __name__ == "__main__":
    main()
