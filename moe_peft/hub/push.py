"""Uploads a routed adapter to the Hub, with a model card that says what it is, in one commit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig, PeftModel
from torch import nn

from ..config.adapter_files import WEIGHTS, check_adapter_files, num_parameters, read_json_object
from ..config.config import MoeConfig
from ..messages import shown, warn
from .card import hub_card, is_hub_name, read_card

CONFIG, CARD = "adapter_config.json", "README.md"
# A tokenizer's and a processor's files; everything else in a training folder stays there unless it is asked for.
BESIDE = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"]
BESIDE += ["chat_template*", "additional_chat_templates/*", "*processor_config.json"]
BESIDE += ["routing.png"]  # to which the card of a training script links

NETWORK_ERRORS = (HTTPError, ConnectionError, TimeoutError)


def push_adapter(
    model_or_folder: nn.Module | str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    metrics: Mapping[str, float] | None = None,
    base_model: str | None = None,
    include: Sequence[str] = (),
) -> CommitInfo:
    """Upload an adapter to the Hub, with a model card that links it to its base model and says how to load it.

    One commit holds adapter_model.safetensors, adapter_config.json, README.md and the files of a tokenizer or
    processor. Optimizer states, checkpoints, training_args.bin, logs and whatever else lies in the folder stay there
    unless `include` names them. The card is the folder's README.md with its metadata corrected and our section added;
    the folder itself is not changed. Other files of an existing repository stay, its card is replaced.

    With several processes call it in the main one alone; where weights are sharded (FSDP, ZeRO), save first and push
    the folder.

    Args:
        model_or_folder: A `PeftModel`, of which the active adapter is pushed, or a folder that `save_pretrained` or a
            trainer's `save_model` wrote.
        repo_id: "user/name" on the Hub, made if it does not exist.
        token: Token with write access; None takes the one of `hf auth login` or of HF_TOKEN.
        private: Whether a new repository is private; an existing one stays as it is.
        revision: Branch, made if it does not exist; None is the main branch.
        commit_message: First line of the commit.
        metrics: Results that the card shows, by name, such as a trainer's last evaluation.
        base_model: Name of the base model on the Hub, for an adapter that was trained on a local copy of it; written
            into the card and the uploaded adapter_config.json.
        include: Glob patterns of further files of the folder, such as "routing_history.safetensors" or "runs/*".

    Returns:
        The commit; its `repo_url` and `commit_url` say where it is.

    Raises:
        ValueError: There is no complete routed adapter, or a name or pattern cannot work; nothing has been sent.
        PermissionError: There is no token, or it may not write there.
        ConnectionError: The connection broke; the same call takes up what has not arrived.
        OSError: The Hub refused for another reason. These three name the folder that still holds the adapter, which
            for a model is a temporary one.
    """
    validate_repo_id(repo_id)
    if base_model is not None and not is_hub_name(base_model):
        raise ValueError(f"base_model={shown(base_model)} must be the name of a model on the Hub, such as 'org/name'.")
    with _folder_of(model_or_folder) as folder:
        config = _read_config(folder)
        contents = _contents(folder, include, base_model)
        card = read_card(folder / CARD)
        facts = dataclasses.replace(
            config.facts(),
            base_model=base_model or config.base_model_name_or_path,
            num_parameters=num_parameters(folder),
            metrics=metrics or {},
        )
        _warn_of_local_base(facts.base_model)
        with _explained(repo_id, folder):
            api = HfApi(token=token or True)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            contents[CARD] = hub_card(card, dataclasses.replace(facts, name=repo_id)).encode()
            operations = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
            return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)


@contextmanager
def _folder_of(model_or_folder: nn.Module | str | os.PathLike) -> Iterator[Path]:
    """The folder itself, or a temporary one with the model's active adapter, which outlives a failed upload."""
    if isinstance(model_or_folder, (str, os.PathLike)):
        yield Path(model_or_folder)
        return
    model, name = _routed_model(model_or_folder)
    folder = Path(tempfile.mkdtemp(prefix="moe_peft_"))
    try:
        model.save_pretrained(str(folder), selected_adapters=[name])
        if name != "default":  # peft puts it into a subfolder, but not its card
            shutil.move(folder / CARD, folder / name / CARD)
        yield folder if name == "default" else folder / name
    except ValueError:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def _routed_model(model: nn.Module) -> tuple[PeftModel, str]:
    """The model and the name of its active adapter, checked."""
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"push_adapter takes a PeftModel or a folder, not {type(model).__name__}. Adapt the model with "
            "peft.get_peft_model, or save its adapter with save_pretrained(folder) and push the folder."
        )
    names = model.active_adapters
    if len(names) != 1:
        raise ValueError(f"The adapters {names} are active; choose the one to push with model.set_adapter(name).")
    _check_routed(model.peft_config[names[0]], f"The adapter {shown(names[0])}")
    return model, names[0]


def _read_config(folder: Path) -> MoeConfig:
    path = folder / CONFIG
    _refuse_outside(folder, CONFIG, path)
    _refuse_outside(folder, CARD, folder / CARD)
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {CONFIG}, so it is not the folder of an adapter. Name the folder that "
            "model.save_pretrained or trainer.save_model wrote."
        )
    found = read_json_object(path).get("peft_type")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has the unknown peft_type {shown(found)}. Upgrade peft-moe, or peft.") from error
    _check_routed(config, str(path))
    check_adapter_files(str(folder), None, config.expected_shapes())
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS}. Save the adapter again with model.save_pretrained(folder).")
    return config


def _check_routed(config: PeftConfig, where: str) -> None:
    if not isinstance(config, MoeConfig):
        raise ValueError(
            f"{where} is of the type {config.peft_type}, which is not a routed adapter of moe_peft. Push it with "
            "peft's own model.push_to_hub(repo_id)."
        )


def _contents(folder: Path, include: Sequence[str], base_model: str | None) -> dict[str, bytes | Path]:
    """Files to upload by name, without the card."""
    contents: dict[str, bytes | Path] = {CONFIG: folder / CONFIG, WEIGHTS: folder / WEIGHTS}
    for pattern in (*BESIDE, *include):
        inside = not Path(pattern).is_absolute() and ".." not in Path(pattern).parts
        found = [path for path in folder.glob(pattern) if path.is_file()] if inside else []
        if pattern in include and not found:
            raise ValueError(f"include={shown(pattern)} matches no file inside {folder}. Correct it, or leave it out.")
        contents |= {path.relative_to(folder).as_posix(): path for path in found}
    for name, path in contents.items():
        _refuse_outside(folder, name, path)
    if base_model is not None:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        fields["base_model_name_or_path"] = base_model
        contents[CONFIG] = json.dumps(fields, indent=2, sort_keys=True).encode()
    return contents


def _refuse_outside(folder: Path, name: str, path: bytes | Path) -> None:
    """Refuse a link that leads out of the folder, as what lies there was not meant to be published."""
    if isinstance(path, Path) and not path.resolve().is_relative_to(folder.resolve()) and not _is_cached(folder, path):
        raise ValueError(
            f"{folder / name} is a link to {path.resolve()}, outside of the folder, and would publish what lies "
            "there. Put a copy of the file into the folder, or take the link out."
        )


def _is_cached(folder: Path, path: Path) -> bool:
    """Whether a link leads to the file's content in the same download cache, as all links in a snapshot do."""
    repository = folder.resolve().parent.parent
    return folder.resolve().parent.name == "snapshots" and path.resolve().is_relative_to(repository / "blobs")


def _warn_of_local_base(base_model: str | None) -> None:
    if not is_hub_name(base_model):
        warn(
            f"The base model {shown(base_model)} is not a name on the Hub, so the card links to none and "
            "AutoPeftModel cannot find it. If the Hub has it, push with base_model='org/name'."
        )


@contextmanager
def _explained(repo_id: str, folder: Path) -> Iterator[None]:
    """Turn what goes wrong in an upload into an error that says where the adapter is and what to do."""
    try:
        yield
    except Exception as error:
        cause = _network_cause(error)
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        reason = " ".join(str(error).split())
        kind: type[OSError] = OSError
        fix = "Correct what the Hub names, and"
        if isinstance(error, LocalTokenNotFoundError):
            kind, reason = PermissionError, "there is no token"
            fix = "Log in with `hf auth login`, set HF_TOKEN, or pass token=..., and"
        elif status == 401:
            kind, reason = PermissionError, f"the Hub does not know the token ({reason})"
            fix = "Take a valid one with write access from huggingface.co/settings/tokens, and"
        elif status == 403:
            kind, reason = PermissionError, f"the token may not write there ({reason})"
            fix = "Take a token with write access to this name, or a name of your own, and"
        elif status is None and isinstance(cause, NETWORK_ERRORS):
            kind, reason = ConnectionError, f"the connection broke ({type(cause).__name__}: {cause})"
            fix = "Once the Hub can be reached,"
        raise kind(
            f"The upload to {repo_id} did not finish: {reason}. The adapter lies complete and unchanged in {folder}. "
            f"{fix} call moe_peft.push_adapter({shown(str(folder))}, {shown(repo_id)}, ...) again."
        ) from error


def _network_cause(error: BaseException) -> BaseException | None:
    """The first error of the network among an error and its causes; the Hub's library wraps those of single files."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, NETWORK_ERRORS):
        cause = cause.__cause__
    return cause
