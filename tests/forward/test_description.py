"""Which tokens of an input are valid, of which sample and in which group, as a call of a stack tells."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn

from moe_peft import LoraMoeConfig
from moe_peft.forward.forward_pass import ForwardPass
from moe_peft.forward.frames import frame_mask_of
from moe_peft.forward.group_columns import SampleGroups
from moe_peft.forward.joined_losses import ForwardLosses
from moe_peft.telemetry.functions import record
from moe_peft.types import LossScale
from tests.backbones.models import tiny_model
from tests.tiny import padded_batch

CPU = torch.device("cpu")
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def forward_pass(**inputs: torch.Tensor) -> ForwardPass:
    return ForwardPass(True, ForwardLosses(LossScale()), shape=(2, 5), attention_mask=MASK, **inputs)


def test_axes_of_length_one_do_not_hide_the_rows():
    known = forward_pass()
    expected = known.tokens((2, 5), CPU)
    for leading in ((2, 1, 5), (2, 5, 1), (1, 2, 5), (10,)):
        found = known.tokens(leading, CPU)
        assert torch.equal(found.valid, expected.valid) and torch.equal(found.sequences, expected.sequences)
        assert found.num_sequences == 2
    assert known.tokens((5, 3), CPU).valid is None and known.tokens((2, 4, 3), CPU).valid is None


def test_each_of_several_heads_has_the_mask_of_its_row():
    known = forward_pass()
    for leading, expected in (
        ((2, 3, 5), MASK[:, None].expand(2, 3, 5)),
        ((2, 5, 3), MASK[:, :, None].expand(2, 5, 3)),
    ):
        assert torch.equal(known.tokens(leading, CPU).valid, expected.reshape(-1).bool())
    unclear = known.tokens((2, 5, 5), CPU)
    assert unclear.valid is None and not unclear.padding_known
    assert ForwardPass(True, ForwardLosses(LossScale()), shape=(2, 5)).tokens((2, 5, 5), CPU).padding_known


def test_frames_of_samples_that_no_method_tells_are_not_known():
    mask = torch.tensor([[1] * 40, [1] * 20 + [0] * 20])
    stack = nn.Linear(2, 2)
    fields = {"attention_mask": mask, "module": stack, "frames": frame_mask_of(stack, mask)}
    known = ForwardPass(True, ForwardLosses(LossScale()), **fields)
    assert not known.tokens((2, 10), CPU).padding_known and not known.tokens((2, 50), CPU).padding_known
    # Relative positions of 40 frames are no tokens, and a vector for each row is not padded.
    assert known.tokens((2, 79), CPU).padding_known and known.tokens((2, 1), CPU).padding_known
    assert torch.equal(known.tokens((2, 40), CPU).valid, mask.reshape(-1).bool())


def test_sound_beside_text_has_a_mask_of_its_own():
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
    known = forward_pass(media_frames=frame_mask_of(nn.Linear(2, 2), mask))
    assert torch.equal(known.tokens((3, 6), CPU, "media").valid, mask.reshape(-1).bool())
    for leading in ((2, 6), (3, 5), (18,)):
        assert known.tokens(leading, CPU, "media").valid is None


def test_frames_of_clips_that_no_method_tells_are_not_known():
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
    known = forward_pass(media_frames=frame_mask_of(nn.Linear(2, 2), mask), media_mask=mask)
    assert not known.tokens((3, 12), CPU, "media").padding_known
    for leading in ((3, 6), (3, 1), (2, 12), (18,)):
        assert known.tokens(leading, CPU, "media").padding_known
    whole = forward_pass(media_frames=frame_mask_of(nn.Linear(2, 2), mask > -1), media_mask=mask > -1)
    assert whole.tokens((3, 12), CPU, "media").padding_known


def test_keys_and_values_of_one_shared_head_see_the_mask():
    model = get_peft_model(tiny_model("deepseek_v3"), LoraMoeConfig(num_experts=2, target_modules=["kv_b_proj"]))
    shapes = set()
    for name, module in model.named_modules():
        if name.endswith("kv_b_proj"):
            module.register_forward_pre_hook(lambda module, args: shapes.add(tuple(args[0].shape[:-1])))
    batch = padded_batch([3, 5])
    with record(model) as routings:
        model.train()(**batch)
    assert shapes == {(2, 1, 5)} and len(routings) == 2
    for (routing,) in routings.values():
        assert torch.equal(routing.valid.view(2, 5), batch["attention_mask"].bool())


def test_rows_of_images_have_no_mask_whatever_their_number():
    known = forward_pass(groups=SampleGroups(torch.tensor([0, 1])))
    for leading in ((2, 5), (2, 3), (10,), (7, 4)):
        found = known.tokens(leading, CPU, "media")
        assert found.valid is None and found.groups is None and found.loss_scale is not None
        assert found.num_sequences == (leading[0] if len(leading) == 2 else 1)
    assert known.tokens((2, 5), CPU).valid is not None


def test_tokens_of_one_modality_are_told_by_their_number():
    modalities = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 0, 0]])
    known = forward_pass(modalities=modalities, groups=SampleGroups(torch.tensor([3, 4])))
    text, media = known.tokens((6,), CPU), known.tokens((4,), CPU)
    assert text.valid.tolist() == [False, False, True, True, True, True]
    assert text.sequences.tolist() == [0, 0, 0, 1, 1, 1]
    assert media.valid.tolist() == [True] * 4 and media.sequences.tolist() == [0, 0, 1, 1]
    assert text.groups.tolist() == media.groups.tolist() == [3, 4]


def test_as_many_tokens_of_text_as_of_images_are_not_told_apart():
    known = ForwardPass(
        True, ForwardLosses(LossScale()), (1, 4), torch.tensor([[0, 1, 1, 1]]), modalities=torch.tensor([[0, 0, 1, 1]])
    )
    assert known.tokens((2,), CPU).valid is None
