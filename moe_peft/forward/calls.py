"""The calls of a model and of its stacks: opened and closed, nested, recomputed, interrupted, in any thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..types import LossScale
from .batch import named_inputs
from .entry import ModuleEntry
from .forward_pass import ForwardPass
from .group_columns import take_groups
from .joined_losses import ForwardLosses
from .processes import num_processes
from .recomputation import NO_TASK, checkpoint_node, graph_task, next_node, owner_of_current_node
from .shared_cast import forget_cast
from .thread_state import Call, ThreadState

PASSES_ATTRIBUTE = "_moe_peft_passes"


class CallKeeper:
    """Keeps the stack of calls of each thread, and which pass a backward pass has reached.

    Attributes:
        loss_scale: Weight of the router losses in passes to come.
        group_columns: Allowed group values by the name of the batch column that carries them.
        needs: What parts read of a token's context beside its sequence; outside training passes it is made for them.
        in_reverse: The pass whose backward pass runs or ran last, which recomputations repeat; or None.
    """

    def __init__(self) -> None:
        self.loss_scale = 1.0
        self.group_columns: dict[str, frozenset[int]] = {}
        self.needs: frozenset[str] = frozenset()
        self._checked_columns: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        """Know of no pass."""
        self.in_reverse: ForwardPass | None = None
        self._thread = ThreadState()
        self._latest: ForwardLosses | None = None
        self._reached: dict[int, list[ForwardPass]] = {}
        self._busy: dict[int, threading.Thread] = {}

    @property
    def current(self) -> ForwardPass | None:
        """The innermost pass that runs in this thread, or None."""
        calls = self._thread.calls
        return self._pass_of(calls[-1]) if calls else None

    @property
    def latest(self) -> ForwardLosses | None:
        """Losses of this thread's latest training forward, of any thread's where this one had none; or None."""
        return self._thread.latest or self._latest

    def asked(self) -> tuple[ForwardPass | None, bool]:
        """The pass that a layer which asks belongs to, and whether it recomputes a part of it.

        Compiled code cannot ask autograd. It is compiled again where no forward is open, as none is in a backward.
        """
        calls = self._thread.calls
        if torch.compiler.is_compiling():
            if calls:
                return self._pass_of(calls[-1]), calls[-1].repeats
            return self.in_reverse, self.in_reverse is not None
        task = torch._C._current_graph_task_id()
        if calls and calls[-1].task == task:
            call = calls[-1]
            return call.forward_pass or self._pass_of(call), call.repeats
        return (None, False) if task == NO_TASK else (self._repeated_part(task), True)

    def open(
        self, entry: ModuleEntry, args: tuple, kwargs: dict[str, Any], *, hooked: bool
    ) -> tuple[tuple, dict[str, Any]]:
        """Begin a call of the model or of a stack; returns its arguments without the sample groups."""
        calls = self._thread.calls
        while entry.is_model and calls and calls[-1].hooked and not calls[-1].reached:
            calls.pop()  # an interrupt came between the hook and the forward
        call = self._begin(entry)
        call.hooked = hooked
        if entry.is_model or not call.whole_inputs:
            # A stack alone is what generation calls of an encoder.
            kwargs = dict(kwargs)
            call.groups = take_groups(
                kwargs,
                self.group_columns,
                given=self._thread.given_groups,
                needed=call.training or "groups" in self.needs,
                watched=bool(self._thread.observers),
                checked=self._checked_columns,
            )
        call.inputs = named_inputs(entry.module, args, kwargs)
        if entry.is_stack:
            self._pass_of(call)
        if not calls and not torch.compiler.is_compiling():
            self._busy[threading.get_ident()] = threading.current_thread()
        calls.append(call)
        return args, kwargs

    def reach(self, entry: ModuleEntry) -> bool:
        """Say that a module's forward is reached; returns whether hooks have opened the call."""
        calls = self._thread.calls
        if not calls or calls[-1].module is not entry.module or not calls[-1].hooked or calls[-1].reached:
            return False
        calls[-1].reached = True
        return True

    def close(self, entry: ModuleEntry, output: Any) -> Any:
        """End the innermost call, if it is one of this module; nothing is measured where an error ended it.

        Returns:
            The output, which carries the gradient of router losses that nothing else does.
        """
        calls = self._thread.calls
        if not calls or calls[-1].module is not entry.module:
            return output
        call = calls[-1]
        self.drop(len(calls) - 1)
        if output is None or (call.forward_pass is None and not call.training and not call.waiting):
            return output
        forward_pass = self._pass_of(call)
        if calls and calls[-1].is_model and not call.is_model:
            self._go_on_behind(calls[-1], forward_pass)
        if not forward_pass.training and not call.waiting:
            return output
        if not call.repeats:
            forward_pass.inside = call.inside
            forward_pass.last_node = next_node()
            output = self._finish_call(entry, call, forward_pass, output)
        if forward_pass.training and not torch.compiler.is_compiling():
            self._watch(forward_pass, call, output)
        return output

    def _finish_call(self, entry: ModuleEntry, call: Call, forward_pass: ForwardPass, output: Any) -> Any:
        """Make the router losses of a call that has ended known; of one inside a whole model when that ends.

        Processes may call different stacks, so that they meet at the end of the whole model alone. Compiled code ties
        losses to what its own stack returns, and cannot wait.
        """
        own = [forward_pass] if forward_pass.layers else []
        tied = any(made.tied for calls in forward_pass.layers.values() for made in calls)
        if torch.compiler.is_compiling() or tied or num_processes() == 1:
            return self.finish(forward_pass, output) if own else output
        around = self._thread.calls[-1] if self._thread.calls else None
        if around is not None and around.losses is call.losses:
            around.waiting += own
        else:
            self.finish_together(entry, [*call.waiting, *own], output)
        return output

    def _watch(self, forward_pass: ForwardPass, call: Call, output: Any) -> None:
        """Have the backward pass say when it reaches what a pass returned."""
        reached = partial(_reached if call.repeats else self._reverse, forward_pass)
        nodes = list(nodes_of(output))
        for node in nodes:
            node.register_prehook(reached)
        # What a reentrant checkpoint around the model returns is made in the recomputation.
        forward_pass.losses.scale.watched |= bool(nodes) or call.in_checkpoint

    def finish(self, forward_pass: ForwardPass, output: Any) -> Any:
        """Join and differentiate the router losses of a pass that has ended; returns what its stack does."""
        raise NotImplementedError

    def finish_together(self, entry: ModuleEntry, passes: Sequence[ForwardPass], output: Any) -> None:
        """Join and differentiate the router losses of all passes of a forward, with those of other processes."""
        raise NotImplementedError

    def depth(self) -> int:
        """Number of calls that are open in this thread."""
        return len(self._thread.calls)

    def drop(self, depth: int) -> None:
        """Forget the calls beyond a depth."""
        calls = self._thread.calls
        del calls[depth:]
        if not calls and not torch.compiler.is_compiling():
            self._busy.pop(threading.get_ident(), None)
            forget_cast()

    def _begin(self, entry: ModuleEntry) -> Call:
        calls, module, task = self._thread.calls, entry.module, graph_task()
        whole = calls[-1] if calls and calls[-1].is_model and calls[-1].task == task and not entry.is_model else None
        call = Call(
            module=module,
            training=module.training and torch.is_grad_enabled(),
            task=task,
            losses=ForwardLosses(LossScale(self.loss_scale)) if whole is None else whole.losses,
            is_model=entry.is_model,
            first_node=next_node(),
        )
        if whole is not None:
            call.groups, call.whole_inputs, call.repeats = whole.groups, whole.inputs, whole.repeats
            call.in_checkpoint, call.checkpoint = whole.in_checkpoint, whole.checkpoint
            call.training = call.training or (module.training and whole.in_checkpoint)
        if torch.compiler.is_compiling() or (task == NO_TASK and (calls or not module.training or call.training)):
            return call
        found, node = checkpoint_node()
        if found and task == NO_TASK:
            call.in_checkpoint, call.training = node is not None, module.training and node is not None
        elif found and call.training:
            call.repeats = True
        if node is not None:
            call.checkpoint = node
        return call

    def _pass_of(self, call: Call) -> ForwardPass:
        """The pass of a call, made when somebody first asks."""
        if call.forward_pass is None and call.repeats:
            call.forward_pass = self._repeated_whole(call)
            call.repeats = call.forward_pass is not None
        if call.forward_pass is None:
            call.forward_pass = ForwardPass.of(call, self.needs)
            if call.training:
                self._thread.latest = self._latest = call.losses
                if call.in_checkpoint and call.checkpoint is not None:
                    _passes_of(call.checkpoint).append(call.forward_pass)
        return call.forward_pass

    def _repeated_whole(self, call: Call) -> ForwardPass | None:
        """The pass of a module that runs again as a whole; None where it was no training pass."""
        if call.checkpoint is not None:
            passes = _passes_of(call.checkpoint)
            found = next((made for made in passes if made.module is call.module), None)
            if found is not None:
                passes.append(passes.pop(passes.index(found)))
            return found
        reached = [made for made in self._reached.get(call.task, []) if made.module is call.module]
        return owner_of_current_node(reached)

    def _repeated_part(self, task: int) -> ForwardPass | None:
        """The pass that a recomputation in a backward pass repeats a part of."""
        reached = self._reached.get(task)
        return owner_of_current_node(reached) if reached else self._thread.reached or self.in_reverse

    def _go_on_behind(self, whole: Call, stack: ForwardPass) -> None:
        """Tell the places behind a stack, heads, about the tokens that it returned."""
        whole.behind = stack
        whole.inside.append(stack)
        if whole.forward_pass is not None:
            whole.forward_pass.follow(stack)

    def _reverse(self, forward_pass: ForwardPass, grads: tuple) -> None:
        """Note that a backward pass has reached what a pass returned, until that backward pass ends."""
        _reached(forward_pass, grads)
        task = graph_task()
        if task not in self._reached:
            self._reached[task] = []
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._end_reverse, task))
        # Those inside as well: what comes behind a stack may be recomputed together with it.
        passes = [forward_pass, *forward_pass.inside]
        earlier = [made for made in self._reached[task] if not any(made is other for other in passes)]
        self._reached[task] = earlier + passes
        self.in_reverse = self._thread.reached = forward_pass

    def _end_reverse(self, task: int) -> None:
        reached = self._reached.pop(task, [])
        if any(made is self.in_reverse for made in reached):
            self.in_reverse = None
        if any(made is self._thread.reached for made in reached):
            self._thread.reached = None


def nodes_of(output: Any) -> Iterator[Any]:
    """Autograd nodes that made the tensors of a module's output, however it nests them."""
    if isinstance(output, torch.Tensor):
        if output.grad_fn is not None:
            yield output.grad_fn
    elif isinstance(output, (Mapping, tuple, list)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from nodes_of(part)


def _reached(forward_pass: ForwardPass, grads: tuple) -> None:
    """Count that a backward pass has reached what a pass returned."""
    forward_pass.losses.scale.reached += 1


def _passes_of(node: Any) -> list[ForwardPass]:
    """The passes that ran first inside a reentrant checkpoint, kept by its autograd node."""
    if not hasattr(node, PASSES_ATTRIBUTE):
        setattr(node, PASSES_ATTRIBUTE, [])
    passes: list[ForwardPass] = getattr(node, PASSES_ATTRIBUTE)
    return passes
