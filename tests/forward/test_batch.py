"""What a batch says about its tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from moe_peft.forward.batch import (
    CACHES,
    batch_shape,
    further_inputs,
    mask_of,
    named_inputs,
    number_segments,
    prompt_of,
    segments_of,
)


class Model(nn.Module):
    def forward(self, input_ids, attention_mask=None, **kwargs):
        return input_ids


def test_positional_arguments_get_their_names():
    ids, mask = torch.ones(2, 3), torch.zeros(2, 3)
    named = named_inputs(Model(), (ids, mask), {"extra": 1})
    assert named["input_ids"] is ids and named["attention_mask"] is mask and named["extra"] == 1


def test_shape_comes_from_ids_or_embeddings():
    assert batch_shape({"input_ids": torch.ones(2, 3)}) == (2, 3)
    assert batch_shape({"inputs_embeds": torch.ones(2, 3, 4)}) == (2, 3)
    assert batch_shape({"pixel_values": torch.ones(2, 3, 4, 4)}) is None


def test_ids_of_codebooks_are_rows_of_one_sample():
    ids, mask, states = torch.ones(8, 3), torch.ones(2, 3), torch.ones(2, 5, 4)
    assert batch_shape({"input_ids": ids, "attention_mask": mask}) == (2, 3)
    assert batch_shape({"input_ids": ids, "encoder_hidden_states": states}) == (2, 3)
    for others in ({"attention_mask": torch.ones(3, 3)}, {"attention_mask": torch.ones(2, 7)}, {}):
        assert batch_shape({"input_ids": ids, **others}) == (8, 3)


@pytest.mark.parametrize(("start", "padding", "end"), [(0, 0, 1), (2, 1, 2), (2, 1, [2, 9])])
def test_a_decoder_whose_labels_are_kept_back_is_padded_behind_its_last_tokens(start, padding, end):
    eos = end[0] if isinstance(end, list) else end
    labels = torch.tensor([[5, 6, 7, eos], [5, 6, eos, -100], [5, eos, -100, -100], [eos, -100, -100, -100]])
    ids = torch.cat([torch.full((4, 1), start), labels[:, :-1]], 1).masked_fill(labels.roll(1, 1) == -100, padding)
    ids[:, 0] = start
    states = {"encoder_hidden_states": torch.ones(4, 2, 2)}
    config = SimpleNamespace(pad_token_id=padding, eos_token_id=end)
    expected = mask_of(states, {"labels": labels}, (4, 4), config)
    found = mask_of({**states, "input_ids": ids}, {}, (4, 4), config)
    assert torch.equal(found, expected) and expected.sum(1).tolist() == [4, 3, 2, 1]
    assert mask_of({**states, "input_ids": ids}, {}, (4, 4)) is None
    assert mask_of({**states, "input_ids": ids}, {}, (2, 4), config) is None
    assert mask_of({"input_ids": ids}, {}, (4, 4), config) is None


def test_a_decoder_without_a_mask_is_padded_behind_its_last_labels():
    labels = torch.tensor([[5, -100, 6, -100], [-100, 3, 4, 5], [-100, -100, -100, -100]])
    decoder, whole = {"encoder_hidden_states": torch.ones(3, 2, 2)}, {"labels": labels}
    expected = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    assert torch.equal(mask_of(decoder, whole, (3, 4)), expected)
    given = torch.ones(3, 4)
    assert mask_of({**decoder, "attention_mask": given}, whole, (3, 4)) is given
    assert mask_of(decoder, {**whole, "decoder_attention_mask": given}, (3, 4)) is given
    assert mask_of(decoder, {**whole, "decoder_attention_mask": given}, (3, 5)) is None
    assert mask_of(decoder, whole, (3, 5)) is None and mask_of(decoder, {"labels": labels.float()}, (3, 4)) is None
    # A stack that attends to no encoder may have a mask of another kind, or none.
    assert mask_of({}, whole, (3, 4)) is None


def test_positions_that_restart_start_a_document_unless_a_mask_says_the_row_is_padded():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    sequences, count = number_segments(segments_of({"position_ids": positions}))
    assert sequences.tolist() == [0, 0, 0, 1, 1, 2] and count == 3
    assert segments_of({"position_ids": positions, "attention_mask": torch.ones(1, 6)}) is None
    assert segments_of({}) is None


def test_documents_of_all_rows_are_numbered_one_after_the_other():
    sequences, count = number_segments(torch.tensor([[0, 0, 1], [0, 1, 1]]))
    assert sequences.tolist() == [0, 0, 1, 2, 3, 3] and count == 4


def test_positions_of_text_beside_those_in_images_tell_the_documents():
    text = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    in_images = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 1, 1, 1]])
    positions = torch.stack([text, in_images, in_images, in_images])
    assert segments_of({"position_ids": positions}).tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]
    assert segments_of({"position_ids": positions[1:]}) is None


def test_the_prompt_is_the_first_token_and_what_stands_before_the_first_label():
    labels = torch.tensor([[-100, -100, 7, -100, 8], [5, 6, 7, 8, 9], [-100, 4, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    expected = [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert prompt_of(labels, mask, None).int().tolist() == expected
    assert prompt_of(labels, None, None).int().tolist() == [*expected[:2], [1, 0, 0, 0, 0]]


def test_each_packed_document_has_a_prompt_of_its_own():
    labels = torch.tensor([[-100, -100, 7, -100, -100, 8, 9, 3]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]])
    assert prompt_of(labels, None, segments).int().tolist() == [[1, 1, 0, 1, 1, 0, 1, 0]]


@pytest.mark.parametrize("name", CACHES)
def test_the_length_of_the_cache_is_read_under_each_of_its_names(name):
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), 0)
    needs = frozenset({"cached"})
    assert further_inputs({name: cache}, {}, (1, 1), needs) == {"cached": 3}
    # Another model may call anything so; without a cache nothing is known.
    assert further_inputs({name: 5}, {}, (1, 1), needs) == further_inputs({name: None}, {}, (1, 1), needs) == {}
