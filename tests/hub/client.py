"""A process that talks to the local Hub: Hugging Face libraries read HF_ENDPOINT and the cache when they are imported.

Run as a script, it takes one call per line of its input, as JSON, and prints what the call returned or raised.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.hub.server import LocalHub

ROOT = Path(__file__).parents[2]
MARK = "result of the call: "


def environment(hub: LocalHub, home: Path, token: str | None = None) -> dict[str, str]:
    """Variables of a process that knows no Hub but the local one and starts with an empty cache."""
    home.mkdir(parents=True, exist_ok=True)
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    variables |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(home)}
    return variables if token is None else {**variables, "HF_TOKEN": token}


class Failed(Exception):
    """What a call raised in the other process."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


class Client:
    """Runs functions of this file in the other process; a context manager."""

    def __init__(self, hub: LocalHub, home: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub.client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(hub, home),
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait(30)

    def call(self, action: str, /, **arguments: Any) -> Any:
        self.process.stdin.write(json.dumps([action, arguments]) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                answer = json.loads(line.removeprefix(MARK))
                if "error" in answer:
                    raise Failed(*answer["error"])
                return answer["value"]
        raise AssertionError("the client process ended")


def push_base(name: str, token: str) -> None:
    from tests.tiny import tiny_llama

    tiny_llama().push_to_hub(name, token=token)


def upload(folder: str, name: str, token: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path=folder)


def adapted(base: str):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from moe_peft import LoraMoeConfig

    config = LoraMoeConfig(task_type="CAUSAL_LM", num_experts=3, init_weights=False)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()


def save_logits(model: Any, path: str) -> None:
    import torch

    with torch.no_grad():
        torch.save(model.eval()(torch.arange(3, 13)[None]).logits, path)


def push_model(base: str, name: str, logits: str, **arguments: Any) -> str:
    from moe_peft import push_adapter

    model = adapted(base)
    save_logits(model, logits)
    return push_adapter(model, name, **arguments).commit_url


def push_stock(base: str, name: str, token: str) -> None:
    adapted(base).push_to_hub(name, token=token)


def push_folder(folder: str, name: str, **arguments: Any) -> str:
    from moe_peft import push_adapter

    return push_adapter(folder, name, **arguments).commit_url


def load(way: str, base: str, name: str, logits: str) -> None:
    """Load an adapter the given way and save its logits."""
    import peft
    from transformers import AutoModelForCausalLM

    import moe_peft  # noqa: F401

    if way == "PeftModel":
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), name)
    elif way == "AutoPeftModel":
        model = peft.AutoPeftModelForCausalLM.from_pretrained(name)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
        model.load_adapter(name)
    save_logits(model, logits)


def run_example(example: str, logits: str) -> None:
    names: dict[str, Any] = {}
    exec(example, names)
    save_logits(names["model"], logits)


def main() -> None:
    for line in sys.stdin:
        action, arguments = json.loads(line)
        try:
            answer = {"value": globals()[action](**arguments)}
        except Exception as error:
            answer = {"error": [type(error).__name__, str(error)]}
        print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
