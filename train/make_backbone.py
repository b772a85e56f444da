"""Pretrain a tiny Llama-style model on the documentation of the Python standard library, on CPU.

The quickstart needs a backbone that has read something and that needs no download. A byte-level BPE tokenizer and a
causal language model of about one million parameters are trained on plain text (`stdlib_docs.pretraining_texts`),
never on the instruction pairs, and without the names of the test split. The result is an ordinary checkpoint folder
that `from_pretrained` reads, with a `backbone.json` that says how it was made.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stdlib_docs
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

DEFAULT_DATA_DIR = ".cache/quickstart/data"
DEFAULT_OUTPUT_DIR = ".cache/quickstart/backbone"
RECORD_NAME = "backbone.json"
MAX_LENGTH = 512  # tokens


@dataclasses.dataclass(frozen=True)
class BackboneSettings:
    """Everything that decides the weights, besides the data.

    Attributes:
        vocab_size: Tokens of the tokenizer, the three special ones included.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_hidden_layers: Decoder layers.
        num_attention_heads: Attention heads.
        initializer_range: Standard deviation of the initial matrices; Llama's 0.02 starts too slowly at this width.
        block_size: Length of a packed training sequence, in tokens.
        batch_size: Sequences per step.
        num_steps: Optimizer steps.
        learning_rate: Peak learning rate of AdamW.
        warmup_steps: Steps of linear warm-up before the cosine decay to zero.
        weight_decay: Weight decay of the matrices.
        max_grad_norm: Gradient norm that larger gradients are scaled down to.
        seed: Seed of the initial weights and of the order of the blocks.
    """

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    initializer_range: float = 0.06
    block_size: int = 256
    batch_size: int = 4
    num_steps: int = 800
    learning_rate: float = 4e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0


def make_backbone(
    output_dir: str | Path = DEFAULT_OUTPUT_DIR,
    data_dir: str | Path = DEFAULT_DATA_DIR,
    *,
    settings: BackboneSettings | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Train the tokenizer and the model, or find them in the cache.

    Args:
        output_dir: Checkpoint folder. It appears only when it is complete.
        data_dir: Folder of `stdlib_docs.write_splits`; written first if a file is absent.
        settings: Sizes and hyper-parameters.
        force: Train again even if the cache matches.

    Returns:
        The content of `backbone.json`: `settings_hash`, `python`, `settings`, `num_parameters`, `num_steps`,
        `train_loss` (mean of the last tenth of the steps) and `held_out_loss` (names of the test split), both in
        nats per token.

    Raises:
        FileExistsError: If `output_dir` holds something else than a backbone.
    """
    settings = settings or BackboneSettings()
    output_dir, data_dir = Path(output_dir), Path(data_dir)
    if not all((data_dir / name).exists() for name in stdlib_docs.FILE_NAMES):
        stdlib_docs.write_splits(data_dir)
    settings_hash = _settings_hash(settings, data_dir)
    cached = read_record(output_dir)
    if cached is not None and cached["settings_hash"] == settings_hash and not force:
        return cached
    if cached is None and output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(f"{output_dir} is not empty and has no {RECORD_NAME}: choose another output_dir")

    tokenizer, model, losses = _train(settings, data_dir)
    record = {
        "settings_hash": settings_hash,
        "python": platform.python_version(),
        "settings": dataclasses.asdict(settings),
        "num_parameters": model.num_parameters(),
        "num_steps": settings.num_steps,
        **losses,
    }
    _save(output_dir, tokenizer, model, record)
    return record


def read_record(output_dir: str | Path) -> dict[str, Any] | None:
    """Return the content of `backbone.json` in a folder, or None if there is none."""
    path = Path(output_dir) / RECORD_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _settings_hash(settings: BackboneSettings, data_dir: Path) -> str:
    """Hash what decides the weights: the settings, the interpreter's version and the bytes of the text."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(settings), sort_keys=True).encode())
    digest.update(platform.python_version().encode())
    for name in ("pretrain.jsonl", "pretrain_test.jsonl"):
        digest.update((data_dir / name).read_bytes())
    return digest.hexdigest()[:16]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that starts every text with `<s>`, as Llama's does.

    Args:
        texts: Plain text.
        vocab_size: Tokens, special ones included; at least 256 bytes and 3 special tokens.

    Returns:
        Tokenizer with bos, eos and pad tokens. Any text survives encoding and decoding.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=MAX_LENGTH
    )


def build_model(settings: BackboneSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model, float32, with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_attention_heads,
        initializer_range=settings.initializer_range,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).float()


def pack_blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast, block_size: int) -> torch.Tensor:
    """Join the encoded texts, each closed with eos, and cut them into blocks.

    Returns:
        Token ids, shape (num_blocks, block_size); the incomplete last block is dropped.
    """
    eos = [tokenizer.eos_token_id]
    ids = [token for encoded in tokenizer(texts, verbose=False)["input_ids"] for token in encoded + eos]
    num_blocks = len(ids) // block_size
    return torch.tensor(ids[: num_blocks * block_size]).view(num_blocks, block_size)


def _train(
    settings: BackboneSettings, data_dir: Path
) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM, dict[str, float]]:
    texts, held_out_texts = (_read_texts(data_dir / name) for name in ("pretrain.jsonl", "pretrain_test.jsonl"))
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    # The caller's random state is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = build_model(settings, tokenizer)
        train_loss = _pretrain(model, pack_blocks(texts, tokenizer, settings.block_size), settings)
    held_out_loss = _mean_loss(model, pack_blocks(held_out_texts, tokenizer, settings.block_size))
    return tokenizer, model, {"train_loss": train_loss, "held_out_loss": held_out_loss}


def _read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def _pretrain(model: LlamaForCausalLM, blocks: torch.Tensor, settings: BackboneSettings) -> float:
    """Train in place; return the mean loss of the last tenth of the steps, in nats per token."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
    scheduler = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.num_steps)
    batches = _shuffled_batches(blocks, settings.batch_size)
    losses = []
    model.train()
    progress = tqdm(range(settings.num_steps), desc="Pretraining the backbone", unit="step")
    for _ in progress:
        batch = next(batches)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def _shuffled_batches(blocks: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield batches of shape (batch_size, block_size) for ever, reshuffled every epoch."""
    while True:
        for indices in torch.randperm(len(blocks)).split(batch_size):
            yield blocks[indices]


@torch.no_grad()
def _mean_loss(model: LlamaForCausalLM, blocks: torch.Tensor) -> float:
    """Return the mean loss over blocks of equal length, in nats per token."""
    model.eval()
    losses = [model(input_ids=block[None], labels=block[None]).loss.item() for block in blocks]
    return sum(losses) / len(losses)


def _save(output_dir: Path, tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, record: dict) -> None:
    """Write into a temporary sibling and rename, so that an interrupted run leaves no half cache."""
    unfinished = output_dir.parent / f".{output_dir.name}-{os.getpid()}"
    unfinished.mkdir(parents=True)
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if output_dir.exists():
            shutil.rmtree(output_dir)
        os.replace(unfinished, output_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def main() -> None:
    """Make the backbone and print its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default=DEFAULT_OUTPUT_DIR, help="checkpoint folder to write")
    parser.add_argument("--data_dir", default=DEFAULT_DATA_DIR, help="folder of stdlib_docs.py, written if absent")
    parser.add_argument("--num_steps", type=int, default=BackboneSettings.num_steps, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=BackboneSettings.seed, help="seed of weights and block order")
    parser.add_argument("--force", action="store_true", help="train again even if the cache matches")
    args = parser.parse_args()
    settings = BackboneSettings(num_steps=args.num_steps, seed=args.seed)
    record = make_backbone(args.output_dir, args.data_dir, settings=settings, force=args.force)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
