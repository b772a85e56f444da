"""What a run did, for a person: held-out loss and an answer before and after, expert load per layer, and a reload."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import moe_peft
from moe_peft import telemetry
from moe_peft.tools import routing_report
from moe_peft.tools.report.texts import padded
from moe_peft.types import Routing

ROWS = 256  # held-out rows whose routing is reported on

RELOAD = """import moe_peft
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "{folder}")"""


class Report:
    """Measures a trainer's model before and after training.

    Args:
        trainer: A TRL trainer whose model has routed adapters.
        examples: Held-out rows, with `prompt` and `completion`, or `messages`, or `text`.
        max_new_tokens: Length of the answer.
        num_batches: Evaluation batches over which the expert load is averaged.
    """

    def __init__(self, trainer: Any, examples: Any, *, max_new_tokens: int = 48, num_batches: int = 8) -> None:
        self.trainer = trainer
        self.prompt = prompt_of(examples[0], trainer.processing_class)
        self.expected = str(examples[0].get("completion", ""))
        self.max_new_tokens = max_new_tokens
        self.num_batches = num_batches
        self.loss_before = float("nan")
        self.answer_before = ""

    def before(self) -> None:
        """Measure the untrained adapter, which is the base model."""
        self.loss_before = self.trainer.evaluate()["eval_loss"]
        self.answer_before = self.answer(self.trainer.model)

    def after(self, folder: str, base: str) -> None:
        """Measure the trained adapter, print everything, load the saved adapter and compare.

        Args:
            folder: Where the adapter was saved.
            base: Name or path of the base model.

        Raises:
            RuntimeError: The reloaded adapter computes other logits.
        """
        loss_after = self.trainer.evaluate()["eval_loss"]
        answer_after = self.answer(self.trainer.model)
        routed = moe_peft.routed_layers(self.trainer.model)
        table = load_table(self.trainer, self.num_batches) if routed else "no experts"
        difference = self.reload_difference(folder, base)
        made = self.routing()
        if not self.trainer.is_world_process_zero():
            return
        print(f"\nheld-out loss   {self.loss_before:.4f} -> {loss_after:.4f}")
        print(f"prompt          {self.prompt!r}")
        print(f"expected        {self.expected!r}")
        print(f"answer before   {self.answer_before!r}")
        print(f"answer after    {answer_after!r}")
        print(f"\n{table}\n\nadapter         {folder}\n\n{RELOAD.format(base=base, folder=folder)}\n")
        print(f"reloaded: largest logit difference {difference:.1e}")
        if made is not None:
            print(f"routing         {made.save(Path(folder) / 'routing_report')}")

    def routing(self) -> Any:
        """The report on what the routers decide about held-out rows; call it in every process.

        Returns:
            See `moe_peft.tools.routing_report`; None where the rows have no token ids.
        """
        trainer, groups = self.trainer, defaultdict(list)
        model = trainer.accelerator.unwrap_model(trainer.model)
        column = getattr(model.peft_config[model.active_adapter], "group_column", None)
        for row in islice(trainer.eval_dataset, ROWS):
            if row.get("input_ids"):
                group = "held-out rows" if row.get(column) is None else f"{column} {row[column]}"
                groups[group].append(list(row["input_ids"]))
        size = trainer.args.per_device_eval_batch_size
        batches = {
            group: [
                padded(rows[start : start + size], trainer.processing_class) for start in range(0, len(rows), size)
            ]
            for group, rows in groups.items()
        }
        if not batches:
            return None
        folder = trainer.args.output_dir
        return routing_report(
            trainer.model, batches, tokenizer=trainer.processing_class, history=folder, title=Path(folder).name
        )

    @torch.no_grad()
    def answer(self, model: nn.Module) -> str:
        """Greedy answer to the first held-out prompt."""
        tokenizer = self.trainer.processing_class
        inputs = tokenizer(self.prompt, return_tensors="pt", add_special_tokens=True)
        inputs = {k: v.to(self.trainer.args.device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        model.eval()
        output = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    @torch.no_grad()
    def reload_difference(self, folder: str, base: str) -> float:
        """Load the saved adapter on a fresh base model and compare the logits of the prompt.

        Args:
            folder: Where the adapter was saved.
            base: Name or path of the base model.

        Returns:
            Largest absolute difference of the logits.

        Raises:
            RuntimeError: It is more than rounding.
        """
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        trained = self.trainer.model.eval()
        inner = trained.get_base_model()
        quantization = getattr(inner.config, "quantization_config", None)
        fresh = AutoModelForCausalLM.from_pretrained(base, dtype=inner.dtype, quantization_config=quantization)
        reloaded = PeftModel.from_pretrained(fresh.to(self.trainer.args.device), folder).eval()
        input_ids = self.trainer.processing_class(self.prompt, return_tensors="pt")["input_ids"]
        input_ids = input_ids.to(self.trainer.args.device)
        expected, found = trained(input_ids=input_ids).logits, reloaded(input_ids=input_ids).logits
        difference = (expected - found).abs().max().item()
        tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
        if not difference <= tolerance * max(1.0, expected.abs().max().item()):
            raise RuntimeError(
                f"The adapter in {folder} computes other logits when loaded again: {difference:.2e} apart."
            )
        return difference


def prompt_of(example: dict[str, Any], tokenizer: Any) -> str:
    """Text that the model continues: the prompt, the first message, or the first half of a text."""
    if "prompt" in example and isinstance(example["prompt"], str):
        return example["prompt"]
    messages = example.get("prompt") or example.get("messages")
    if messages:
        return tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    text = str(example["text"])
    return text[: len(text) // 2]


@torch.no_grad()
def load_table(trainer: Any, num_batches: int) -> str:
    """Share of the gate mass that each expert gets on held-out data, per decoder layer, in percent.

    Args:
        trainer: A trainer with an evaluation data set.
        num_batches: Batches to average over.

    Returns:
        A table; where samples have groups, a line per group follows with the share that the experts of each group get.
    """
    model = trainer.model.eval()
    shares: dict[str, list[torch.Tensor]] = defaultdict(list)
    by_group: dict[int, list[torch.Tensor]] = defaultdict(list)
    for index, batch in enumerate(trainer.get_eval_dataloader()):
        if index == num_batches:
            break
        batch.pop("labels", None)
        with telemetry.record(model) as routings:
            model(**batch)
        for place, made in routings.items():
            layer = re.search(r"\.(\d+)\.", place)
            for routing in made:
                shares[layer.group(1) if layer else place].append(telemetry.importance(routing))
                for group, share in shares_by_group(routing).items():
                    by_group[group].append(share)
    rows = {layer: torch.stack(values).mean(0) for layer, values in shares.items()}
    num_experts = len(next(iter(rows.values())))
    lines = ["expert load (% of gate mass)", "layer " + "".join(f"{f'e{e}':>7}" for e in range(num_experts))]
    lines += [f"{layer:>5} " + "".join(f"{100 * s:7.1f}" for s in row.tolist()) for layer, row in rows.items()]
    for group, values in sorted(by_group.items()):
        row = torch.stack(values).mean(0).tolist()
        lines.append(f"all layers, samples of group {group}: " + " ".join(f"{100 * s:.1f}" for s in row))
    return "\n".join(lines)


def shares_by_group(routing: Routing) -> dict[int, torch.Tensor]:
    """Share of the gate mass that each expert gets from the samples of each group: group -> (E,)."""
    context = routing.context
    if context.groups is None or context.sequences is None:
        return {}
    gates_TE, group_T = routing.gate_matrix(), context.groups[context.sequences]
    if context.valid is not None:
        gates_TE, group_T = gates_TE[context.valid], group_T[context.valid]
    sums = {int(group): gates_TE[group_T == group].sum(0) for group in group_T.unique()}
    return {group: total / total.sum() for group, total in sums.items()}
