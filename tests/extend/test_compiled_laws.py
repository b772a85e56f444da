"""A compiled training step of registered parts is one graph with the gradients of the step that is not compiled."""

from __future__ import annotations

import pytest
import torch

from . import registered
from .cases import PARTS, batch_for, context_needs, make, name_of
from .combinations import placed

pytestmark = pytest.mark.slow
# Numbers of tasks are checked on the host, where a graph breaks.
with registered():
    CASES = [*placed(), *(choice for choice in PARTS[:11] if "groups" not in context_needs(choice))]


def gradients(call, model, batch) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    call(**batch, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("choice", CASES, ids=name_of)
def test_a_compiled_training_step_is_one_graph_with_the_same_gradients(choice):
    torch._dynamo.reset()
    plain, model = (make("llama", choice, train=True, dtype=torch.float32) for _ in range(2))
    batch = batch_for("llama", choice, labels=True)
    expected = gradients(plain, plain, batch)
    found = gradients(torch.compile(model, backend="aot_eager", fullgraph=True), model, batch)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text
        )
