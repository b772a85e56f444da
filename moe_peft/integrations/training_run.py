"""Stands around `trainer.train()`: whatever ends it, the model is left as a plain loop expects it.

A trainer tells its callbacks of the end of training only where it is reached. After an exception, or Ctrl-C, weights
of router losses and scheduled coefficients would otherwise stay as the last step needed them.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from accelerate import DistributedType
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .noise import compares_passes, keeps_dropout, without_noise
from .resuming import check_finite_weights, check_resumed, checkpoint_folder, write_missing_configs

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def running_trainer() -> Any:
    """The trainer whose `train` method the caller runs inside of; None in a loop of one's own."""
    train = _code_of_train()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not train:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("self")


@cache
def _code_of_train() -> CodeType:
    from transformers import Trainer  # its module imports datasets, which `import moe_peft` does not

    return inspect.unwrap(Trainer.train).__code__


class RestoringCallback(TrainerCallback):
    """A callback that changes the model for the time of training, and undoes it at the end.

    Attributes:
        count_micro_batches: Gives the micro-batches of the accumulation window that begins; None where no trainer
            tells.
    """

    count_micro_batches: Callable[[], int] | None = None

    def restore(self) -> None:
        """Undo what the callback has changed; nothing where there is nothing to undo."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it restores.")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the model."""
        self.restore()


class RunIsFinished(Exception):
    """The checkpoint that a run resumes from is that of its last step."""


class RunCallback(TrainerCallback):
    """Tells the callbacks of a trainer what only the trainer knows, and ends a run that has nothing left to train.

    Args:
        run: What stands in for the trainer's `train` method.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at resumed weights, and let callbacks that weigh micro-batches ask the trainer how many it fetched.

        Raises:
            ValueError: The checkpoint has brought values that are not finite.
        """
        if self.run.checkpoint is not None:
            check_finite_weights(self.run.trainer.model, self.run.checkpoint)
        for callback in self.run.trainer.callback_handler.callbacks:
            if isinstance(callback, RestoringCallback):
                callback.count_micro_batches = self.run.count_micro_batches

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete a checkpoint of which the trainer has written states of FSDP alone."""
        if state.is_world_process_zero:
            write_missing_configs(self.run.trainer.model, checkpoint_folder(args, state))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End a resumed run whose last step lies within an epoch, of which the trainer would train one step more.

        Raises:
            RunIsFinished: It does, and `TrainingRun` waits for it.
        """
        if self.run.running and 0 < state.max_steps <= state.global_step:
            raise RunIsFinished


class TrainingRun:
    """Stands in for a trainer's `train` method.

    Args:
        trainer: The trainer.
        prepare: Called with every model that is about to be trained: the trainer's own, or what `model_init` makes.
    """

    def __init__(self, trainer: Any, prepare: Callable[[nn.Module], None]) -> None:
        self.trainer = trainer
        self.prepare = prepare
        self.train = trainer.train
        self.running = False
        self.checkpoint: str | None = None  # of a run that resumes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Train; arguments and result as of `Trainer.train`.

        A checkpoint of a run's last step is loaded, and nothing is trained.

        Raises:
            ValueError: The checkpoint that is resumed was trained with settings that give its weights another meaning.
        """
        with ExitStack() as stack:
            stack.callback(self._restore)
            self.running, self.checkpoint = True, self._resumed(*args, **kwargs)
            stack.enter_context(self._prepared_models())
            try:
                return self.train(*args, **kwargs)
            except RunIsFinished:
                return self.trainer._finalize_training(None, 0, time.time())

    def count_micro_batches(self) -> int:
        """Micro-batches of the accumulation window that begins, all of which the trainer has fetched by then."""
        return self.trainer.current_gradient_accumulation_steps

    def _resumed(self, resume_from_checkpoint: str | bool | None = None, *_: Any, **__: Any) -> str | None:
        """The folder that a run resumes from; None where it starts at step 0, or the trainer will find no folder."""
        if resume_from_checkpoint is True:
            folder = self.trainer.args.output_dir
            return get_last_checkpoint(folder) if Path(folder).is_dir() else None
        return str(resume_from_checkpoint) if resume_from_checkpoint else None

    def _restore(self) -> None:
        self.running, self.checkpoint = False, None
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, RestoringCallback):
                callback.restore()

    @contextmanager
    def _prepared_models(self) -> Iterator[None]:
        """Prepare the model that is trained, and load checkpoints into it in the dtype that its weights train in."""
        trainer = self.trainer
        with ExitStack() as stack:

            def prepare(model: nn.Module) -> nn.Module:
                if self.checkpoint is not None:
                    check_resumed(model, self.checkpoint)
                self.prepare(model)
                if compares_passes(trainer):
                    stack.enter_context(without_noise(model, dropouts=not keeps_dropout(trainer.args)))
                if isinstance(model, PeftModel):
                    stack.enter_context(_loads_as_trained(model))
                return model

            if trainer.model_init is None:
                prepare(trainer.model)
            else:
                make = trainer.call_model_init
                trainer.call_model_init = lambda *args, **kwargs: prepare(make(*args, **kwargs))
                stack.callback(trainer.__dict__.pop, "call_model_init", None)
            yield


@contextmanager
def _loads_as_trained(model: PeftModel) -> Iterator[None]:
    """For a while, let `load_adapter` copy weights without a cast, and from the folder that is the adapter's own.

    Its default would turn the experts of a quantized model, which TRL trains in bfloat16, to float32. And a trainer
    names a checkpoint's folder alone, in which adapters that are not called "default" have folders of their own.
    """
    load = model.load_adapter

    def load_adapter(model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        folder = own_folder(model_id, adapter_name)
        return load(str(folder or model_id), adapter_name, *args, **{"autocast_adapter_dtype": False, **kwargs})

    model.load_adapter = load_adapter  # type: ignore[method-assign]
    try:
        yield
    finally:
        model.__dict__.pop("load_adapter", None)


def own_folder(checkpoint: Any, adapter_name: str) -> Path | None:
    """Where a checkpoint holds an adapter of this name in a folder of its own; None where it does not."""
    folder = Path(checkpoint) / adapter_name
    return folder if any((folder / name).is_file() for name in ADAPTER_FILES) else None


def load_best(args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
    """Load the weights of the best checkpoint, where they lie in an adapter's own folder, in which no trainer looks.

    Args:
        args: The trainer's arguments.
        state: Its state at the end of training.
        model: Its model.
    """
    if not args.load_best_model_at_end or state.best_model_checkpoint is None or not isinstance(model, PeftModel):
        return
    distributed = args.distributed_state
    if distributed is not None and distributed.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        return  # These load what their engines have saved, of all adapters.
    name = model.active_adapters[0]
    folder = own_folder(state.best_model_checkpoint, name)
    if folder is not None:
        model.load_adapter(str(folder), name, autocast_adapter_dtype=False)
