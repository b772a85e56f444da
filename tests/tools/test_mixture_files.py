"""Mixtures of other trainers compute here what their equations say, or are refused with what can be done instead."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moe_peft.tools import import_mixture
from tests.tiny import FFN, HIDDEN, LAYERS, tiny_llama
from tests.tools.exported import logits

E, R, K, SCALE = 3, 2, 2, 4.0
FFN_NAMES = ("gate_proj", "up_proj", "down_proj")
WIDTHS = {"gate_proj": (HIDDEN, FFN), "up_proj": (HIDDEN, FFN), "down_proj": (FFN, HIDDEN), "q_proj": (HIDDEN, HIDDEN)}


def pair(name):
    width, out = WIDTHS[name]
    return torch.randn(R, width) * 0.2, torch.randn(out, R) * 0.2


def weights_of(x, gate, k):
    probs = (x @ gate.T).softmax(-1)
    if k is None:
        return probs
    values, index = probs.topk(k, dim=-1)
    return torch.zeros_like(probs).scatter(-1, index, values / values.sum(-1, keepdim=True))


class Linears(nn.Module):
    """A linear layer with a mixture of LoRAs, expert by expert."""

    def __init__(self, base, gate, pairs, k):
        super().__init__()
        self.base, self.gate, self.pairs, self.k = base, gate, pairs, k

    def forward(self, x):
        weights = torch.ones(*x.shape[:-1], 1) if self.gate is None else weights_of(x, self.gate, self.k)
        added = [weights[..., e, None] * SCALE * (x @ A.T @ B.T) for e, (A, B) in enumerate(self.pairs)]
        return self.base(x) + sum(added)


class Ffns(nn.Module):
    """A sum of whole FFNs with LoRA on their matrices."""

    def __init__(self, base, gate, pairs):
        super().__init__()
        self.base, self.gate, self.pairs = base, gate, pairs

    def matrix(self, name, x, expert):
        A, B = self.pairs[name][expert]
        return getattr(self.base, name)(x) + SCALE * (x @ A.T @ B.T)

    def forward(self, x):
        weights, out = weights_of(x, self.gate, K), 0
        for e in range(E):
            v = self.base.act_fn(self.matrix("gate_proj", x, e)) * self.matrix("up_proj", x, e)
            out = out + weights[..., e, None] * self.matrix("down_proj", v, e)
        return out


def written(folder, kind, tensors, suffix="safetensors", **fields):
    folder.mkdir()
    own = {"peft_type": kind.upper(), "routing_strategy": kind, "num_experts": E, "r": R, "lora_alpha": SCALE * R}
    (folder / "adapter_config.json").write_text(json.dumps({**own, "top_k": K, "task_type": "CAUSAL_LM", **fields}))
    path = folder / f"adapter_model.{suffix}"
    if suffix == "bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return folder


@pytest.mark.parametrize("kind", ["mola", "loramoe"])
def test_routed_linear_layers_compute_what_their_trainers_do(kind, tmp_path):
    torch.manual_seed(0)
    expected, tensors = tiny_llama(), {}
    routed = ("q_proj", "up_proj") if kind == "mola" else ("up_proj", "down_proj")
    for layer in range(LAYERS):
        own = expected.model.layers[layer]
        for name in (*routed, "q_proj"):
            part = "self_attn" if name == "q_proj" else "mlp"
            key, module = f"{kind}.layers.{layer}.{part}.{name}", getattr(own, part)
            if name not in routed:
                pairs, gate = [pair(name)], None
                tensors |= {f"{key}.lora_A.weight": pairs[0][0], f"{key}.lora_B.weight": pairs[0][1]}
            elif f"{key}.moe_gate.weight" not in tensors:
                pairs, gate = [pair(name) for _ in range(E)], torch.randn(E, WIDTHS[name][0])
                tensors[f"{key}.moe_gate.weight"] = gate
                for e, (A, B) in enumerate(pairs):
                    tensors |= {f"{key}.experts.{e}.lora_A.weight": A, f"{key}.experts.{e}.lora_B.weight": B}
            else:
                continue
            setattr(module, name, Linears(getattr(module, name), gate, pairs, K if kind == "mola" else None))
    model = import_mixture(tiny_llama(), written(tmp_path / kind, kind, tensors))
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize("newer", [True, False])
def test_ffns_as_experts_compute_what_their_trainer_does(newer, tmp_path):
    torch.manual_seed(0)
    expected, tensors = tiny_llama(), {}
    for layer in range(LAYERS):
        own, head = expected.model.layers[layer], f"mixlora.layers.{layer}"
        gate, pairs = torch.randn(E, HIDDEN), {name: [pair(name) for _ in range(E)] for name in FFN_NAMES}
        tensors[f"{head}.gate.weight" if newer else f"{head}.mlp.moe_gate.weight"] = gate
        for name, experts in pairs.items():
            for e, (A, B) in enumerate(experts):
                key = f"{head}.experts.{e}.{name}" if newer else f"{head}.mlp.{name}.experts.{e}"
                tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
        A, B = pair("q_proj")
        tensors |= {f"{head}.self_attn.q_proj.lora_A.weight": A, f"{head}.self_attn.q_proj.lora_B.weight": B}
        own.self_attn.q_proj = Linears(own.self_attn.q_proj, None, [(A, B)], None)
        own.mlp = Ffns(own.mlp, gate, pairs)
    model = import_mixture(tiny_llama(), written(tmp_path / "mix", "mixlora", tensors, "bin"), "mix")
    assert model.active_adapters == ["mix", "mix_attention"]
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("xlora", {"adapters": {"a": "folder"}}, r"compose\(base"),
        ("adapter", {}, "can be read"),
        ("mola", {"use_dora": True}, "use_dora=True"),
        ("mixlora", {"jitter_noise": 0.1}, "jitter_noise=0.1"),
        ("mola", {"r": None}, "r=None"),
        ("mola", {}, "no router and no pair"),
    ],
)
def test_what_has_no_equal_says_what_can_be_done(kind, fields, message, tmp_path):
    base = tiny_llama()
    folder = written(tmp_path / "own", kind, {"classifier.weight": torch.ones(2)}, **fields)
    with pytest.raises(ValueError, match=message):
        import_mixture(base, folder)
    assert not hasattr(base, "peft_config")


def test_a_file_of_another_model_or_without_tensors_is_refused(tmp_path):
    key = "mola.layers.9.mlp.up_proj.experts.0.lora_A.weight"
    with pytest.raises(ValueError, match="of another model"):
        import_mixture(tiny_llama(), written(tmp_path / "own", "mola", {key: torch.ones(2, 2)}))
    (tmp_path / "own" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither"):
        import_mixture(tiny_llama(), tmp_path / "own")


@pytest.mark.parametrize("broken", ["lost", "nan", "shape", "gate", "no gate"])
def test_a_file_that_is_not_whole_or_not_finite_leaves_the_model_as_it_was(broken, tmp_path):
    tensors = {}
    for e in range(E):
        key = f"mola.layers.0.self_attn.q_proj.experts.{e}.lora_"
        A, B = pair("q_proj")
        tensors |= {f"{key}A.weight": A, f"{key}B.weight": B}
    gate = "mola.layers.0.self_attn.q_proj.moe_gate.weight"
    tensors[gate] = torch.randn(E, HIDDEN)
    last = f"mola.layers.0.self_attn.q_proj.experts.{E - 1}.lora_B.weight"
    changed = {
        "lost": {**tensors, last: None},
        "nan": {**tensors, last: tensors[last] * float("nan")},
        "shape": {**tensors, last: tensors[last][1:]},
        "gate": {**tensors, gate: tensors[gate] * float("inf")},
        "no gate": {**tensors, gate: None},
    }[broken]
    base = tiny_llama()
    before = [name for name, _ in base.named_modules()]
    kept = {key: own.contiguous() for key, own in changed.items() if own is not None}
    with pytest.raises(ValueError, match=r"Nothing has been changed\."):
        import_mixture(base, written(tmp_path / "own", "mola", kept))
    assert [name for name, _ in base.named_modules()] == before and not hasattr(base, "peft_config")
