"""LoRA on fused experts: stock peft, the same accelerated, and the type of its own, against attention-only LoRA.

    python benchmarks/expert_lora.py [--dtypes float32 bfloat16] [--experts 64 8] [--output results.json]

A Qwen3-MoE-like model is trained for a step, decodes one token with a cache, and reads a prompt, by each contestant in
turn. Losses and gradients are compared in float64 before anything is timed. Printed besides: bytes saved for the
backward pass beyond those of attention-only LoRA, and by how much a training step raises the peak of resident memory,
each in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from timing import interleave, print_rows, ratios, rows, write
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed

import moe_peft
from moe_peft.tools.peak_memory import rise_of_memory

ATTENTION = "attention-only LoRA"
STOCK, FAST, OWN = "stock target_parameters", "accelerate_expert_lora", "ExpertLoraConfig"
NAMES = (ATTENTION, STOCK, FAST, OWN)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def backbone(args: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    """A random model of the size that is asked for."""
    set_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        moe_intermediate_size=args.hidden // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=args.hidden // 8,
        num_experts=args.experts,
        num_experts_per_tok=min(args.top_k, args.experts),
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen3MoeForCausalLM(config).to(device, dtype)
    model.set_experts_implementation("eager" if dtype == torch.float64 else "grouped_mm")
    return model


def contestant(name: str, args: argparse.Namespace, dtype: torch.dtype) -> PeftModel:
    """A model with the adapter of one contestant."""
    base = backbone(args, dtype)
    if name == OWN:
        config = moe_peft.ExpertLoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules=LINEARS)
    else:
        parameters = None if name == ATTENTION else moe_peft.expert_parameters(base)
        config = LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules=LINEARS, target_parameters=parameters)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).train()
    return moe_peft.accelerate_expert_lora(model) if name == FAST else model


def step(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of a batch."""

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def reading(model: nn.Module, ids: torch.Tensor, cached: int = 0) -> Callable[[], None]:
    """One forward without gradients: of a prompt, or of one token after a prompt in the cache."""
    with torch.no_grad():
        cache = model(input_ids=ids[:1, :cached], use_cache=True).past_key_values if cached else None

    @torch.no_grad()
    def run() -> None:
        if cache is None:
            model(input_ids=ids, use_cache=False)
        else:
            model(input_ids=ids[:1, :1], past_key_values=cache, use_cache=True)
            cache.crop(-1)

    return run


def saved_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """Bytes saved for the backward pass, each storage once, without parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    return sum(storage.nbytes() for storage in saved.values())


def check_agreement(args: argparse.Namespace) -> None:
    """Compare stock peft with both ways in float64, logits and gradients."""
    small = argparse.Namespace(**{**vars(args), "hidden": 64, "layers": 2, "experts": 8})
    stock, own = contestant(STOCK, small, torch.float64), contestant(OWN, small, torch.float64)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in stock.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    ids = torch.randint(3, 1024, (2, 9), generator=generator).to(stock.device)
    loss = stock(input_ids=ids, labels=ids).loss
    trained = [p for p in stock.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss, trained)
    moe_peft.accelerate_expert_lora(stock)
    fast = stock(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(fast, loss)
    torch.testing.assert_close(torch.autograd.grad(fast, trained), expected)
    for layer, twin in zip(moe_peft.routed_layers(own), _places(stock, own), strict=True):
        bank = layer.experts["default"]
        for factors, wrapper in twin:
            A, B = (getattr(wrapper, f"lora_{f}")["default"].weight.data for f in "AB")
            own_A, own_B = (getattr(bank, name).data for name in factors)
            own_A.copy_(A.view(own_A.shape))
            own_B.copy_(B.view(B.shape[0], -1, own_B.shape[0]).permute(2, 1, 0))
    torch.testing.assert_close(own(input_ids=ids, labels=ids).loss, loss)


def _places(stock: PeftModel, own: PeftModel) -> list[list[tuple[tuple[str, str], nn.Module]]]:
    """Stock's wrappers beside the tensors of each of our layers."""
    places = []
    for name, module in own.get_base_model().named_modules():
        if not hasattr(module, "tracker") or not hasattr(module, "experts"):
            continue
        twin, found = stock.get_base_model().get_submodule(name), []
        if not hasattr(twin, "parameter_name"):
            found.append((("A", "B"), twin))
        while hasattr(twin, "parameter_name"):
            matrix = "down" if twin.parameter_name == "down_proj" else "gate_up"
            found.append(((f"{matrix}_A", f"{matrix}_B"), twin))
            twin = twin.base_layer
        places.append(found)
    return places


def peak_memory(name: str, args: argparse.Namespace, num_experts: int, dtype: str) -> float | None:
    """MiB by which a training step of one contestant raises the peak of a process of its own; None if unknown."""
    sizes = ("hidden", "layers", "top_k", "tokens", "r", "threads")
    flags = [word for size in sizes for word in (f"--{size.replace('_', '-')}", str(getattr(args, size)))]
    own = ["--experts", str(num_experts), "--dtypes", dtype, "--alone", name]
    command = [sys.executable, __file__, *flags, *own]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=args.memory_seconds)
    except subprocess.TimeoutExpired:
        return None
    rise = done.stdout.split()[-1]
    return None if rise == "None" else float(rise)


def alone(args: argparse.Namespace, dtype: torch.dtype, ids: torch.Tensor) -> None:
    """Print the rise of the peak of memory in a training step."""
    model = contestant(args.alone, args, dtype)
    _, rise = rise_of_memory(step(model, ids.to(model.device)))
    print(None if rise is None else rise / 2**20)


def measure(args: argparse.Namespace, num_experts: int, dtype: str, ids: torch.Tensor) -> list[dict[str, Any]]:
    """Rows of all contestants with one number of experts in one dtype."""
    own = argparse.Namespace(**{**vars(args), "experts": num_experts})
    models = {name: contestant(name, own, getattr(torch, dtype)) for name in NAMES}
    ids = ids.to(models[ATTENTION].device)
    used = {name: saved_bytes(model, ids) for name, model in models.items()}
    works = {
        "training step": {name: step(model, ids) for name, model in models.items()},
        "one decoded token": {name: reading(model, ids, cached=32) for name, model in models.items()},
        "prefill": {name: reading(model, ids) for name, model in models.items()},
    }
    labels = {"experts": num_experts, "dtype": dtype}
    found: list[dict[str, Any]] = []
    for work, each in works.items():
        times = interleave(each, rounds=args.rounds, warm_up=1)
        mine = rows(times, dict.fromkeys(times, ATTENTION), work=work, **labels)
        for row in mine:
            row["stock_over_this"] = ratios(times, row["contestant"])[STOCK]
        print_rows(f"{work}, top {own.top_k} of {num_experts} experts, {args.tokens} tokens, {dtype}", mine)
        found += mine
    del models, works
    for name in NAMES:
        extra = {"saved_beyond_attention": used[name] - used[ATTENTION]}
        peak = None if args.no_memory else peak_memory(name, args, num_experts, dtype)
        print(f"| {name} | {extra['saved_beyond_attention'] / 2**20:.1f} MiB saved | {peak} MiB of peak |", flush=True)
        found.append({"contestant": name, "work": "memory", **labels, **extra, "peak_mib": peak})
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, nargs="+", default=[64, 8])
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true", help="leave the peaks of memory out")
    parser.add_argument(
        "--memory-seconds", type=float, default=120.0, help="limit of one process that measures a peak"
    )
    parser.add_argument("--alone", choices=NAMES, help="measure the memory of one contestant; used by the benchmark")
    parser.add_argument("--output")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ids = torch.randint(3, 1024, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    if args.alone:
        args.experts = args.experts[0]
        alone(args, getattr(torch, args.dtypes[0]), ids)
        return
    check_agreement(args)
    found = [row for dtype in args.dtypes for count in args.experts for row in measure(args, count, dtype, ids)]
    title = f"Expert LoRA, {args.layers} layers of width {args.hidden}, r={args.r}, {args.tokens} tokens"
    write(args.output, title, found)


if __name__ == "__main__":
    main()
