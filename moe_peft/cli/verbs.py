"""What `moe-peft` can do: each verb, the module that does it, and a line of help."""

from __future__ import annotations

from ..tables import table

# Verb -> (module of this folder, the script that it launches if it trains, help).
VERBS: dict[str, tuple[str, str | None, str]] = {
    "sft": ("launch", "sft", "train an adapter on texts, conversations, or prompts with completions"),
    "dpo": ("launch", "dpo", "train on pairs of a better and a worse answer (DPO)"),
    "kto": ("launch", "kto", "train on answers that are marked good or bad (KTO)"),
    "grpo": ("launch", "grpo", "train on rewards of generated answers (GRPO)"),
    "rloo": ("launch", "rloo", "train on rewards of generated answers (RLOO)"),
    "reward": ("launch", "reward", "train a reward model on pairs of answers"),
    "select-experts": ("launch", "select_experts", "choose the experts of a backbone that a data set uses (ESFT)"),
    "selections": ("selections", None, "compare the experts that tasks select, and join them"),
    "configs": ("configs", None, "list the configurations that ship with the package, or print one"),
    "describe": ("describe", None, "say what an adapter would train, and the memory that it takes, without loading"),
    "inspect": ("inspect", None, "say what a saved adapter is, and whether it is healthy"),
    "route": ("route", None, "show which experts each token of a text uses"),
    "export": ("export", None, "write an adapter as a stock LoRA, a merged checkpoint, or tensors of each expert"),
    "import": ("importing", None, "make an adapter here of the files of ESFT's authors, stock peft, or MixLoRA"),
    "compose": ("compose", None, "make the experts of one routed adapter of existing LoRAs"),
    "upcycle": ("upcycle", None, "make several experts of one LoRA, to train them further"),
    "add-expert": ("add_expert", None, "give an adapter one expert more: empty, a copy, or a LoRA"),
    "prune": ("prune", None, "leave out the experts that a task needs least, or merge them, and say what is lost"),
    "distil": ("distil", None, "make one LoRA that comes near a routed adapter, and say how near"),
    "compress": ("compress", None, "write an adapter in signs and masks, a fraction of its bytes, for upload"),
    "decompress": ("decompress", None, "make an adapter again of what compress has written"),
    "report": ("report", None, "write a page on what an adapter's routers decide about texts"),
    "compare": ("compare", None, "train several methods at equal size on the same data, and compare them"),
    "run": ("run", None, "run a module or script of any tool with our adapter types registered"),
}

TRAINING = [verb for verb, (_, script, _) in VERBS.items() if script is not None]
LOOKING = [verb for verb in VERBS if verb not in TRAINING]

USAGE = "moe-peft VERB [arguments]; `moe-peft VERB --help` says what a verb takes"


def help_text() -> str:
    """The help of the command itself."""
    listed = table([(verb, words) for verb, (_, _, words) in VERBS.items()], "<", indent=2)
    rows = dict(zip(VERBS, listed.splitlines(), strict=True))
    lines = [
        f"usage: {USAGE}",
        "",
        "Mixture-of-experts adapters for the stock Hugging Face stack.",
    ]
    for title, verbs in (("train", TRAINING), ("look, and run", LOOKING)):
        lines += ["", f"{title}:", *(rows[verb] for verb in verbs)]
    lines += [
        "",
        "a first run:",
        "  moe-peft sft --model_name_or_path Qwen/Qwen3-0.6B --dataset_name chats.jsonl --moe_method loramoe \\",
        "      --output_dir outputs/first",
        "",
        "--moe_import FILE imports a file with parts or methods of your own first, for every verb but run.",
        "Errors are one line; MOE_PEFT_TRACEBACK=1 in the environment shows where they come from.",
    ]
    return "\n".join(lines)
