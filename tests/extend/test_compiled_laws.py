"""A compiled training step of registered parts is one graph with the gradients of the step that is not compiled."""

from __future__ import annotations

import pytest
import torch

from . import registered
from .cases import PARTS, batch_for, make, name_of
from .combinations import placed

pytestmark = pytest.mark.slow
with registered():
    CASES = [*placed(), *PARTS]


def compiled_gradients(model, batch) -> dict[str, torch.Tensor]:
    """Those of one graph; of several where a part says why none can hold it, and what to leave out."""
    try:
        return gradients(torch.compile(model, backend="aot_eager", fullgraph=True), model, batch)
    except torch._dynamo.exc.Unsupported as error:
        if "leave fullgraph out" not in str(error):
            raise
    torch._dynamo.reset()
    return gradients(torch.compile(model, backend="aot_eager"), model, batch)


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
    found = compiled_gradients(model, batch)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text
        )
