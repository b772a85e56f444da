"""`moe-peft run` runs a module or a script as python would, with the adapter types registered."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

import moe_peft
from moe_peft.cli import main
from tests.docs.pages import DOCS, programs
from tests.train.tiny_run import make_base, words

SCRIPT = """import sys, peft, beside
print(sys.argv[1:], __name__, beside.WORD, peft.PeftType.ROUTED in peft.PEFT_TYPE_TO_CONFIG_MAPPING)
raise SystemExit(int(sys.argv[1]))
"""


def test_a_script_gets_its_words_its_folder_and_the_adapter_types(tmp_path, capsys):
    (tmp_path / "tool.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("WORD = 'here'\n")
    before = sys.argv, list(sys.path)
    assert main(["run", str(tmp_path / "tool.py"), "3", "--flag"]) == 3
    assert capsys.readouterr().out == "['3', '--flag'] __main__ here True\n"
    assert (sys.argv, sys.path) == before


def test_a_module_is_run_from_the_working_directory(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_tool_of_ones_own.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    assert main(["run", "-m", "a_tool_of_ones_own", "--model", "x"]) == 0
    assert capsys.readouterr().out == "__main__ ['--model', 'x']\n"


def test_an_error_of_the_tool_keeps_its_traceback(tmp_path, capsys):
    (tmp_path / "tool.py").write_text("raise ValueError('of the tool')\n")
    assert main(["run", str(tmp_path / "tool.py")]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "ValueError: of the tool" in printed


def test_what_is_not_there_is_one_line(capsys):
    assert main(["run", "nowhere.py"]) == 1
    assert "there is no such script. For an installed tool write -m" in capsys.readouterr().err
    assert main(["run", "-m", "no_module_of_this_name.at_all"]) == 1
    assert "there is no module of that name" in capsys.readouterr().err


def random_adapter(folder):
    """A base model and an adapter on it whose weights say something."""
    base = make_base(folder / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), moe_peft.MoloraConfig(task_type="CAUSAL_LM", num_experts=4, r=4)
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "adapter")
    return base, str(folder / "adapter")


@torch.no_grad()
def test_the_server_of_transformers_finds_an_adapter_in_the_folder_of_its_base(tmp_path):
    """It asks the folder's configuration for a class, and that class for the model of the folder."""
    base, adapter = random_adapter(tmp_path)
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    expected.save_pretrained(base)
    config = AutoConfig.from_pretrained(base)
    served = getattr(transformers, config.architectures[0]).from_pretrained(base, device_map="cpu").eval()
    inputs = AutoTokenizer.from_pretrained(base)(words(1, 6), return_tensors="pt")
    assert torch.equal(served(**inputs).logits, expected(**inputs).logits)
    with expected.disable_adapter():
        assert not torch.equal(served(**inputs).logits, expected(**inputs).logits)


def posted(address, content):
    """What a server answers to JSON, as text."""
    request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


@contextmanager
def served(command, folder):
    """The address of a server that the page's command starts, once it answers; stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name, *given = shlex.split(command)
    assert name == "moe-peft"
    given += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moe_peft", *given], cwd=folder, env=environment, stdout=log, stderr=log
        )
    try:
        until = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                waiting = server.poll() is None and time.monotonic() < until
                assert waiting, (folder / "log").read_text()[-3000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="transformers[serving] is not installed")
def test_the_server_of_transformers_answers_as_generate_does(tmp_path):
    """The command of the page on deployment, over HTTP: whole answers and streamed ones."""
    base, adapter = random_adapter(tmp_path)
    folder = tmp_path / "outputs/served"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    model.save_pretrained(folder)
    (command,) = [own.strip() for own in programs(DOCS / "deploy.md", "bash") if " serve " in own]
    chats = [[{"role": "user", "content": words(seed, 3 + seed)}] for seed in range(2)]
    settings = {"max_new_tokens": 12, "do_sample": False}

    def answer(chat):
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        return tokenizer.decode(made, skip_special_tokens=True)

    expected = [answer(chat) for chat in chats]
    with model.disable_adapter():
        assert all(answer(chat) != own for chat, own in zip(chats, expected, strict=True))
    with served(command, tmp_path) as address:
        for chat, own in zip(chats, expected, strict=True):
            content = {"model": "outputs/served", "messages": chat, "temperature": 0, "max_tokens": 12}
            whole = json.loads(posted(f"{address}/v1/chat/completions", content))
            assert whole["choices"][0]["message"]["content"] == own
            lines = posted(f"{address}/v1/chat/completions", {**content, "stream": True}).splitlines()
            parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert "".join(part["choices"][0]["delta"].get("content") or "" for part in parts) == own


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_the_task_of_the_page_on_evaluation_measures_the_adapted_model(tmp_path):
    base, adapter = random_adapter(tmp_path)
    rows = [{"question": words(i, 5), "choices": [f"w{9 + i}", f"w{30 + i}"], "answer": i % 2} for i in range(4)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (task,) = programs(DOCS / "evaluate.md", "yaml")
    (tmp_path / "tasks/capitals.yaml").write_text(task)
    (command,) = [own for own in programs(DOCS / "evaluate.md", "bash") if "--include_path" in own]
    command = command.replace("Qwen/Qwen3-0.6B", base).replace("outputs/capitals", adapter)
    name, *given = shlex.split(command.replace("\\\n", " "))
    assert name == "moe-peft"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, "-m", "moe_peft", *given], **options)
    assert done.returncode == 0 and "|capitals|" in done.stdout, done.stderr[-3000:]
    (log,) = (tmp_path / "outputs/lm_eval").rglob("samples_capitals_*.jsonl")
    tokenizer, fresh = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(fresh, adapter).eval()
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(samples) == len(rows)
    for sample in samples:
        row = sample["doc"]
        with torch.no_grad():
            inputs = tokenizer(row["question"], return_tensors="pt")
            scores = model(**inputs).logits[0, -1].log_softmax(-1)
        for choice, ((found, _),) in zip(row["choices"], sample["resps"], strict=True):
            assert float(found) == pytest.approx(scores[tokenizer.convert_tokens_to_ids(choice)].item(), abs=1e-4)
