"""A streamed merge is the merge in memory, bit for bit, and leaves everything else of the checkpoint as it is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from moe_peft import EsftConfig, ExpertLoraConfig, LoraMoeConfig, MoloraConfig, MovConfig, RoutedConfig
from moe_peft.tools import export_merged, load_without_base
from moe_peft.tools.checkpoint import Checkpoint
from moe_peft.tools.peak_memory import RESET
from tests.backbones.models import tiny_model
from tests.contract.cases import tiny_olmoe
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mixtral
from tests.tools.exported import BATCH, checkpoint, digest, logits, tensors, trained

SOME = EsftConfig(experts={"0": [1, 3], "1": [0]}, task_type="CAUSAL_LM")
CASES = {
    "olmoe-slices": (tiny_olmoe, SOME, torch.float32),
    "olmoe-pairs": (tiny_olmoe, ExpertLoraConfig(r=3, target_modules=["q_proj"]), torch.bfloat16),
    "mixtral-pairs": (tiny_mixtral, ExpertLoraConfig(r=3, experts={"1": [0, 2]}), torch.float32),
    "qwen3_moe-pairs": (lambda: tiny_model("qwen3_moe"), ExpertLoraConfig(r=3), torch.float32),
    "deepseek_v2-slices": (lambda: tiny_model("deepseek_v2"), SOME, torch.bfloat16),
    "gpt_oss-slices": (lambda: tiny_model("gpt_oss"), SOME, torch.float32),
    "llama-whole": (tiny_llama, MoloraConfig(num_experts=1, modules_to_save=["lm_head"]), torch.float32),
    "llama-scaled": (tiny_llama, MovConfig(num_experts=1), torch.float32),
    "gpt2": (tiny_gpt2, MoloraConfig(num_experts=1, target_modules=["c_attn"]), torch.float32),
}
# Reads checkpoints and adapters in a process that has only the stock packages.
STOCK = """
import sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "moe_peft":
            raise ImportError("no moe_peft here")
sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForCausalLM
for folder, batch in torch.load(sys.argv[1], weights_only=True):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        torch.save(model(**batch).logits, folder + "/logits.pt")
assert "moe_peft" not in sys.modules
"""


@pytest.mark.parametrize("case", CASES)
def test_the_output_is_the_merge_in_memory_to_the_last_bit(case, tmp_path):
    build, config, dtype = CASES[case]
    base = checkpoint(build().to(dtype), tmp_path / "base")
    model = trained(base, tmp_path / "adapter", config)
    before = digest(base), digest(tmp_path / "adapter")
    export_merged(load_without_base(tmp_path / "adapter"), base, tmp_path / "out")
    assert (digest(base), digest(tmp_path / "adapter")) == before
    model.merge_and_unload().save_pretrained(tmp_path / "memory", max_shard_size="30KB")
    found, expected, old = (tensors(tmp_path / name) for name in ("out", "memory", "base"))
    assert found.keys() == expected.keys() == old.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert any(not torch.equal(found[key], old[key]) for key in old)
    # Shards, index, tokenizer and settings are the base's own.
    after = digest(tmp_path / "out")
    assert after.keys() - {"README.md"} == before[0].keys()
    same = {name for name in before[0] if not name.endswith(".safetensors")}
    assert all(after[name] == before[0][name] for name in same) and "generation_config.json" in same


def test_stock_transformers_computes_the_same_where_this_package_is_not_installed(tmp_path):
    jobs, expected = [], []
    for case in ("deepseek_v2-slices", "olmoe-slices", "qwen3_moe-pairs", "mixtral-pairs"):
        build, config, _ = CASES[case]
        base = checkpoint(build(), tmp_path / case / "base")
        assert len(list(base.glob("*-of-*.safetensors"))) > 1
        expected.append(logits(trained(base, tmp_path / case / "adapter", config)))
        export_merged(load_without_base(tmp_path / case / "adapter"), base, tmp_path / case / "out")
        jobs.append((str(tmp_path / case / "out"), BATCH))
    torch.save(jobs, tmp_path / "jobs.pt")
    subprocess.run([sys.executable, "-c", STOCK, str(tmp_path / "jobs.pt")], check=True, capture_output=True)
    for (folder, _), own in zip(jobs, expected, strict=True):
        torch.testing.assert_close(torch.load(f"{folder}/logits.pt"), own, rtol=0, atol=2e-5)


def test_tied_embeddings_stay_one_tensor(tmp_path):
    base = checkpoint(tiny_llama(tie_word_embeddings=True), tmp_path / "base")
    config = MoloraConfig(num_experts=1, trainable_token_indices=[3, 4])
    model = trained(base, tmp_path / "adapter", config)
    export_merged(load_without_base(tmp_path / "adapter"), base, tmp_path / "out")
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=2e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_an_adapter_by_task_is_merged_for_one_of_its_tasks(tmp_path):
    base = checkpoint(tiny_llama(), tmp_path / "base")
    table = {"scorer": "task_table", "router": "dense", "num_experts": 3, "router_args": {"num_tasks": 2}}
    model = trained(base, tmp_path / "adapter", RoutedConfig(task_type="CAUSAL_LM", **table))
    shapes = load_without_base(tmp_path / "adapter")
    with pytest.raises(ValueError, match="cannot be merged"):
        export_merged(shapes, base, tmp_path / "out")
    export_merged(shapes, base, tmp_path / "out", task=1)
    with torch.no_grad():
        expected = model(**BATCH, task_type=torch.tensor([1, 1])).logits
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_logits_of_a_block_are_merged_at_the_places_that_follow_too(tmp_path):
    base = checkpoint(tiny_llama(), tmp_path / "base")
    config = RoutedConfig(scorer="layer_logits", router="dense", num_experts=3, router_scope="block")
    model = trained(base, tmp_path / "adapter", config)
    export_merged(load_without_base(tmp_path / "adapter"), base, tmp_path / "out")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, logits(model), rtol=0, atol=2e-5)


def test_one_fused_matrix_of_one_layer_is_in_memory_at_a_time(tmp_path, monkeypatch):
    base = checkpoint(tiny_model("qwen3_moe", num_hidden_layers=4), tmp_path / "base")
    trained(base, tmp_path / "adapter", ExpertLoraConfig(r=2))
    held, peak, read = [], [], Checkpoint.read

    def counting(self, name):
        held.append(tensor := read(self, name))
        peak.append(sum(own.nbytes for own in held))
        return tensor

    def forgetting(*args):
        held.clear()
        return merged(*args)

    merged = module_of(export_merged)._merged
    monkeypatch.setattr(Checkpoint, "read", counting)
    monkeypatch.setattr(module_of(export_merged), "_merged", forgetting)
    export_merged(load_without_base(tmp_path / "adapter"), base, tmp_path / "out")
    whole = sum(own.nbytes for own in tensors(base).values())
    assert 0 < max(peak) < whole / 4


BIG = """
import gc, json, sys, torch
from pathlib import Path
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from moe_peft import ExpertLoraConfig
from moe_peft.tools import export_merged, load_without_base
from moe_peft.tools.peak_memory import rise_of_memory
from tests.contract.cases import randomize
folder = Path(sys.argv[1])
sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 32, "num_hidden_layers": 24}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
config = Qwen3MoeConfig(**sizes, **heads)
model = AutoModelForCausalLM.from_config(config)
model.save_pretrained(folder / "base", max_shard_size="60MB")
whole = sum(own.nbytes for own in model.parameters())
fused = max(own.nbytes for own in model.parameters())
adapted = get_peft_model(model, ExpertLoraConfig(r=4))
randomize(adapted)
adapted.save_pretrained(folder / "adapter")
del model, adapted
gc.collect()
shapes = load_without_base(folder / "adapter", base=str(folder / "base"))
_, rise = rise_of_memory(lambda: export_merged(shapes, folder / "base", folder / "out"))
print(json.dumps({"rise": rise, "whole": whole, "fused": fused}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not RESET.exists(), reason="the system does not count resident memory")
def test_memory_rises_by_a_layer_and_not_by_the_model(tmp_path):
    done = subprocess.run([sys.executable, "-c", BIG, str(tmp_path)], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["whole"] > 550 * 2**20 and len(list((tmp_path / "out").glob("*.safetensors"))) > 8
    assert found["fused"] < found["rise"] < 60 * 2**20 + 6 * found["fused"] < found["whole"] / 3, found


def module_of(function):
    return sys.modules[function.__module__]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_no_folder(error, tmp_path, monkeypatch):
    base = checkpoint(tiny_olmoe(), tmp_path / "base")
    trained(base, tmp_path / "adapter", SOME)
    shapes, before = load_without_base(tmp_path / "adapter"), sorted(tmp_path.iterdir())

    def stops(*_):
        raise error

    monkeypatch.setattr(module_of(export_merged), "_merged", stops)
    with pytest.raises(error):
        export_merged(shapes, base, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(tmp_path):
    base = checkpoint(tiny_llama(), tmp_path / "base")
    trained(base, tmp_path / "routed", LoraMoeConfig(r=2, num_experts=2))
    trained(base, tmp_path / "one", MoloraConfig(num_experts=1))
    routed, one = load_without_base(tmp_path / "routed"), load_without_base(tmp_path / "one")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="depends on the input"):
        export_merged(routed, base, tmp_path / "out")
    with pytest.raises(ValueError, match="holds files"):
        export_merged(one, base, tmp_path / "routed")
    with pytest.raises(ValueError, match="safetensors"):
        export_merged(one, tmp_path / "nowhere", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_of_another_model_quantized_or_with_infinite_sums_is_refused(tmp_path):
    base = checkpoint(tiny_llama(), tmp_path / "base", shard="1GB")
    trained(base, tmp_path / "one", MoloraConfig(num_experts=1, target_modules=["up_proj"]))
    shapes = load_without_base(tmp_path / "one")
    other = checkpoint(tiny_llama(num_hidden_layers=1), tmp_path / "other")
    with pytest.raises(ValueError, match="of another model"):
        export_merged(shapes, other, tmp_path / "out")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    with pytest.raises(ValueError, match="quantized"):
        export_merged(shapes, other, tmp_path / "out")
    broken = tensors(base)
    broken["model.layers.1.mlp.up_proj.weight"].fill_(float("inf"))
    save_file(broken, base / "model.safetensors")
    with pytest.raises(ValueError, match="NaNs detected"):
        export_merged(shapes, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_module_that_is_tied_and_was_trained_in_full_is_refused(tmp_path):
    base = checkpoint(tiny_llama(tie_word_embeddings=True), tmp_path / "base")
    trained(base, tmp_path / "adapter", MoloraConfig(num_experts=1, modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="tie"):
        export_merged(load_without_base(tmp_path / "adapter"), base, tmp_path / "out")


def test_the_tokenizer_of_the_adapter_comes_along(tmp_path):
    base = checkpoint(tiny_llama(), tmp_path / "base")
    trained(base, tmp_path / "adapter", MoloraConfig(num_experts=1))
    (tmp_path / "adapter" / "tokenizer_config.json").write_text('{"of": "the adapter"}')
    export_merged(load_without_base(tmp_path / "adapter"), base, tmp_path / "out", tokenizer=tmp_path / "adapter")
    assert "of" in (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert "MoLORA" in (tmp_path / "out" / "README.md").read_text()
