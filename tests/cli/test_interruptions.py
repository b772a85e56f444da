"""Ctrl-C at any write of any verb that makes files leaves no half folder, and every input as it was."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from moe_peft import EsftConfig, ExpertLoraConfig, MoloraConfig, RoutedConfig
from moe_peft.cli import main
from moe_peft.cli.errors import INTERRUPTED
from moe_peft.tools import compress_adapter, export_esft
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_llama
from tests.tools.exported import checkpoint, digest, trained, trained_lora

OUT = "out"
# What is made, as words after `moe-peft`; names of folders and files are those of `folder`.
VERBS = {
    "export --to lora": ["export", "one", "--to", "lora"],
    "export --average": ["export", "one", "--to", "lora", "--average"],
    "export --to merged": ["export", "one", "--to", "merged"],
    "export --to experts, slices": ["export", "slices", "--to", "experts"],
    "export --to experts, pairs": ["export", "pairs", "--to", "experts"],
    "import": ["import", "authors", "--base", "sparse"],
    "compose": ["compose", "law", "tax", "--base", "dense"],
    "compose --choose": ["compose", "law", "tax", "--base", "dense", "--choose", "1", "--texts", "texts"],
    "upcycle": ["upcycle", "law", "--num_experts", "2", "--base", "dense"],
    "add-expert": ["add-expert", "routed", "--copy_of", "1"],
    "prune": ["prune", "routed", "--keep", "1", "--texts", "texts"],
    "distil": ["distil", "routed", "--texts", "texts", "--rank", "2", "--steps", "1"],
    "compress": ["compress", "routed", "--from_zero"],
    "decompress": ["decompress", "small"],
    "report": ["report", "--adapter", "routed", "--data", "rows.jsonl"],
}
QUICK = ("import", "export --to experts, slices", "export --to experts, pairs", "report")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class CtrlC:
    """Raises KeyboardInterrupt at the n-th write below a folder: a file opened for it, a folder made, a rename."""

    folder: str | None = None
    left = 0

    def audit(self, event: str, arguments: tuple) -> None:
        if self.folder is None or event not in ("open", "os.mkdir", "os.rename"):
            return
        writes = event != "open" or (isinstance(arguments[2], int) and bool(arguments[2] & WRITING))
        if writes and isinstance(arguments[0], (str, os.PathLike)) and str(arguments[0]).startswith(self.folder):
            self.left -= 1
            if self.left == 0:
                self.folder = None  # cleaning up is not interrupted again
                raise KeyboardInterrupt

    def during(self, words: list[str], folder: Path, number: int) -> int:
        """Exit code of a command that is interrupted at its n-th write, where it has as many."""
        self.folder, self.left = str(folder), number
        try:
            return main(words)
        finally:
            self.folder = None


CTRL_C = CtrlC()
sys.addaudithook(CTRL_C.audit)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, adapters and texts that the verbs read."""
    own = tmp_path_factory.mktemp("interrupted")
    dense, sparse = checkpoint(tiny_llama(), own / "dense"), checkpoint(tiny_olmoe(), own / "sparse")
    trained(dense, own / "one", MoloraConfig(num_experts=1, r=2, task_type="CAUSAL_LM"))
    trained(dense, own / "routed", RoutedConfig(num_experts=2, r=2, task_type="CAUSAL_LM"))
    trained(sparse, own / "pairs", ExpertLoraConfig(r=2, task_type="CAUSAL_LM"))
    slices = trained(sparse, own / "slices", EsftConfig(experts={"1": [0, 2]}, task_type="CAUSAL_LM"))
    export_esft(slices, own / "authors")
    compress_adapter(own / "routed", own / "small")
    for seed, name in enumerate(("law", "tax")):
        trained_lora(own / name, seed)
    (own / "texts").write_text("w3 w4 w5\nw6 w7 w8 w9\n")
    (own / "rows.jsonl").write_text(json.dumps({"text": "w3 w4 w5"}) + "\n")
    return own


def command(verb: str, folder: Path) -> list[str]:
    words = [str(folder / word) if (folder / word).exists() else word for word in VERBS[verb]]
    return [*words, "--output", str(folder / OUT)]


def all_of(folder: Path) -> tuple[list[Path], dict[str, str]]:
    return sorted(folder.rglob("*")), digest(folder)


@pytest.mark.parametrize("verb", QUICK)
def test_a_verb_that_is_interrupted_at_a_write_leaves_nothing(verb, folder):
    before = all_of(folder)
    for number in (2, 3):
        assert CTRL_C.during(command(verb, folder), folder, number) == INTERRUPTED
        assert all_of(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_is_interrupted_at_any_write_leaves_nothing(verb, folder):
    before, number = all_of(folder), 1
    while CTRL_C.during(command(verb, folder), folder, number) == INTERRUPTED:
        assert all_of(folder) == before, number
        number += 1
    assert number > 3 and (folder / OUT).is_dir()
    shutil.rmtree(folder / OUT)
    assert all_of(folder) == before
