"""The command line of the scripts: run files and method files, what was given and by whom, and errors in one line.

A value comes from the first of these that has it: a flag, `--moe_config`, `--config`, the default. `--moe_preset` is
another word for `--moe_config`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from flag_help import help_text
from flags import METHOD_FLAG, PREFIX, SCRIPT_FIELDS, ScriptFlags, owners, renewed
from trl import TrlParser

from moe_peft.cli.own_parts import import_parts, named_imports
from moe_peft.cli.shipped import find_config
from moe_peft.messages import shown

# Names of one setting before and after transformers 5.23: where one alone is given, both have its value.
SAME = [("gradient_checkpointing", "activation_checkpointing")]
SAME += [("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")]
# Settings of a run about the adapter that stay when a method file describes another one.
OF_THE_RUN = frozenset(
    {"moe_import", "moe_router_lr", "moe_lora_plus_ratio", "moe_quantize_experts", "moe_report", "moe_overwrite"}
)


class ScriptParser(TrlParser):
    """TRL's parser with files by name, without abbreviations, and with messages that say what to write.

    Args:
        dataclass_types: As of TRL's parser.
        ignores_unknown_keys: Leave keys of a file out that this parser lacks, which other programs read.
        **kwargs: As of TRL's parser.

    Attributes:
        given: Names of the settings that were given, by a flag or by a file, in the last parse.
    """

    def __init__(self, dataclass_types: Any, *, ignores_unknown_keys: bool = False, **kwargs: Any) -> None:
        self.ignores_unknown_keys = ignores_unknown_keys
        self.sections: list[tuple[type, list[argparse.Action]]] = []
        self.given: frozenset[str] = frozenset()
        program = os.environ.get("MOE_PEFT_PROGRAM") or None
        self.settings = {"allow_abbrev": False, "prog": program, **kwargs}
        super().__init__(dataclass_types, **self.settings)

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        before = len(self._actions)
        super()._add_dataclass_arguments(dtype)
        self.sections.append((dtype, self._actions[before:]))

    def format_help(self) -> str:
        """The adapter's flags first, then the model, the data and the trainer."""
        return help_text(self.prog, self.sections)

    def error(self, message: str) -> Any:
        """End with one line; argparse would print some hundred lines of usage before it.

        Args:
            message: What is wrong.
        """
        self.exit(2, f"{self.prog}: {message}. All flags: {self.prog} --help\n")

    def parse_args_and_config(self, args: Any = None, **kwargs: Any) -> Any:
        """Parse flags and files into the dataclasses; see TRL's parser.

        Raises:
            ValueError: A file cannot be read, or something that was given means nothing here; the file is named.
        """
        words = list(sys.argv[1:] if args is None else args)
        origins: dict[str, str] = {}
        values = self._file_values(words, origins)
        self._import(words, values.get("moe_import"))
        values = self._known(values, origins)
        self.set_defaults_with_config(**values)
        namespace, unknown = self.parse_known_args(words)
        if unknown and not kwargs.get("return_remaining_strings"):
            raise ValueError(self._unknown(unknown))
        named = {name for name in vars(namespace) if _is_named(name, words)}
        self.given = frozenset(named | values.keys())
        self._fill_in(namespace)
        self._check_method(namespace, origins, named)
        if kwargs.get("return_remaining_strings"):
            return super().parse_args_and_config(words, **kwargs)
        parsed = super().parse_args_and_config(words)
        parsed[-1].given = self.given
        return parsed

    def _file_values(self, words: list[str], origins: dict[str, str]) -> dict[str, Any]:
        """Settings of the run file and of the method file, which are taken out of the words."""
        run, method, preset = (_take(words, name) for name in ("config", "moe_config", "moe_preset"))
        if method is not None and preset is not None:
            raise ValueError(f"--moe_config {method} and --moe_preset {preset} are the same flag; give one of them.")
        flag, method = ("--moe_config", method) if preset is None else ("--moe_preset", preset)
        values = _read(find_config(run, "--config", ("runs",)), origins) if run is not None else {}
        variables = values.pop("env", {})
        if not isinstance(variables, dict):
            raise ValueError(f"{run}: `env` must be a mapping from names of variables to values.")
        os.environ.update({key: str(value) for key, value in variables.items()})
        if method is None:
            return values
        own = _read(find_config(method, flag, ("methods",)), origins)
        if own.get(METHOD_FLAG, values.get(METHOD_FLAG)) != values.get(METHOD_FLAG):
            kept = {k: v for k, v in values.items() if not k.startswith(PREFIX) or k in OF_THE_RUN}
            left_out = sorted(values.keys() - kept.keys() - own.keys())
            if left_out:
                print(f"{method} describes another method than {run}, whose {', '.join(left_out)} are left out.")
            values = kept
        return {**values, **own}

    def _import(self, words: list[str], of_files: Any) -> None:
        """Import files of the user's own, and take flags for what they have registered."""
        own = [of_files] if isinstance(of_files, str) else list(of_files or [])
        names = [*map(str, own), *named_imports(words)]
        import_parts(names)
        if names:
            types = [renewed(own) if issubclass(own, ScriptFlags) else own for own in self.dataclass_types]
            self.__init__(types, ignores_unknown_keys=self.ignores_unknown_keys, **self.settings)  # type: ignore[misc]

    def _known(self, values: dict[str, Any], origins: dict[str, str]) -> dict[str, Any]:
        """Settings that this parser has; what others there are is refused, or left out where a file is another's."""
        known = {action.dest for action in self._actions}
        if self.ignores_unknown_keys:
            return {name: value for name, value in values.items() if name in known}
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(
                    f"{origins[name]}: the key {shown(name)} means nothing to {self.prog}.{hint} Remove it."
                )
        return values

    def _unknown(self, words: list[str]) -> str:
        """What to say of words that are no flags."""
        flags = [option for action in self._actions for option in action.option_strings if "-" not in option[2:]]
        flag = next((word for word in words if word.startswith("--")), words[0]).partition("=")[0]
        near = difflib.get_close_matches(flag, flags, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"See {self.prog} --help."
        return f"{flag} is no flag of {self.prog}. {hint}"

    def _fill_in(self, namespace: Any) -> None:
        """Set what follows from what was given."""
        known = {action.dest for action in self._actions}
        for pair in SAME:
            said = [name for name in pair if name in self.given]
            if known >= set(pair) and len(said) < len(pair):
                # The old name alone would bring a warning about itself, and TRL has a default of the old name.
                old, new = pair
                self.set_defaults(**{new: getattr(namespace, said[0] if said else old), old: None})
        if getattr(namespace, "use_cpu", False) and not {"bf16", "fp16"} & self.given:
            self.set_defaults(bf16=False)

    def _check_method(self, namespace: Any, origins: dict[str, str], named: set[str]) -> None:
        """Refuse keys of a file that the method lacks, which a shared file may hold."""
        method = getattr(namespace, METHOD_FLAG, None)
        if method is None:
            return
        fields = owners()
        for name, origin in origins.items():
            given = name not in named and getattr(namespace, name, None) is not None  # null sets nothing
            lacking = name.startswith(PREFIX) and name not in SCRIPT_FIELDS and given
            if lacking and name in self.given and method not in fields.get(name.removeprefix(PREFIX), {}):
                methods = ", ".join(fields.get(name.removeprefix(PREFIX), {}))
                raise ValueError(
                    f"{origin}: {name} has no meaning for {METHOD_FLAG} {method}, but for {methods}. Take it out of "
                    "the file, or give --moe_config with a file of that method's."
                )


def _is_named(name: str, words: list[str]) -> bool:
    """Whether a flag is among the words, in one of its spellings."""
    bare = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
    return name in bare or f"no_{name}" in bare


def _take(words: list[str], name: str) -> str | None:
    """Take a flag and its value out of the words; the last one counts."""
    value = None
    index = 0
    while index < len(words):
        flag, equals, own = words[index].partition("=")
        if flag not in (f"--{name}", f"--{name.replace('_', '-')}"):
            index += 1
            continue
        words.pop(index)
        if not equals:
            if index == len(words) or words[index].startswith("--"):
                raise ValueError(f"--{name} needs the path or the name of a YAML file; see `moe-peft configs`.")
            own = words.pop(index)
        value = own
    return value


def _read(path: Path, origins: dict[str, str]) -> dict[str, Any]:
    """Read a YAML file of settings, and note which file each comes from."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must hold a mapping of settings, as `learning_rate: 0.0002`, but holds {shown(values)}."
        )
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    origins.update(dict.fromkeys(values, str(path)))
    return values
