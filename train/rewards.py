"""Rewards of a GRPO run: functions of TRL, functions of your own by dotted path, and reward models or adapters."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

SOFT_CACHE_SHARE = 5


def load_rewards(script_args: Any, training_args: Any, dtype: str | None) -> list[tuple[Any, Any]]:
    """Every reward of a run, in the order of `reward_weights`: the reward model first, then the functions as given.

    Args:
        script_args: `grpo.GrpoArguments`.
        training_args: TRL's `GRPOConfig`.
        dtype: Precision of the reward model's weights.

    Returns:
        Pairs of reward and its tokenizer; None as the tokenizer of a function.

    Raises:
        ValueError: There is none, or a name is unknown.
    """
    names, model_name = script_args.reward_funcs or [], script_args.reward_model_name_or_path
    if not names and not model_name:
        raise ValueError("GRPO has no reward: give --reward_funcs or --reward_model_name_or_path, or both.")
    functions = reward_functions(names, training_args.max_completion_length)
    models = [reward_model(model_name, dtype)] if model_name else []
    return [*models, *((function, None) for function in functions)]


def built_in(max_completion_length: int) -> dict[str, Callable]:
    """TRL's reward functions by name.

    Args:
        max_completion_length: Tokens; get_soft_overlong_punishment starts a fifth of them before the end.
    """
    from trl import rewards

    return {
        "accuracy_reward": rewards.accuracy_reward,
        "reasoning_accuracy_reward": rewards.reasoning_accuracy_reward,
        "think_format_reward": rewards.think_format_reward,
        "get_soft_overlong_punishment": rewards.get_soft_overlong_punishment(
            max_completion_len=max_completion_length, soft_punish_cache=max_completion_length // SOFT_CACHE_SHARE
        ),
    }


def reward_functions(names: list[str], max_completion_length: int) -> list[Callable]:
    """Resolve names of reward functions.

    Args:
        names: Names of TRL's functions, or dotted paths such as `my_rewards.length_reward`, of modules that can be
            imported from the working directory.
        max_completion_length: Tokens.

    Raises:
        ValueError: A name is neither.
    """
    known, functions = built_in(max_completion_length), []
    for name in names:
        module_name, _, attribute = name.rpartition(".")
        if name in known:
            functions.append(known[name])
            continue
        if not module_name:
            raise ValueError(
                f"--reward_funcs {name}: TRL has no such reward; its own are {sorted(known)}. For a function of your "
                "own write module.function, with the module importable from the working directory."
            )
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            functions.append(getattr(importlib.import_module(module_name), attribute))
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"--reward_funcs {name} cannot be imported ({error}). Start the script from the folder of the module, "
                "or put that folder on PYTHONPATH."
            ) from error
    return functions


def reward_model(name: str, dtype: str | None) -> tuple[Any, Any]:
    """Load a reward model, or an adapter of train/reward.py on its base model.

    Args:
        name: Name on the Hub, or a folder.
        dtype: Precision of the base model's weights.

    Returns:
        The model, with one output, and its tokenizer.
    """
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(name) is not None:
        adapted = AutoPeftModelForSequenceClassification.from_pretrained(name, num_labels=1, dtype=dtype)
        # The trainer knows how to place a transformers model; the adapter's layers are inside it.
        model = adapted.get_base_model()
    else:
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(name)
