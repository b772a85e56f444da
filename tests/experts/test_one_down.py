"""What kinds with one down matrix share: dropout, the shared GEMM, compute dtypes, the start."""

from __future__ import annotations

import pytest
import torch

from moe_peft.experts.cp_diagonal import CpDiagonalExperts
from moe_peft.experts.latent_core import LatentCoreExperts
from moe_peft.experts.shared_down import SharedDownExperts
from moe_peft.types import TokenContext
from tests.compare import random_routing

from .bank import E, R, T, made

KINDS = (SharedDownExperts, CpDiagonalExperts, LatentCoreExperts)
TRAINING = TokenContext(training=True)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_on_the_input_in_training_and_not_on_what_routers_read(kind):
    bank, x, base = made(kind, lora_dropout=0.5)
    plain, _, _ = made(kind)
    torch.manual_seed(3)
    expected = plain(torch.nn.functional.dropout(x, 0.5), base, random_routing(T, E))
    torch.manual_seed(3)
    torch.testing.assert_close(bank(x, base, random_routing(T, E, context=TRAINING)), expected)
    h = bank.prepare(x, TRAINING)
    torch.testing.assert_close(bank.undropped(x, h, TRAINING), x @ bank.A.T)
    assert bank.undropped(x, h, TokenContext()) is h and bank.activations(h).shape == (T, 1, R)


@pytest.mark.parametrize("kind", KINDS)
def test_a_16_bit_input_beside_a_float32_base_gives_float32(kind):
    bank, x, base = made(kind)
    out = bank.float()(x.detach().bfloat16(), base.float(), random_routing(T, E, 2))
    assert out.dtype == torch.float32
    torch.testing.assert_close(
        out, bank(x.detach().float(), base.float(), random_routing(T, E, 2)), rtol=0.1, atol=0.1
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init_weights", [True, "gaussian"])
def test_fresh_bank_is_the_identity_bit_for_bit(kind, init_weights):
    bank, x, base = made(kind, init_weights=init_weights)
    assert torch.equal(bank(x, base, random_routing(T, E)), base) and bank.A.abs().max() > 0
