"""A whole training step on a dense model: routed experts against stock peft's adapters of equal parameters.

    python benchmarks/train_step.py [--tokens 16 256 2048] [--dtypes float32 bfloat16] [--output results.json]

Every contestant adapts the same linears of the same Llama-like model: E experts of rank r stand against LoRA of rank
E * r, vectors against (IA)3. A step is forward, backward to the input and AdamW. The step of the frozen model is
measured too, so that what the adapters add can be compared without it. Outputs and gradients of the routed layer are
checked against the loop over experts in float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from dense_models import EVERY, FFN, FROZEN, LORA, TOP_2, XLORA, adapted, backbone, baseline_of, configs, x_lora
from peft import get_peft_model
from timing import interleave, print_rows, rows, write
from torch import nn

import moe_peft
from moe_peft.forward.tracker import ForwardTracker, find_tracker
from moe_peft.telemetry.meter import RoutingMeter, metrics_of
from moe_peft.types import Routing

LOOP, TELEMETRY = "loop over experts, balance", "top-2, losses and telemetry in every step"


class TimedMeter(RoutingMeter):
    """A meter that knows what its own calls cost, which is too little beside a step to be seen in that.

    Attributes:
        seconds_of_steps: CPU time of each step's calls, reading included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds_of_steps: list[float] = []
        self._spent = 0.0

    def observe(self, place: str, adapter: str, routing: Routing) -> None:
        """See `RoutingMeter.observe`."""
        before = time.process_time()
        super().observe(place, adapter, routing)
        self._spent += time.process_time() - before

    def finish_step(self, tracker: ForwardTracker) -> None:
        """Add the losses of a step and make the entries of a log of it."""
        before = time.process_time()
        self.add_losses(tracker)
        metrics_of(self.read(), layer_groups=4)
        self.seconds_of_steps.append(self._spent + time.process_time() - before)
        self._spent = 0.0


METER = TimedMeter()


class LoopedExperts(nn.Module):
    """One expert after the other, as the formula reads: y = W0 x + s sum_e g_e B_e A_e x, with a balance loss."""

    def __init__(self, base_layer: nn.Linear, num_experts: int, r: int, scaling: float) -> None:
        super().__init__()
        self.base_layer, self.scaling = base_layer, scaling
        features = base_layer.in_features, base_layer.out_features
        like = {"bias": False, "dtype": base_layer.weight.dtype, "device": base_layer.weight.device}
        wide = torch.promote_types(base_layer.weight.dtype, torch.float32)
        self.router = nn.Linear(features[0], num_experts, **{**like, "dtype": wide})
        self.lora_A = nn.ModuleList(nn.Linear(features[0], r, **like) for _ in range(num_experts))
        self.lora_B = nn.ModuleList(nn.Linear(r, features[1], **like) for _ in range(num_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.router(x.to(self.router.weight.dtype)).softmax(-1)
        out = self.base_layer(x)
        for e, (lora_A, lora_B) in enumerate(zip(self.lora_A, self.lora_B, strict=True)):
            out = out + self.scaling * weights[..., e : e + 1].to(x.dtype) * lora_B(lora_A(x))
        mass = weights.mean(1).flatten()
        self.balance = mass.var() / mass.mean().square()
        return out


def loop_over_experts(model: nn.Module, targets: list[str], num_experts: int, r: int, scaling: float) -> nn.Module:
    """Put a `LoopedExperts` at each target."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in targets:
                setattr(parent, name, LoopedExperts(child, num_experts, r, scaling))
    return model


def training_step(
    model: nn.Module,
    input_ids: torch.Tensor,
    coef: float = 0.0,
    meter: TimedMeter | None = None,
    *,
    compiled: bool = False,
) -> Callable[[], None]:
    """One forward, backward to the input and AdamW step on a fixed batch; a meter is read in every step."""
    call = torch.compile(model, fullgraph=True) if compiled else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    layers = [m for m in model.modules() if isinstance(m, LoopedExperts)]
    tracker = find_tracker(model)
    if meter is not None:
        tracker.training_observers.append(meter.observe)
    embedded = model.get_input_embeddings()(input_ids).detach()
    model.train()

    def step() -> None:
        leaf = embedded.requires_grad_()
        loss = call(inputs_embeds=leaf, labels=input_ids, use_cache=False).loss
        if layers:
            loss = loss + coef * torch.stack([layer.balance for layer in layers]).sum()
        loss.backward()
        leaf.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        if meter is not None:
            meter.finish_step(tracker)

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


def contestants(
    args: argparse.Namespace, base: nn.Module, input_ids: torch.Tensor, targets: list[str]
) -> dict[str, Callable[[], None]]:
    """A step of each contestant."""
    every = configs(args.experts, args.r, targets)
    own = {name: config for name, config in every.items() if not args.only or name in (LORA, FROZEN, *args.only)}
    steps = {
        name: training_step(adapted(base, config), input_ids, compiled=args.compiled) for name, config in own.items()
    }
    if args.telemetry:
        model = adapted(base, every[TOP_2])
        steps[TELEMETRY] = training_step(model, input_ids, meter=METER)
    if args.slow:
        loop = loop_over_experts(adapted(base, None), targets, args.experts, args.r, 8.0)
        steps[LOOP] = training_step(loop, input_ids, coef=0.1)
        steps[XLORA] = training_step(x_lora(base, args.experts, args.r, targets), input_ids)
    return steps


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 256, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--all-linear", action="store_true", help="adapt attention too, not the FFN alone")
    parser.add_argument("--slow", action="store_true", help="the loop over experts and stock X-LoRA too")
    parser.add_argument("--telemetry", action="store_true", help="one more contestant whose telemetry is read")
    parser.add_argument("--only", nargs="+", help="names of the routed contestants, beside LoRA and the frozen model")
    parser.add_argument("--compiled", action="store_true", help="compile every contestant's model to one graph")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output")
    args = parser.parse_args()
    unknown = set(args.only or ()) - set(configs(args.experts, args.r, FFN))
    if unknown:
        parser.error(f"--only: no contestant is called {', '.join(sorted(unknown))}.")
    if args.compiled and (args.slow or args.telemetry):
        parser.error("--compiled: a loop that sets attributes, X-LoRA and a meter are not compiled; leave those out.")
    # Contestants share the code of their forwards, each with a graph of its own.
    torch._dynamo.config.recompile_limit = 64
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_agreement(device)
    targets = EVERY if args.all_linear else FFN
    title = (
        f"Training step, {args.layers} layers of width {args.hidden}, E={args.experts} experts of rank {args.r} on "
        f"{'all linears' if args.all_linear else 'the FFN'}, {device.type}{', compiled' if args.compiled else ''}"
    )
    found = []
    for dtype in args.dtypes:
        base = backbone(args.hidden, args.layers, getattr(torch, dtype))
        for tokens in args.tokens:
            # Up to 512 tokens a row.
            batch = -(-tokens // 512)
            input_ids = torch.randint(1, 2048, (batch, tokens // batch), device=device)
            times = interleave(contestants(args, base, input_ids, targets), rounds=args.rounds)
            over = {name: LORA if name == FROZEN else baseline_of(name) for name in times}
            over = {name: baseline for name, baseline in over.items() if baseline in times}
            own = rows(times, over, FROZEN, dtype=dtype, tokens=tokens)
            if args.telemetry:
                seconds = statistics.median(METER.seconds_of_steps) / (args.layers * len(targets))
                METER.seconds_of_steps.clear()
                next(row for row in own if row["contestant"] == TELEMETRY)["telemetry_us"] = 1e6 * seconds
            print_rows(f"{title}, {dtype}, {tokens} tokens", own)
            found += own
    write(args.output, title, found)


if __name__ == "__main__":
    main()
