"""The one list of peft's tests that do not pass with our types, and why.

A test that an entry names is run all the same: it is reported as skipped when it skips itself or fails with the
entry's text, and fails in every other case, passing included. A test that skips itself without an entry fails.
"""

from typing import NamedTuple


class Skip(NamedTuple):
    """An entry of the list.

    Attributes:
        tests: Regular expression, searched in "<file>::<test>[<row>]".
        outcome: Text in the message with which the test skips itself or fails.
        reason: Why it does not pass.
    """

    tests: str
    outcome: str
    reason: str


SKIPS: tuple[Skip, ...] = (
    # What the design excludes.
    Skip(
        r"(merg|test_forward_b?float16).*\[(?!.*(one-expert|bnb_4bit|perft|esft))",
        "cannot be merged",
        "Several experts are weighed by the input, so no fixed weight equals them; merging is refused.",
    ),
    Skip(
        r"(merg|test_forward_b?float16).*\[.*(perft|esft-lora)",
        "cannot be merged",
        "Adapters beside a block or its experts are no change of one weight; merging is refused.",
    ),
    Skip(
        r"test_(disable_adapter|unload_adapter|lora_conversion|merge_layers(_multi|_nan)?|(generate_with_)?mixed_adapter_"
        r"batches|save_pretrained(_selected_adapters)?(_pickle)?)\[esft-olmoe",
        "init_weights=False must be left at True",
        "The copies of the experts start at the backbone's weights, never at random ones.",
    ),
    Skip(
        r"(layers_to_transform_index_zero|test_training_decoders_layer_indexing)\[esft",
        "must be left at None: `experts` names the layers",
        "ESFT's selection names the layers, so no second field may.",
    ),
    Skip(
        r"mixed_adapter_batches\[(perft-e|esft-lora)",
        "cannot mix adapters in a batch",
        "A backbone calls its experts with flattened tokens, which no longer say their row.",
    ),
    Skip(
        r"test_only_params_are_updated\[mov-conv1d",
        "assert not torch.allclose(param_before, param_after",
        "The router reads a single value there, and three steps move it by less than the test can see.",
    ),
    Skip(
        r"test_only_params_are_updated\[.*one-expert",
        "assert not torch.allclose(param_before, param_after",
        "A single expert has the weight one whatever the router says, so its router gets no gradient.",
    ),
    Skip(
        r"test_adapter_dtype_autocast\[(False|True)-False-dtype[01]",
        "p.dtype == expected_dtype",
        "Routers stay in float32: rounded scores change which experts are selected.",
    ),
    Skip(
        r"test_add_adapter_no_autocast_adapter_dtype\[(?!.*(perft-[de]|esft))(dtype1|.*(llama|gpt2|olmoe|bert))",
        "get_adapter_dtype(model,",
        "Routers stay in float32: rounded scores change which experts are selected.",
    ),
    Skip(
        r"test_from_pretrained_config_construction\[",
        "Config(task_type=",
        "The model keeps a copy with its own places and sizes, so that one configuration can serve several models.",
    ),
    Skip(
        r"test_parameters_after_loading_model\[(sira|routed)-defaults",
        "holds NaN or infinite values",
        "SGD at a rate of 0.5 on a sum of outputs diverges with a scale that learns at LoRA's pace at usual rates.",
    ),
    Skip(
        r"test_save_pretrained(_selected_adapters)?_pickle(?!\[esft-olmoe)",
        "is a pickle, which can run code when it is read",
        "Pickled weights are not loaded.",
    ),
    Skip(
        r"test_peft_config::(test_from_pretrained|test_from_pretrained_cache_dir|"
        r"test_save_pretrained_with_runtime_config)\[",
        "has peft_type='LORA'",
        "The tests load a LoRA adapter's file with another type's class, which is refused.",
    ),
    Skip(
        r"test_set_attributes",
        "peft_type='test' does not belong to",
        "The test makes up a value of peft_type, which is refused.",
    ),
    Skip(
        r"same_as_module_name\[",
        "is a part of the names of the weights",
        "An adapter called like a module would lose weights when it is saved; the name is refused.",
    ),
    Skip(
        r"test_peft_other::test_targeting_trainable_tokens_raises",
        "Regex pattern did not match",
        "No type wraps embeddings, so the place is refused as such, before its tokens are.",
    ),
    Skip(
        r"test_modules_to_save_targets_module_dict_raises",
        "Regex pattern did not match",
        "What cannot be trained beside an adapter is refused before anything is changed, in words of our own.",
    ),
    Skip(
        r"test_combined_with_peft_raises_target_layer_not_found",
        "trainable_token_indices names the layer",
        "What cannot be trained beside an adapter is refused before anything is changed, in words of our own.",
    ),
    Skip(
        r"test_peft_low_level_api::(test_inject_adapter_in_model|test_modules_to_save)\[",
        'hasattr(module, "lora_A")',
        "The test looks for the attributes of stock LoRA.",
    ),
    Skip(
        r"test_peft_low_level_api::test_get_peft_model_state_dict\[(?!lora|molora)",
        'assert "lora" in key',
        "The test looks for the attributes of stock LoRA.",
    ),
    Skip(
        r"test_peft_tuners_utils::test_(module_type_small|adapter_model_type_small|peft_types_small|nb_params_small|"
        r"model_status_with_\w+)",
        "assert",
        "The test compares with the names and the number of parameters of stock LoRA.",
    ),
    # What the types do not have, and the tests say so themselves.
    Skip(r"bias_in_module_name\[", "bias", "No type trains biases."),
    Skip(
        r"test_save_load_roundtrip_fsdp_wrapped_learnable_bias",
        "requires the PEFT method to support training the bias",
        "No type trains biases.",
    ),
    Skip(r"test_disable_adapter_with_bias_warns", "only for LoraConfig or BOFTConfig", "No type trains biases."),
    Skip(
        r"test_adding_multiple_adapters_with_bias_raises",
        "does not support the 'bias' argument",
        "No type trains biases.",
    ),
    Skip(
        r"test_weighted_combination_of_adapters",
        "Test not applicable for",
        "Weighted combination is defined for stock LoRA and IA3; ours refuse it.",
    ),
    Skip(r"test_training_prompt_learning_tasks", "Test not applicable for", "About prompt learning."),
    Skip(r"test_prompt_tuning_\w+_prepare_for_training", "does not apply to", "About prompt tuning."),
    Skip(r"test_set_requires_grad_prompt_learning_raises", "only for prompt learning", "About prompt learning."),
    Skip(
        r"test_peft_encoders::test_passing_input_embeds_works",
        "not prompt learning",
        "About prompt learning; the test of the same name runs in test_peft_decoders.",
    ),
    Skip(
        r"test_active_adapter\[.*saved",
        "Multiple active adapters with modules_to_save",
        "peft cannot activate two adapters that both save a copy of a module.",
    ),
    Skip(
        r"test_merge_unmerge_unload\[.*bnb_4bit",
        "Bnb 4 bit quant with CPU results in high variance",
        "peft skips merging into 4-bit weights on a CPU.",
    ),
)
