"""What the tests of the training scripts share: a tiny base model with its tokenizer, data, and launches on CPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.tiny import padded_batch, tiny_llama

ROOT = Path(__file__).parents[2]
# Marks what the assistant says, so that a loss on it alone is possible.
TEMPLATE = """{% for message in messages %}{% if message['role'] == 'assistant' %}w4 {% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% else %}w5 {{ message['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}w4 {% endif %}"""  # noqa: E501
ADAPTER = {"moe_method": "routed", "moe_num_experts": 4, "moe_r": 2, "moe_router_aux_loss_coef": 0.05}
ON_CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "max_steps": 3,
    "logging_steps": 1,
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 3,
}


def make_tokenizer(extra: tuple[str, ...] = (), template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """Words w4 to w63 as tokens 4 to 63, and extra special tokens after them."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 64)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.add_tokens(list(extra), special_tokens=True)
    made.chat_template = template
    return made


def make_base(folder: Path, **overrides: Any) -> str:
    tiny_llama(**overrides).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def words(seed: int, count: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(8, 64, (count,), generator=generator).tolist())


def make_data(folder: Path, rows: list[dict]) -> str:
    """A folder that `load_dataset` reads, with the splits train and test."""
    folder.mkdir(parents=True)
    for split, part in (("train", rows[2:]), ("test", rows[:2])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return str(folder)


def write_run(folder: Path, **values: Any) -> Path:
    """The YAML file of a run; None leaves a key out."""
    folder.mkdir(parents=True, exist_ok=True)
    run = {**ON_CPU, **ADAPTER, "output_dir": str(folder / "out"), **values}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in run.items() if value is not None}))
    return path


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


def command(script: str, config: Path, *flags: str, launcher: tuple[str, ...] = ()) -> list[str]:
    start = [sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1", *launcher]
    return [*start, str(ROOT / f"train/{script}.py"), "--config", str(config), *flags]


def launch(script: str, config: Path, *flags: str, launcher: tuple[str, ...] = ()) -> str:
    """`accelerate launch` a script in the folder of its YAML file; what it printed."""
    result = subprocess.run(
        command(script, config, *flags, launcher=launcher),
        capture_output=True,
        text=True,
        cwd=config.parent,
        env=environment(config.parent),
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def run_here(script: str, config: Path, *flags: str) -> Any:
    """Run a script in this process; its trainer."""
    module = importlib.import_module(script)
    return module.main(*module.make_parser().parse_args_and_config(["--config", str(config), *flags]))


def log_entries(checkpoint: Path, key: str) -> list[float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(**padded_batch([7, 5], seed=4)).logits


def reloaded(base: str, adapter: Path, auto_class: Any = AutoModelForCausalLM, **fields: Any) -> torch.nn.Module:
    """The saved adapter on a fresh base model."""
    return PeftModel.from_pretrained(auto_class.from_pretrained(base, **fields), adapter)


def assert_trained(out: Path, num_tensors: int, steps: int = 3) -> None:
    """The router losses were measured in every step, and every tensor of the adapter moved after the first step."""
    losses = log_entries(out / f"checkpoint-{steps}", "moe/load_balancing")
    assert len(losses) == len(set(losses)) == steps
    first, last = (load_file(folder / "adapter_model.safetensors") for folder in (out / "checkpoint-1", out))
    assert first.keys() == last.keys() and len(last) == num_tensors
    assert not any(torch.equal(first[key], last[key]) for key in last)
