"""One call of a stack: what is made once for all its layers, and the cache before its tokens."""

from __future__ import annotations

import torch
from peft import get_peft_model

from moe_peft import PerftConfig
from moe_peft.forward.forward_pass import ForwardPass
from moe_peft.forward.joined_losses import ForwardLosses
from moe_peft.telemetry.functions import record
from moe_peft.types import LossScale
from tests.tiny import padded_batch, tiny_llama


def test_inputs_of_one_shape_share_one_context():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    known = ForwardPass(True, ForwardLosses(LossScale()), shape=(2, 3), attention_mask=mask)
    device = torch.device("cpu")
    assert known.tokens((2, 3), device) is known.tokens((2, 3), device)
    assert known.tokens((2, 3), device) is not known.tokens((6,), device)


def test_tokens_of_a_decoding_step_have_the_last_columns_of_the_mask():
    model = get_peft_model(tiny_llama(), PerftConfig(r=2)).eval()
    batch = padded_batch([4, 6], side="left")
    with torch.no_grad(), record(model) as routings:
        cache = model(**batch).past_key_values
        mask = torch.cat([batch["attention_mask"], torch.tensor([[1], [0]])], dim=1)
        model(input_ids=torch.tensor([[5], [0]]), attention_mask=mask, past_key_values=cache)
    for first, second in routings.values():
        assert first.valid.sum() == 10 and second.valid.tolist() == [True, False]
