"""One sparse block: adapters beside it and copies of some of its experts, against the frozen block.

    python benchmarks/moe_block.py [--output results.json]

Every contestant runs the same OLMoE-like block forward and backward to its input; the frozen block is the baseline.
Printed beside the times: bytes saved for the backward pass besides parameters and input, and bytes of gradients (AdamW
holds twice as many). Outputs and gradients are checked in float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from peft import PeftConfig, get_peft_model
from timing import interleave, print_rows, rows, write
from torch import nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

import moe_peft


class OneBlock(nn.Module):
    """A model that is a single sparse block, in the place that it has in a decoder layer."""

    def __init__(self, hidden: int, num_experts: int, top_k: int, implementation: str) -> None:
        super().__init__()
        config = OlmoeConfig(
            hidden_size=hidden, intermediate_size=hidden // 2, num_experts=num_experts, num_experts_per_tok=top_k
        )
        config._experts_implementation = implementation
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": OlmoeSparseMoeBlock(config)})])
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=hidden**-0.5)

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return self.layers[0]["mlp"](inputs_embeds)


def adapted(base: nn.Module, config: PeftConfig | None) -> nn.Module:
    """An adapter around a copy that shares the base's parameters; without a configuration the frozen base itself."""
    twin = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()}).requires_grad_(False)
    return (twin if config is None else get_peft_model(twin, config)).train()


def step(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer | None = None) -> Callable[[], None]:
    """Forward and backward of a fixed batch, then the optimizer's step where there is one."""
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)

    def run() -> None:
        leaf = x.detach().requires_grad_()
        model(inputs_embeds=leaf).backward(gradient)
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return run


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that get a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def memory(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """Bytes saved for the backward pass, each storage once, without parameters and input; bytes of the gradients."""
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(inputs_embeds=x.detach().requires_grad_())
    out.sum().backward()
    gradients = sum(parameter.grad.nbytes for parameter in trainable(model))
    model.zero_grad(set_to_none=True)
    return {"saved": sum(saved.values()), "gradients": gradients}


def tenth(num_experts: int) -> dict[str, list[int]]:
    """A selection of a tenth of the experts, spread over all."""
    return {"0": list(range(0, num_experts, 10))[: max(1, round(num_experts / 10))]}


def routed_sum(layer: nn.Module, x_TD: torch.Tensor, routing: list[dict[int, torch.Tensor]]) -> torch.Tensor:
    """S sum_e g_te B_e A_e x_t, token by token."""
    bank = layer.experts["default"]
    rows = [
        sum(gate * (x_TD[t] @ bank.A[e].T @ bank.B[e]) for e, gate in row.items()) for t, row in enumerate(routing)
    ]
    return bank.scaling * torch.stack(rows)


def check_agreement() -> None:
    """Compare PERFT with loops over tokens, and ESFT with full fine-tuning, in float64."""
    base, x = OneBlock(24, 5, 2, "eager").double(), torch.randn(1, 13, 24, dtype=torch.float64, requires_grad=True)
    for variant, fields in (("S", {}), ("R", {"num_experts": 3}), ("E", {})):
        config = moe_peft.PerftConfig(variant=variant, r=3, init_weights=False, lora_dropout=0.0, **fields)
        model = adapted(base, config).double().eval()
        (layer,) = [module for module in model.modules() if isinstance(module, moe_peft.layers.RoutedLayer)]
        if variant == "R":
            weights, experts = (x[0] @ layer.router["default"].weight.T).softmax(-1).topk(2)
        elif variant == "E":
            _, weights, experts = base.layers[0]["mlp"].gate(x[0])
        else:
            weights, experts = torch.ones(13, 1), torch.zeros(13, 1)
        routing = [{int(e): w for e, w in zip(*row, strict=True)} for row in zip(experts, weights, strict=True)]
        expected = base(x)[0] + routed_sum(layer, x[0], routing)
        leaves = [x, *trainable(model)]
        found = torch.autograd.grad(model(inputs_embeds=x).square().sum(), leaves)
        wanted = torch.autograd.grad(expected.square().sum(), leaves)
        torch.testing.assert_close(model(inputs_embeds=x)[0], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)  # the backbone's router rounds to float32
    selection = {"0": [1, 3]}
    full, model = copy.deepcopy(base).requires_grad_(), adapted(base, moe_peft.EsftConfig(experts=selection))
    full(x).square().sum().backward()
    model(inputs_embeds=x).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = getattr(full.layers[0]["mlp"].experts, name.rpartition(".")[2])
            torch.testing.assert_close(parameter.grad, whole.grad[selection["0"]])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--implementation", default="grouped_mm", help="how the backbone computes its experts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    check_agreement()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = OneBlock(args.hidden, args.experts, args.top_k, args.implementation).to(device, dtype)
    x = torch.randn(1, args.tokens, args.hidden, device=device, dtype=dtype)
    esft = moe_peft.EsftConfig(experts=tenth(args.experts))
    models = {
        "full fine-tuning": copy.deepcopy(base).requires_grad_().train(),
        "frozen block": adapted(base, None),
        "PERFT-S r=16": adapted(base, moe_peft.PerftConfig(variant="S", lora_dropout=0.0)),
        "PERFT-R top 2 of 8, r=16, balance on": adapted(base, moe_peft.PerftConfig(num_experts=8, lora_dropout=0.0)),
        "PERFT-E r=4": adapted(base, moe_peft.PerftConfig(variant="E", r=4, lora_dropout=0.0)),
        "ESFT, 10% of the experts": adapted(base, esft),
    }
    used = {name: memory(model, x) for name, model in models.items()}
    contestants = {name: step(model, x) for name, model in models.items()}
    for name in ("ESFT, 10% of the experts", "full fine-tuning"):
        model = copy.deepcopy(models[name])
        contestants[f"{name}, and AdamW"] = step(model, x, torch.optim.AdamW(trainable(model), lr=1e-6))
    title = (
        f"One block, width {args.hidden}, top {args.top_k} of {args.experts} experts ({args.implementation}), "
        f"{args.tokens} tokens, {device}"
    )
    times = interleave(contestants, rounds=args.rounds, warm_up=1)
    found = rows(times, dict.fromkeys(times, "frozen block"))
    print_rows(title, found)
    print("\n| contestant | MiB saved for backward | MiB of gradients |\n|---|---|---|")
    for row in found:
        sizes = used.get(row["contestant"])
        if sizes is not None:
            row |= {"saved_bytes": sizes["saved"], "gradient_bytes": sizes["gradients"]}
            print(f"| {row['contestant']} | {sizes['saved'] / 2**20:.1f} | {sizes['gradients'] / 2**20:.2f} |")
    write(args.output, title, found)


if __name__ == "__main__":
    main()
