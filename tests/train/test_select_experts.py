"""From a data set to selected experts to an adapter, by the two scripts; every form of the data is scored."""

from __future__ import annotations

import json
from types import SimpleNamespace

import common
import pytest
import select_experts as script
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from moe_peft import ExpertScores, ExpertSelection, score_experts, select_experts
from tests.methods.esft_models import sparse_model
from tests.scored_models import olmoe
from tests.selection.test_scoring import assert_equal, batch_from
from tests.tiny import tiny_llama
from tests.train.tiny_run import launch, make_data, make_tokenizer, run_here, words, write_run

TEXTS = [{"text": words(i, 3 + i % 5)} for i in range(14)]
PAIRS = [{"prompt": words(i, 3), "completion": " " + words(20 + i, 2)} for i in range(14)]
CHATS = [
    {"messages": [{"role": "user", "content": words(i, 3)}, {"role": "assistant", "content": words(20 + i, 2)}]}
    for i in range(14)
]
# Keys of tiny runs that belong to training an adapter.
NO_ADAPTER = dict.fromkeys(("moe_method", "moe_num_experts", "moe_r", "moe_router_aux_loss_coef"))
NO_TRAINING = {**NO_ADAPTER, "seed": None, "per_device_train_batch_size": None, "gradient_checkpointing": None}


def make_moe(folder):
    olmoe().float().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def write(folder, rows, **values):
    fields = {"model_name_or_path": make_moe(folder / "base"), "dataset_name": make_data(folder / "data", rows)}
    return write_run(folder, **{**NO_TRAINING, **fields, **values})


def scores_in(folder):
    return ExpertScores.load(folder / "out/summary.json")


def ids_of(folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    return [tokenizer(text)["input_ids"] for text in texts]


def expected(folder, rows, **arguments):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    return score_experts(model, [batch_from([row]) for row in rows], show_progress=False, **arguments)


def test_selected_experts_are_trained_and_nothing_else(tmp_path, capsys, monkeypatch):
    printed = launch("select_experts", write(tmp_path, TEXTS, max_length=16), "--p", "0.3")
    out = tmp_path / "out"
    selection, scores = ExpertSelection.load(out / "expert_config.json"), scores_in(tmp_path)
    assert selection == select_experts(scores, 0.3) and 0 < selection.num_selected < 12
    # 12 texts with their ends, joined and cut into rows of 16.
    total = sum(len(row["text"].split()) + 1 for row in TEXTS[2:])
    assert f"{total} tokens of {-(-total // 16)} samples" in printed
    assert "token scores, p=0.3" in printed and f"--moe_experts {out}/expert_config.json" in printed
    assert "Train them: train/sft.py --moe_method" in printed and (out / "selection.png").is_file()
    monkeypatch.setenv("MOE_PEFT_PROGRAM", "moe-peft select-experts")
    script.report(selection, scores, tmp_path / "again")
    assert "Train them: moe-peft sft --moe_method" in capsys.readouterr().out

    fields = {"model_name_or_path": str(tmp_path / "base"), "dataset_name": str(tmp_path / "data")}
    run = write_run(tmp_path / "sft", **{**NO_ADAPTER, **fields, "router_aux_loss_coef": 0.0})
    flags = ("--moe_method", "esft", "--moe_experts", str(out / "expert_config.json"))
    run_here("sft", run, *flags)
    assert f"whole matrices of {selection.num_selected} experts" in capsys.readouterr().out
    config = json.loads((tmp_path / "sft/out/adapter_config.json").read_text())
    assert config["experts"] == {layer: sorted(ids) for layer, ids in selection.experts.items()}
    saved = load_file(tmp_path / "sft/out/adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    assert len(saved) == 2 * sum(1 for ids in selection.experts.values() if ids)
    for name, tensor in saved.items():
        layer = name.split(".layers.")[1].split(".")[0]
        key = f"model.layers.{layer}.mlp.experts.{name.rpartition('.')[2]}"
        before = base[key][sorted(selection.experts[layer])]
        assert tensor.shape == before.shape and not any(map(torch.equal, tensor, before))


def test_examples_by_themselves_score_as_rows_however_they_are_batched(tmp_path):
    flags = ("--packing", "false", "--per_device_train_batch_size", "5")
    run_here("select_experts", write(tmp_path, TEXTS), *flags)
    rows = [[*ids, 2] for ids in ids_of(tmp_path, [row["text"] for row in TEXTS[2:]])]
    assert_equal(scores_in(tmp_path), expected(tmp_path, rows))


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize(("rows", "flags"), [(PAIRS, ()), (CHATS, ("--assistant_only_loss", "true"))])
def test_completions_of_pairs_and_conversations_are_scored_alone(rows, flags, packing, tmp_path):
    run = write(tmp_path, rows, max_length=32, packing_strategy="bfd")
    run_here("select_experts", run, "--score_mask", "completion", "--packing", packing, *flags)
    # Two words of the answer and the end of the turn.
    scores = scores_in(tmp_path)
    assert (scores.num_tokens, scores.num_samples) == (12 * 3, 12)
    run_here("select_experts", run, "--packing", packing, *flags)
    assert scores_in(tmp_path).num_tokens > 12 * 5


def test_data_without_completions_are_refused_where_those_are_to_be_scored(tmp_path):
    with pytest.raises(ValueError, match=r"columns \['text'\], which hold no completions"):
        run_here("select_experts", write(tmp_path, TEXTS), "--score_mask", "completion")
    run = write(tmp_path / "chats", CHATS)
    with pytest.raises(ValueError, match="add --assistant_only_loss true"):
        run_here("select_experts", run, "--score_mask", "completion")


def test_a_limit_reads_no_more_of_the_data_than_it_needs(tmp_path, monkeypatch):
    rows = [{"text": words(i, 7)} for i in range(3000)]
    run = write(tmp_path, rows, max_length=16, per_device_train_batch_size=64)
    tokenize, read = PreTrainedTokenizerBase.__call__, []

    def counted(self, text, *args, **kwargs):
        read.append(1 if isinstance(text, str) else len(text))
        return tokenize(self, text, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", counted)
    run_here("select_experts", run, "--max_tokens", "40")
    assert scores_in(tmp_path).num_tokens == 40
    assert 0 < sum(read) < 1500
    run_here("select_experts", run)
    assert sum(read) > 2998


def test_a_row_without_a_text_is_named_before_a_model_is_loaded(tmp_path):
    rows = [{"text": words(i, 7)} for i in range(12)]
    rows[7] = {"text": None}
    with pytest.raises(ValueError, match=r"row 6 has no 'text'. Fill it in, or take the row out"):  # two are for tests
        run_here("select_experts", write(tmp_path, rows))


def test_flags_reach_the_selection_and_the_file(tmp_path):
    flags = ["--criterion", "gate", "--p", "0.15", "--aggregate", "sample", "--normalize_scores", "true"]
    made = run_here("select_experts", write(tmp_path, TEXTS), *flags, "--min_experts", "2", "--packing", "false")
    rule = {"criterion": "gate", "aggregate": "sample", "normalize_scores": True, "min_experts": 2}
    assert made.experts == select_experts(scores_in(tmp_path), 0.15, **rule).experts and min(made.counts.values()) >= 2
    assert not made.shared_experts
    size = next(iter(scores_in(tmp_path).by_layer.values())).expert_parameters
    made = run_here("select_experts", tmp_path / "run.yaml", "--max_parameters", str(3 * size))
    assert made.experts == select_experts(scores_in(tmp_path), max_parameters=3 * size).experts
    assert 0 < made.num_parameters <= 3 * size
    for flags in (["--p", "0.2", "--max_parameters", "5"], ["--max_parameters", "0"]):
        with pytest.raises(ValueError, match=r"exclude each other|at least 1"):
            run_here("select_experts", tmp_path / "run.yaml", *flags)
    run_here("select_experts", tmp_path / "run.yaml", "--train_shared_experts", "true")
    assert ExpertSelection.load(tmp_path / "out/expert_config.json").shared_experts


def test_an_interruption_while_files_are_written_leaves_none(tmp_path):
    def interrupted(path):
        raise KeyboardInterrupt

    selection, scores = ExpertSelection({"0": [1]}), SimpleNamespace(save=interrupted)
    for folder in (tmp_path / "new", tmp_path):
        with pytest.raises(KeyboardInterrupt):
            script.report(selection, scores, folder)
        assert not list(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    (tmp_path / "old/expert_config.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        script.report(selection, scores, tmp_path / "old")
    assert [(path.name, path.read_text()) for path in (tmp_path / "old").iterdir()] == [("expert_config.json", "{}")]


def test_the_order_of_the_examples_follows_the_seed(tmp_path):
    run = write(tmp_path, TEXTS, packing=False)
    limited = []
    for seed in ("1", "1", "2"):
        run_here("select_experts", run, "--max_tokens", "20", "--seed", seed)
        limited.append(scores_in(tmp_path).of(1, "gate"))
    assert torch.equal(limited[0], limited[1]) and not torch.equal(limited[0], limited[2])


def test_the_defaults_are_the_authors(tmp_path):
    import select_experts as script

    _, training, _, _, arguments = script.make_parser().parse_args_and_config(
        ["--output_dir", "out", "--use_cpu", "--bf16", "false"]
    )
    assert (training.max_length, training.packing, training.packing_strategy) == (4096, True, "wrapped")
    assert (training.seed, training.per_device_train_batch_size) == (5934875, 1)
    assert (arguments.max_tokens, arguments.p, arguments.criterion) == (131072, None, "token")


def test_what_cannot_work_is_refused_before_a_model_is_loaded(tmp_path):
    run = write(tmp_path, TEXTS)
    with pytest.raises(ValueError, match="--moe_r is no flag of"):
        run_here("select_experts", run, "--moe_r", "3")
    with pytest.raises(ValueError, match=r"\['lora_r'\] describe plain LoRA"):
        run_here("select_experts", run, "--lora_r", "3")
    for p in ("1.5", "0", "nan"):
        with pytest.raises(ValueError, match=rf"--p {p}: the scores of a layer add up to one, .* at most 1"):
            run_here("select_experts", run, "--p", p)
    (tmp_path / "base/model.safetensors").unlink()
    with pytest.raises(ValueError, match="trian: the data has the splits"):
        run_here("select_experts", run, "--dataset_train_split", "trian")
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    with pytest.raises(ValueError, match="LlamaForCausalLM is a dense model"):
        run_here("select_experts", run)


@pytest.mark.bnb
def test_a_quantized_model_is_scored(tmp_path):
    olmoe(hidden_size=64).float().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    data = make_data(tmp_path / "data", TEXTS)
    run = write_run(tmp_path, **{**NO_TRAINING, "model_name_or_path": str(tmp_path / "base"), "dataset_name": data})
    run_here("select_experts", run, "--load_in_4bit", "--dtype", "float32")
    assert float(scores_in(tmp_path).of(1).sum()) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_score_all_examples_once(tmp_path):
    run = write(tmp_path, TEXTS, packing=False)
    launch("select_experts", run, launcher=("--multi_gpu", "--num_processes", "2"))
    rows = [[*ids, 2] for ids in ids_of(tmp_path, [row["text"] for row in TEXTS[2:]])]
    assert_equal(scores_in(tmp_path), expected(tmp_path, rows))


def selected(folder, **content):
    path = folder / "config.json"
    whole = {"experts": {"1": [8, 26]}, "shared_experts": False, "non_expert_modules": False}
    path.write_text(json.dumps({**whole, **content}))
    return common.MoeArguments(moe_method="esft", moe_experts=str(path))


def test_the_file_of_selected_experts_fills_the_configuration(tmp_path):
    config = common.moe_config(selected(tmp_path))
    assert config.experts == {"1": [8, 26]} and not config.train_shared_experts
    arguments = selected(tmp_path, shared_experts=True)
    assert common.moe_config(arguments).train_shared_experts
    arguments.moe_train_shared_experts = False
    assert not common.moe_config(arguments).train_shared_experts


def test_experts_selected_in_a_model_with_another_number_of_them_are_refused(tmp_path):
    experts = {"0": [3], "1": [1, 2]}
    config = common.moe_config(selected(tmp_path, experts=experts, num_experts={"0": 16, "1": 16}))
    with pytest.raises(ValueError, match="the experts were selected in another model"):
        get_peft_model(sparse_model("olmoe"), config)
    config = common.moe_config(selected(tmp_path, experts=experts, num_experts={"0": 8, "1": 8}))
    assert get_peft_model(sparse_model("olmoe"), config).peft_config["default"].num_backbone_experts == 8


def test_a_file_that_is_not_there_or_asks_for_more_is_refused(tmp_path):
    arguments = common.MoeArguments(moe_method="esft", moe_experts="low_rank")
    with pytest.raises(ValueError, match="--moe_experts low_rank: there is no such file"):
        common.moe_config(arguments)
    with pytest.raises(ValueError, match="non_expert_modules=True trains everything"):
        common.moe_config(selected(tmp_path, non_expert_modules=True))


def test_scoring_needs_no_device_that_computes_in_sixteen_bit(tmp_path):
    run = write(tmp_path, TEXTS, use_cpu=None, bf16=None, max_length=16)
    assert run_here("select_experts", run).num_selected > 0
