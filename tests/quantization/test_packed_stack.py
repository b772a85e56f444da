"""Matrices of 4-bit experts are dequantized one by one to the same bits as all at once, and never kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.bnb

from moe_peft.ops.expert_lora import dense_expert_lora, expert_lora  # noqa: E402
from moe_peft.ops.expert_stacks import AdaptedMatrix, FusedExperts, LowRankPairs, PlainStack  # noqa: E402
from moe_peft.quantization.four_bit import dequantize_on_read, quantize  # noqa: E402
from moe_peft.quantization.packed_stack import PackedStack, packed_stack  # noqa: E402
from tests.compare import gradients  # noqa: E402
from tests.ops.fused import joined  # noqa: E402


def module_with(shape, dtype=torch.float32, **how) -> nn.Module:
    module = nn.Module()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    dequantize_on_read(module, "weight", *quantize(weight, **how))
    return module


@pytest.mark.parametrize("shape", [(4, 16, 8), (3, 5, 7), (5, 12, 10), (2, 3, 3), (1, 3, 5)])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_every_matrix_has_the_bits_of_the_whole_stack(shape, double_quant, quant_type, storage):
    if storage == torch.bfloat16 and torch.Size(shape).numel() % 4:
        pytest.skip("bitsandbytes packs no odd bytes into two")
    module = module_with(shape, double_quant=double_quant, quant_type=quant_type, storage=storage)
    whole = module.weight
    for transposed in (False, True):
        stack = packed_stack(module, "weight", is_transposed=transposed)
        assert (stack.num_experts, stack.dtype, stack.packed) == (shape[0], torch.float32, True)
        expected = whole if transposed else whole.transpose(1, 2)
        assert all(torch.equal(stack.matrix(expert), expected[expert]) for expert in range(shape[0]))
        assert torch.equal(stack.matrices(), expected)


def test_matrices_have_the_dtype_that_was_quantized():
    stack = packed_stack(module_with((4, 16, 8), torch.bfloat16), "weight", is_transposed=False)
    assert stack.dtype == stack.matrix(0).dtype == torch.bfloat16


def test_other_forms_are_no_packed_stack():
    module = nn.Linear(4, 4)
    assert packed_stack(module, "weight", is_transposed=False) is None
    nn.utils.parametrizations.orthogonal(module)
    assert packed_stack(module, "weight", is_transposed=False) is None


def test_cast_values_are_refused_with_what_was_cast():
    module = module_with((4, 16, 8), storage=torch.bfloat16)
    module.parametrizations.weight.original.data = module.parametrizations.weight.original.data.float()
    with pytest.raises(TypeError, match="bnb_4bit_quant_storage"):
        packed_stack(module, "weight", is_transposed=False)


def experts(packed: bool):
    """Experts of 8 x (2 * 16) and 16 x 8 in 4 bits, or the same dequantized; and their factors."""
    generator = torch.Generator().manual_seed(1)
    leaves, matrices = [], []
    for shape in ((6, 32, 8), (6, 8, 16)):
        module = module_with(shape)
        A = torch.randn(6, 3, shape[2], generator=generator).requires_grad_()
        B = torch.randn(6, 3, shape[1], generator=generator).requires_grad_()
        own = packed_stack(module, "weight", is_transposed=False)
        stack = own if packed else PlainStack(module.weight.detach(), is_transposed=False)
        matrices.append(AdaptedMatrix(stack, None, (LowRankPairs(A, B, 0.5),)))
        leaves += [A, B]
    return FusedExperts(*matrices, gate=joined), leaves


@pytest.mark.parametrize(("num_tokens", "grad"), [(1, False), (1, True), (29, True), (29, False)])
def test_the_pass_equals_the_definition_on_dequantized_experts(num_tokens, grad):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(num_tokens, 8, generator=generator).requires_grad_()
    index = torch.rand(num_tokens, 6, generator=generator).topk(2).indices
    weights = torch.rand(num_tokens, 2, generator=generator)
    (four_bit, leaves), (plain, twins) = experts(True), experts(False)
    with torch.set_grad_enabled(grad):
        actual = expert_lora(four_bit, x, index, weights)
        torch.testing.assert_close(actual, dense_expert_lora(plain, x, index, weights), rtol=1e-4, atol=1e-4)
    if grad:
        expected = dense_expert_lora(plain, x, index, weights)
        for got, wanted in zip(gradients(actual, [x, *leaves]), gradients(expected, [x, *twins]), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_training_keeps_no_dequantized_matrix_and_reads_only_those_in_use(monkeypatch):
    four_bit, leaves = experts(True)
    x, index, weights = torch.randn(4, 8).requires_grad_(), torch.tensor([[0, 3]] * 4), torch.rand(4, 2)
    read, matrix = [], PackedStack.matrix
    monkeypatch.setattr(PackedStack, "matrix", lambda self, expert: (read.append(expert), matrix(self, expert))[1])
    own = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = expert_lora(four_bit, x, index, weights)
    assert read == [0, 3, 0, 3]
    assert max(kept) <= 8 * 32  # rows of the gate, not 6 matrices
    out.sum().backward()
    assert sorted(read) == [0] * 4 + [3] * 4
