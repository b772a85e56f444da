"""What a trainer reads of its rows, checked before a model is loaded: columns, values and chat templates."""

from __future__ import annotations

from typing import Any

from data_values import check_values, is_conversation

from moe_peft.messages import shown

# Script -> sets of columns of which the data must have one whole.
SFT_COLUMNS = (("messages",), ("text",), ("prompt", "completion"))
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": SFT_COLUMNS,
    "dpo": (("chosen", "rejected"),),
    "kto": (("prompt", "completion", "label"), ("chosen", "rejected")),
    "reward": (("chosen", "rejected"),),
    "grpo": (("prompt",),),
    "rloo": (("prompt",),),
    "select_experts": SFT_COLUMNS,
}
EXAMPLES = {
    "sft": '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}',
    "dpo": '{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}',
    "kto": '{"prompt": "The sky is", "completion": " blue.", "label": true}',
    "reward": '{"chosen": "The sky is blue.", "rejected": "The sky is green."}',
    "grpo": '{"prompt": "What is 2 + 2?"}',
}
EXAMPLES |= {"rloo": EXAMPLES["grpo"], "select_experts": EXAMPLES["sft"]}
# Columns that tokenization has made already.
TOKENIZED = "input_ids"


def check_columns(script: str, rows: Any, training_args: Any, name: str) -> None:
    """Refuse rows without the columns that a trainer reads, or with holes in them.

    Args:
        script: "sft", "dpo", ...
        rows: A `Dataset`, or a streamed one.
        training_args: The trainer's arguments; those of SFT may name another column of text.
        name: Where the data is from, for the message.

    Raises:
        ValueError: Columns are missing, or empty in a row; what was found, what is needed and an example are shown.
    """
    found = rows.column_names
    if found is None or TOKENIZED in found:
        return
    if not found or (hasattr(rows, "__len__") and len(rows) == 0):
        raise ValueError(f"{name} has no rows.")
    text = getattr(training_args, "dataset_text_field", "text")
    wanted = [tuple(text if column == "text" else column for column in columns) for columns in COLUMNS[script]]
    fitting = [columns for columns in wanted if set(columns) <= set(found)]
    if not fitting:
        needed = ", or ".join(" and ".join(columns) for columns in wanted)
        raise ValueError(
            f"{name} has the columns {', '.join(found)}, but {script} needs {needed}. A row looks like "
            f"{EXAMPLES[script]}; the first row is {shown(next(iter(rows)))}."
        )
    for column in fitting[0]:
        row = _first_hole(rows, column)
        if row is not None:
            raise ValueError(f"{name}: row {row + 1} has no {column!r}. Fill it in, or take the row out.")
    # Pairs of answers may have a prompt of their own.
    prompt = ("prompt",) if "prompt" in found and "chosen" in fitting[0] else ()
    check_values(rows, (*prompt, *fitting[0]), name)


def check_template(rows: Any, tokenizer: Any, training_args: Any, name: str) -> None:
    """Refuse conversations for a tokenizer that does not know how to write them.

    Args:
        rows: The rows to train on.
        tokenizer: Of the model.
        training_args: The trainer's arguments.
        name: Name of the model, for the message.

    Raises:
        ValueError: There is no chat template.
    """
    if getattr(tokenizer, "chat_template", None) or getattr(training_args, "chat_template_path", None):
        return
    row = next(iter(rows))
    talks = [column for column in ("messages", "prompt", "chosen", "completion") if is_conversation(row.get(column))]
    if talks:
        way = "Give --chat_template_path with a .jinja file or the name of a model that has one"
        if not hasattr(training_args, "chat_template_path"):
            way = "Save the model's tokenizer with a chat_template"
        raise ValueError(
            f"The column {talks[0]!r} holds conversations, but {name} has no chat template to write them with. {way}, "
            "or give texts instead."
        )


def _first_hole(rows: Any, column: str) -> int | None:
    """Index of the first row whose value is missing; streamed rows are not searched."""
    table = getattr(rows, "data", None)
    if table is None or table.column(column).null_count == 0:
        return None
    return next((index for index, value in enumerate(rows[column]) if value is None), None)
