"""One optimizer step of SFTTrainer, to be launched with any number of processes: the same global batch each time.

accelerate launch tests/processes/sft_script.py <folder> <method,method,...> <accumulation>-<scope> ...

Each setting is a run of its own, in the folder of its name, below one of the method's name where there are several.
A method is a name, or `<name>@<way>`: several processes then have a model that transformers split when it loaded it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import FullyShardedDataParallelPlugin
from datasets import Dataset
from torch import distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, set_seed
from transformers.distributed import DistributedConfig
from trl import SFTConfig, SFTTrainer

import moe_peft
from tests.methods.esft_models import EXPERTS, sparse_model
from tests.tiny import tiny_llama

ROWS = 8
WAYS = {
    "fsdp": {"fsdp_size": 2},
    "ep+fsdp": {"fsdp_size": 2, "ep_size": 2},
    "tp": {"tp_size": 2, "tp_plan": "auto"},
    "tp+ep": {"tp_size": 2, "tp_plan": "auto", "ep_size": 2},
}
# Adapters are split like the experts, and trained with all that acts on gradients and states.
WAYS |= {f"{way}+split": {**WAYS[way], "ep_implementation": "moe_peft"} for way in ("ep+fsdp", "tp+ep")}


def allow_fsdp_on_cpu() -> None:
    """Accelerate turns processes on GPUs alone into FSDP; on CPU it would quietly train with DDP."""
    plain = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin or FullyShardedDataParallelPlugin()

    AcceleratorState.__init__ = init


def allow_tensor_parallelism_on_cpu() -> None:
    """Accelerate takes it for a setting of GPUs alone, and looks at nothing else in this check."""
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    model = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def base_of(method: str, folder: Path) -> PreTrainedModel:
    """The model to adapt, the same in every process."""
    set_seed(0)
    name, _, way = method.partition("@")
    model = tiny_llama() if name == "routed" else sparse_model("olmoe", "grouped_mm")
    if not way or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return model
    whole = folder / "base"
    model.save_pretrained(whole)  # by the first process, where there is a group
    dist.barrier()
    split = DistributedConfig(**WAYS[way])
    return AutoModelForCausalLM.from_pretrained(whole, distributed_config=split, experts_implementation="grouped_mm")


def config_of(method: str, scope: str) -> moe_peft.config.MoeConfig:
    fields = {"task_type": "CAUSAL_LM", "init_weights": False, "load_balancing_scope": scope}
    if method.startswith("esft"):
        return moe_peft.EsftConfig(task_type="CAUSAL_LM", experts=EXPERTS)
    if method.startswith("expert-lora"):
        return moe_peft.ExpertLoraConfig(r=4, task_type="CAUSAL_LM", init_weights=False)
    if method.startswith("perft-e"):
        return moe_peft.PerftConfig(variant="E", r=4, lora_dropout=0.0, task_type="CAUSAL_LM", init_weights=False)
    if method.startswith("perft"):
        return moe_peft.PerftConfig(num_experts=4, lora_dropout=0.0, router_aux_loss_coef=1.0, **fields)
    return moe_peft.RoutedConfig(num_experts=4, router_aux_loss_coef=1.0, **fields)


def main(folder: str, accumulation: int, scope: str, method: str) -> None:
    way = method.partition("@")[2]
    batches = int(os.environ.get("WORLD_SIZE", "1")) if "tp" not in way.split("+") else 1
    ids = torch.randint(3, 60, (ROWS, 6), generator=torch.Generator().manual_seed(3)).tolist()
    args = SFTConfig(
        output_dir=folder,
        max_steps=1,
        per_device_train_batch_size=ROWS // batches // accumulation,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
    )
    if way.endswith("split"):
        args.optim, args.adam_epsilon, args.max_steps = "adamw_torch", 1e-2, 2
        args.learning_rate, args.weight_decay, args.max_grad_norm = 0.05, 0.1, 0.05
    if method != "routed":
        # The backbone's own balance loss, which TRL would add, is measured process by process.
        args.router_aux_loss_coef = 0.0
    trainer = SFTTrainer(
        model=base_of(method, Path(folder)),
        args=args,
        train_dataset=Dataset.from_list([{"input_ids": row} for row in ids]),
        processing_class=tokenizer(),
        peft_config=config_of(method, scope),
    )
    moe_peft.attach(trainer)
    trainer.train()
    trainer.save_model(folder)
    if trainer.is_world_process_zero():
        facts = {
            "world": trainer.accelerator.num_processes,
            "type": str(trainer.accelerator.distributed_type),
            "sharded": any(type(p.data).__name__ == "DTensor" for p in trainer.model.parameters()),
            "log": next(entry for entry in trainer.state.log_history if "loss" in entry),
        }
        (Path(folder) / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpu()
    allow_tensor_parallelism_on_cpu()
    methods = sys.argv[2].split(",")
    for method in methods:
        for setting in sys.argv[3:]:
            AcceleratorState._reset_state(False)  # methods may split their models in other ways
            GradientState._reset_state()
            micro_batches, _, measured_on = setting.partition("-")
            target = Path(sys.argv[1], *([method] if len(methods) > 1 else []), setting)
            main(str(target), int(micro_batches), measured_on, method)
