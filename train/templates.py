"""New tokens of a cloned chat template on a model whose output head is its embedding, as most small models have it.

For `--chat_template_path` TRL trains the new rows of the embedding and the whole output head. Where the two are one
matrix that is a contradiction, which peft answers with an error in the first evaluation; there the new rows alone are
trained, and the head sees them.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper

from moe_peft.config.config import MoeConfig


def model_and_tokenizer(model_args: Any, training_args: Any, config: MoeConfig) -> tuple[Any, Any]:
    """What to give the trainer: the model's name, or the model with the template where TRL cannot clone it itself.

    Args:
        model_args: TRL's `ModelConfig`.
        training_args: The trainer's arguments, after `training.prepare`; what is done here is taken out of them.
        config: The adapter's configuration; the new tokens are added to it.

    Returns:
        A name and None, or a model and its tokenizer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import clone_chat_template

    name = model_args.model_name_or_path
    remote = {"trust_remote_code": getattr(training_args, "trust_remote_code", False)}
    origin = {"revision": model_args.model_revision, **remote}
    tied = AutoConfig.from_pretrained(name, **origin).get_text_config().tie_word_embeddings
    if not tied or not clones_tokens(training_args):
        indices_by_embedding(training_args, config)
        return name, None
    set_seed(training_args.seed)
    model = AutoModelForCausalLM.from_pretrained(name, **training_args.model_init_kwargs)
    tokenizer = AutoTokenizer.from_pretrained(name, **origin)
    model, tokenizer, added = clone_chat_template(model, tokenizer, training_args.chat_template_path)
    if added:
        config.trainable_token_indices = [*(config.trainable_token_indices or []), *added]
    training_args.chat_template_path = training_args.model_init_kwargs = None
    return model, tokenizer


def clones_tokens(training_args: Any) -> bool:
    """Whether the chat template comes from another tokenizer, with its tokens, and not from a file."""
    source = training_args.chat_template_path
    return source is not None and not source.endswith((".jinja", ".j2"))


def indices_by_embedding(training_args: Any, config: MoeConfig) -> None:
    """Write `trainable_token_indices` in the form to which TRL can add the tokens that it clones.

    Args:
        training_args: The trainer's arguments.
        config: The adapter's configuration.
    """
    if clones_tokens(training_args) and isinstance(config.trainable_token_indices, list):
        config.trainable_token_indices = {"embed_tokens": config.trainable_token_indices}


def complete_tied_head(model: Any) -> None:
    """Give an output head that shares the trainable tokens of the embedding the attribute that TRL's loss reads.

    peft wraps such a head in a module without `bias`, which would stop the first step.

    Args:
        model: A causal language model, in a `PeftModel` where it has an adapter.
    """
    head = model.get_base_model().get_output_embeddings() if isinstance(model, PeftModel) else None
    if isinstance(head, TrainableTokensWrapper) and getattr(head.original_module, "bias", None) is None:
        head.bias = None
