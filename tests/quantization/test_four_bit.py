"""Packed parameters are read as what bitsandbytes unpacks, once per call, and move with their module."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import prepare_model_for_kbit_training
from torch import nn

from moe_peft.quantization.four_bit import BLOCK_SIZE, dequantize_on_read, four_bit_bytes, quantize

pytestmark = pytest.mark.bnb
functional = pytest.importorskip("bitsandbytes.functional")


class Stack(nn.Module):
    """Reads its weights once for every expert."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0)).to(dtype))
        self.down = nn.Parameter(torch.randn(3, 64, 16, generator=torch.Generator().manual_seed(1)).to(dtype))

    def forward(self, x, fails=None):
        total = sum((x @ self.up[e].T) @ self.down[e].T for e in range(3))
        if fails:
            raise fails("half way")
        return total


def packed(module, **kwargs):
    for name in ("up", "down"):
        dequantize_on_read(module, name, *quantize(getattr(module, name), **kwargs))
    return module


@pytest.mark.parametrize("kwargs", [{}, {"quant_type": "fp4"}, {"double_quant": True}, {"storage": torch.bfloat16}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_parameter_reads_as_the_library_unpacks_it(dtype, kwargs):
    plain, module = Stack(dtype), packed(Stack(dtype), **kwargs)
    for name in ("up", "down"):
        state = functional.quantize_4bit(
            getattr(plain, name).detach(),
            blocksize=BLOCK_SIZE,
            quant_type=kwargs.get("quant_type", "nf4"),
            compress_statistics=kwargs.get("double_quant", False),
        )
        getattr(plain, name).data = functional.dequantize_4bit(*state)
        assert torch.equal(getattr(module, name), getattr(plain, name))
    assert {p.dtype for p in module.parameters()} == {kwargs.get("storage", torch.uint8)}
    assert not any(p.requires_grad for p in module.parameters())
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    assert torch.equal(module(x), plain(x))
    module(x).sum().backward()
    assert x.grad is not None


def kept(module):
    return [own[0].kept for own in module.parametrizations.values() if own[0].kept is not None]


@pytest.fixture
def calls(monkeypatch):
    made, unpack = [], functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *args: (made.append(args), unpack(*args))[1])
    return made


def test_a_call_unpacks_each_parameter_once_and_keeps_nothing(calls):
    module, x = packed(Stack()), torch.randn(5, 64)
    module(x)
    assert len(calls) == 2 and not kept(module)
    with pytest.raises(RuntimeError, match="half way"):
        module(x, fails=RuntimeError)
    assert len(calls) == 4 and not kept(module)
    assert module.up is not module.up


def test_an_interrupted_call_leaves_other_modules_and_later_calls_alone(calls):
    module, other, x = packed(Stack()), packed(Stack()), torch.randn(5, 64)
    with pytest.raises(KeyboardInterrupt):
        module(x, fails=KeyboardInterrupt)
    assert other.up is not other.up and not kept(other)
    calls.clear()
    assert torch.equal(module(x), other(x))
    assert len(calls) == 4 and not kept(module)


def test_a_call_in_another_thread_does_not_end_what_this_one_keeps():
    module, x = packed(Stack()), torch.randn(5, 64)
    expected = module(x)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(out, expected) for out in pool.map(module, [x] * 64))
    assert not kept(module)


def test_packed_values_that_were_cast_are_refused():
    module = packed(Stack(), storage=torch.bfloat16)
    prepared = prepare_model_for_kbit_training(module, use_gradient_checkpointing=False)
    with pytest.raises(TypeError, match=r"stored as torch.bfloat16 were cast to torch.float32"):
        prepared(torch.randn(5, 64))


def test_a_copy_is_a_module_of_its_own():
    module = packed(Stack(), double_quant=True)
    twin, x = copy.deepcopy(module), torch.randn(5, 64)
    assert torch.equal(twin(x), module(x))
    twin.parametrizations.up.original.data.zero_()
    assert not torch.equal(twin(x), module(x))


def test_scales_are_moved_but_never_cast():
    module = packed(Stack())
    before = module(x := torch.randn(5, 64))
    state = module.parametrizations.up[0].quant_state
    module.half()
    assert state.absmax.dtype == torch.float32 and torch.equal(module(x), before)
    module.to("meta")
    assert state.absmax.device.type == state.code.device.type == "meta"


@pytest.mark.gpu
def test_a_packed_module_computes_where_it_is_moved():
    module, x = packed(Stack(), double_quant=True), torch.randn(5, 64)
    expected = module(x)
    torch.testing.assert_close(module.cuda()(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_size_counts_weights_and_scales(double_quant):
    tensor = torch.randn(8, 128, 64)
    parameter, state = quantize(tensor, double_quant=double_quant)
    scales = [state.absmax, state.state2.absmax] if double_quant else [state.absmax]
    assert four_bit_bytes(tensor.numel(), double_quant) == parameter.nbytes + sum(scale.nbytes for scale in scales)
