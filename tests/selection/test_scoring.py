"""Scores are the paper's sums over real tokens, whatever the batches look like, and the model is left as it was."""

from __future__ import annotations

import copy
import sys
from importlib.metadata import version

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BatchEncoding, BitsAndBytesConfig

from moe_peft import EsftConfig, ExpertScores, PerftConfig, describe, score_experts
from moe_peft.selection.scores import AGGREGATES, CRITERIA
from tests.contract.cases import randomize
from tests.processes.together import run_together
from tests.scored_models import MODELS, olmoe, reference_scores
from tests.tiny import padded_batch, tiny_llama

LENGTHS = [7, 3, 9, 1, 5]


def score(model, batches, **arguments):
    return score_experts(model, batches, show_progress=False, **arguments)


def assert_equal(found, expected, tolerance=1e-6):
    """Token scores exactly, as they count; gate scores to the rounding of the routers' float32."""
    assert (found.layers, found.num_experts, found.top_k) == (expected.layers, expected.num_experts, expected.top_k)
    assert (found.num_tokens, found.num_samples) == (expected.num_tokens, expected.num_samples)
    for layer in found.layers:
        for criterion in CRITERIA:
            for aggregate in AGGREGATES:
                own = found.of(layer, criterion, aggregate), expected.of(layer, criterion, aggregate)
                torch.testing.assert_close(*own, rtol=0, atol=1e-14 if criterion == "token" else tolerance)


def rows_of(batch):
    """The samples of a padded batch as lists of ids."""
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


def batch_from(rows, side="right", width=None):
    width = width or max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[place, start : start + len(row)] = torch.tensor(row)
        mask[place, start : start + len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def model():
    return olmoe()


@pytest.fixture(scope="module")
def rows():
    return rows_of(padded_batch(LENGTHS, seed=3))


@pytest.fixture(scope="module")
def expected(model, rows):
    """Each sample by itself, without padding."""
    return score(model, [{"input_ids": torch.tensor([row])} for row in rows])


@pytest.mark.parametrize("name", MODELS)
def test_both_criteria_equal_the_loop_over_tokens(name):
    model = MODELS[name][0]()
    batches = [padded_batch([6, 2, 4], seed=1), padded_batch([3, 8], seed=2, side="left")]
    scores, wanted = score(model, batches), reference_scores(name, model, batches)
    assert scores.layers == sorted({layer for *_, layer in wanted})
    for (criterion, aggregate, layer), values in wanted.items():
        own = scores.of(layer, criterion, aggregate)
        torch.testing.assert_close(own, torch.tensor(values, dtype=torch.float64), rtol=0, atol=2e-7)
    assert (scores.num_tokens, scores.num_samples, set(scores.top_k.values())) == (23, 5, {2})


@pytest.mark.parametrize("name", MODELS)
def test_token_scores_sum_to_one_and_gate_scores_only_where_the_backbone_rescales(name):
    make, renormalizes, _ = MODELS[name]
    scores = score(make(), [padded_batch(LENGTHS, seed=3)])
    for layer in scores.layers:
        for aggregate in AGGREGATES:
            assert float(scores.of(layer, "token", aggregate).sum()) == pytest.approx(1, abs=1e-14)
            mass = float(scores.of(layer, "gate", aggregate).sum())
            assert (mass == pytest.approx(1, abs=1e-6)) == renormalizes


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [9, 14])
def test_scores_do_not_depend_on_batch_size_or_padding(size, side, width, model, rows, expected):
    batches = [batch_from(rows[start : start + size], side, width) for start in range(0, len(rows), size)]
    assert_equal(score(model, batches), expected)


def test_scores_do_not_depend_on_the_order_of_samples(model, rows, expected):
    assert_equal(score(model, [batch_from([rows[i] for i in (4, 2, 0, 1, 3)])]), expected)


def packed(rows, by):
    ids = torch.tensor([[token for row in rows for token in row]])
    lengths = torch.tensor([len(row) for row in rows])
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    documents = torch.arange(len(rows)).repeat_interleave(lengths)[None]
    columns = {
        "position_ids": {"position_ids": positions},
        "seq_idx": {"position_ids": positions, "seq_idx": documents.int()},
        "cu_seq_lens": {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 9, "max_length_k": 9},
    }
    return {"input_ids": ids, **columns[by]}


@pytest.mark.parametrize("by", ["position_ids", "seq_idx", "cu_seq_lens"])
def test_packed_documents_score_as_rows(by, model, rows, expected):
    assert_equal(score(model, [packed(rows[:2], by), packed(rows[2:], by)]), expected)


def test_a_limit_takes_the_first_tokens_exactly_and_no_batch_after_them(model, rows):
    taken = []

    def batches():
        for row in rows:
            taken.append(row)
            yield batch_from([row])

    scores = score(model, batches(), max_tokens=9)
    assert (scores.num_tokens, scores.num_samples, len(taken)) == (9, 2, 2)
    assert_equal(scores, score(model, [batch_from([rows[0], rows[1][:2]])]))


def test_completions_alone_are_scored_by_labels_or_completion_mask(model, rows):
    batch = batch_from(rows, "left")
    after_two = (batch["attention_mask"].cumsum(1) > 2) & batch["attention_mask"].bool()
    by_labels = {**batch, "labels": batch["input_ids"].masked_fill(~after_two, -100)}
    by_mask = {**batch, "completion_mask": (batch["attention_mask"].cumsum(1) > 2).long()}
    scores = score(model, [by_labels], score_mask="completion")
    assert_equal(score(model, [by_mask], score_mask="completion"), scores)
    # The row of a single token has no completion.
    assert (scores.num_tokens, scores.num_samples) == (int(after_two.sum()), 4)
    # Prompts are seen all the same: what is scored are the later tokens of the whole rows.
    whole, prompts = score(model, [batch]), score(model, [batch_from([row[:2] for row in rows])])
    for layer in scores.layers:
        for criterion in CRITERIA:
            own, all_tokens, prompt = (part.of(layer, criterion) for part in (scores, whole, prompts))
            joined = own * scores.num_tokens + prompt * prompts.num_tokens
            torch.testing.assert_close(joined, all_tokens * whole.num_tokens, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="needs a column completion_mask, or labels"):
        score(model, [batch], score_mask="completion")


@pytest.mark.parametrize(("k", "winners"), [(2, [4, 1]), (3, [0, 5, 2])])
def test_a_router_that_always_chooses_the_same_experts_gives_each_one_kth(k, winners):
    model = olmoe(num_experts_per_tok=k)
    model.model.embed_tokens.weight.data[:, 0] = 50.0
    for layer in model.model.layers:
        # The first entry of every hidden state is positive, and decides alone.
        layer.mlp.gate.weight.data.zero_()
        layer.mlp.gate.weight.data[winners, 0] = torch.linspace(0.5, 0.3, k, dtype=torch.float64)
    scores = score(model, [padded_batch(LENGTHS, seed=3)])
    for layer in scores.layers:
        for aggregate in AGGREGATES:
            own = scores.of(layer, aggregate=aggregate)
            assert own[winners].tolist() == pytest.approx([1 / k] * k, abs=1e-15)
            assert float(own.sum()) == pytest.approx(1, abs=1e-15)


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_bit_identical_without_hooks_and_in_its_modes(fails, rows):
    model = olmoe().train()
    model.model.layers[0].eval()
    before = copy.deepcopy(model.state_dict()), hooks_of(model), [module.training for module in model.modules()]
    batches = [batch_from(rows), {"input_ids": torch.tensor([[99]])}] if fails else [batch_from(rows)]
    if fails:
        with pytest.raises(IndexError):
            score(model, batches)
    else:
        score(model, batches)
    assert (hooks_of(model), [module.training for module in model.modules()]) == before[1:]
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()) and torch.is_grad_enabled()


def test_scores_are_of_the_eval_mode_and_repeat_bit_for_bit(rows):
    model = olmoe(attention_dropout=0.5).train()
    first, second = (score(model, [batch_from(rows)]) for _ in range(2))
    assert_equal(first, second, tolerance=0)
    assert_equal(first, score(model.eval(), [batch_from(rows)]), tolerance=0)


def test_active_adapters_take_part_and_disabled_ones_do_not(rows):
    batches = [batch_from(rows)]
    base = score(olmoe(), batches)
    model = get_peft_model(olmoe(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).double()
    adapted = score(model, batches)
    assert not torch.equal(adapted.of(1, "gate"), base.of(1, "gate"))
    with model.disable_adapter():
        assert_equal(score(model, batches), base)
    assert_equal(score(model, batches), adapted)
    assert adapted.model_parameters == base.model_parameters == olmoe().num_parameters()


@pytest.mark.parametrize(
    "config", [EsftConfig(experts={"0": [1, 3]}), PerftConfig(variant="E", r=2), PerftConfig(variant="R", r=2)]
)
def test_wrapped_experts_are_scored_by_the_whole_routing_of_the_backbone(config, rows):
    batches = [batch_from(rows)]
    model = get_peft_model(olmoe(), config).double()
    scores = score(model, batches)
    assert_equal(scores, score(olmoe(), batches))
    assert (scores.model_parameters, scores.by_layer[0].expert_parameters) == (olmoe().num_parameters(), 3 * 16 * 32)
    randomize(model)
    # What the first layer is given does not depend on its own experts.
    torch.testing.assert_close(score(model.double(), batches).of(0, "gate"), scores.of(0, "gate"))


def test_an_expert_has_as_many_parameters_as_its_adapter_trains(rows):
    scores = score(olmoe(), [batch_from(rows)])
    trained = describe(olmoe(), EsftConfig(experts={"0": [1, 3], "1": [2]})).num_parameters
    assert trained == 2 * scores.by_layer[0].expert_parameters + scores.by_layer[1].expert_parameters


def test_columns_that_the_model_does_not_take_are_ignored_in_any_loader(model, rows, expected):
    data = [{"input_ids": torch.tensor(row), "attention_mask": torch.ones(len(row)), "name": "x"} for row in rows]
    columns = {"task_type": torch.zeros(1), "labels": torch.tensor([3]), "text": ["a"]}
    loader = DataLoader(data, batch_size=1)
    assert_equal(score(model, ({**batch, **columns} for batch in loader)), expected)
    assert_equal(score(model, [BatchEncoding(batch_from(rows))]), expected)


def test_the_logits_and_the_cache_of_the_batch_are_not_computed(model, rows):
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
    score(model, [batch_from(rows)])
    handle.remove()
    assert seen[0].logits.shape[1] == 1 and seen[0].past_key_values is None


@pytest.mark.bnb
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_in_4_bit_is_scored_and_counted_in_weights(tmp_path, rows):
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    model = olmoe(hidden_size=64, intermediate_size=64).float()
    model.save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    )
    for experts_too in (False, True):
        if experts_too:
            for layer in quantized.model.layers:
                for name in ("gate_up_proj", "down_proj"):
                    parametrize.replace_parameter_4bit(layer.mlp.experts, name, quant_type="nf4")
        scores = score(quantized, [batch_from(rows)])
        assert float(scores.of(1).sum()) == pytest.approx(1)
        assert scores.model_parameters == model.num_parameters()
        assert scores.by_layer[1].expert_parameters == 3 * 64 * 64


def test_what_cannot_be_scored_is_refused_with_a_way_out(model, rows):
    batch = batch_from(rows)
    with pytest.raises(ValueError, match="LlamaForCausalLM is a dense model"):
        score(tiny_llama(), [batch])
    with pytest.raises(ValueError, match="score_mask='prompt' must be one of"):
        score(model, [batch], score_mask="prompt")
    with pytest.raises(ValueError, match="max_tokens=0 must be a whole number of at least 1"):
        score(model, [batch], max_tokens=0)
    for arguments, message in (
        ({"max_tokens": 1.5}, "max_tokens=1.5 must be a whole number"),
        ({"max_tokens": True}, "max_tokens=True must be a whole number"),
        ({"score_mask": ["all"]}, r"score_mask=\['all'\] must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            score(model, [batch], **arguments)
    for wrong in (batch, "data", None):
        with pytest.raises(ValueError, match=r"dataloader=.* must be a DataLoader or a list of batches"):
            score(model, wrong)
    with pytest.raises(ValueError, match=r"model='org/name' is no model. Load it first"):
        score_experts("org/name", [batch])
    with pytest.raises(ValueError, match="There is no token to score"):
        score(model, [])
    with pytest.raises(ValueError, match="There is no token to score"):
        score(model, [{**batch, "labels": torch.full_like(batch["input_ids"], -100)}], score_mask="completion")
    with pytest.raises(ValueError, match="does not tell padding"):
        score(model, [{**batch, "attention_mask": torch.ones(5, 1, 9, 9, dtype=torch.bool)}])
    with pytest.raises(ValueError, match="A batch is a tuple, not a dict of tensors"):
        score(model, [(batch["input_ids"],)])
    with pytest.raises(ValueError, match=r"no input_ids of shape \(B, L\), it has \['text'\]"):
        score(model, [{"text": torch.zeros(3)}])


def test_tokens_that_an_adapter_adds_are_refused(rows):
    from peft import PromptTuningConfig

    model = get_peft_model(olmoe().float(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"received \d+ tokens in a batch of 45"):
        score(model, [batch_from(rows)])


def test_weights_that_overflow_are_refused():
    model = olmoe()
    model.model.layers[1].mlp.gate.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match="routing weights of layer 1 are not finite"):
        score(model, [padded_batch([4])])


def test_a_wrapper_for_parallel_training_is_looked_through(model, rows, expected):
    assert_equal(score(nn.DataParallel(model), [batch_from(rows)]), expected)


@pytest.mark.skipif(version("accelerate") < "1.13", reason="this accelerate cannot unwrap compiled parts")
def test_compiled_models_are_looked_through(rows, expected):
    config, batches = PerftConfig(variant="E", task_type="CAUSAL_LM"), [batch_from(rows)]
    for model in (
        torch.compile(olmoe(), backend="eager"),
        get_peft_model(torch.compile(olmoe(), backend="eager"), config),
        torch.compile(get_peft_model(olmoe(), config), backend="eager"),
    ):
        assert_equal(score(model, batches), expected)


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_of_the_cpu(rows, expected):
    assert_equal(score(olmoe().cuda(), [batch_from(rows)]), expected)


WORKER = """
import sys, torch
from torch import distributed as dist
from moe_peft import score_experts
from tests.processes.together import run_together
from tests.scored_models import olmoe
from tests.selection.test_scoring import LENGTHS, batch_from, rows_of
from tests.tiny import padded_batch
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
rows = rows_of(padded_batch(LENGTHS, seed=3))
own = [rows[:2], rows[2:]][rank]
score_experts(olmoe(), [batch_from([row]) for row in own], show_progress=False).save(f"{folder}/all-{rank}.json")
limited = score_experts(olmoe(), [batch_from([row]) for row in own], max_tokens=9, show_progress=False)
limited.save(f"{folder}/limited-{rank}.json")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_score_as_one(tmp_path, model, rows, expected):
    run_together([[sys.executable, "-c", WORKER, str(rank), str(tmp_path)] for rank in (0, 1)])
    # Five tokens of the first process, four of the second.
    limited = score(model, [batch_from([rows[0][:5], rows[2][:4]])])
    for rank in (0, 1):
        assert_equal(ExpertScores.load(tmp_path / f"all-{rank}.json"), expected)
        assert_equal(ExpertScores.load(tmp_path / f"limited-{rank}.json"), limited)
