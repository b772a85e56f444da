"""Where nobody sees a decision, experts act by weights alone, as they would by the decision; elsewhere it is made."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from moe_peft.experts import EXPERTS, Experts, LowRankExperts, VectorExperts
from moe_peft.extend import GATES, SELECTORS, Selector
from moe_peft.ops.choice import SEPARATE_ROWS
from moe_peft.routers import DenseRouter, Router
from moe_peft.routers.capacity import Capacity
from moe_peft.routers.dense import Dense
from moe_peft.routers.linear import LinearRouter
from moe_peft.routers.top_k import TopK
from moe_peft.types import Routing, TokenContext
from tests.compare import assert_same

D, OUT, E, R, T = 7, 5, 6, 2, 13
QUIET = TokenContext()
X = torch.linspace(-1, 1, 3 * D).view(3, D)
SHORT = {
    "dense": lambda: Dense(),
    "top_k": lambda: TopK(top_k=2, norm_topk_prob=True, expert_dropout=0.5),
    "capacity": lambda: Capacity(top_k=2, capacity_factor=0.5),
}


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "relu"])
@pytest.mark.parametrize("name", SHORT)
def test_weights_alone_are_those_of_the_decision_with_their_gradient(name, gate):
    torch.manual_seed(0)
    router = LinearRouter(D, E, select=SHORT[name](), gate=GATES[gate](), routed_scaling_factor=1.5).double()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    gates_TE = router.gates(x, QUIET)
    leaves = [x, router.weight]
    assert gates_TE is not None
    assert_same(gates_TE, router(x, QUIET).gate_matrix(), leaves, leaves, 1e-12)


@pytest.mark.parametrize("name", [name for name, own in SELECTORS.items() if own.gates is Selector.gates])
def test_a_rule_without_a_short_way_leaves_it_to_the_decision(name):
    assert name not in SHORT
    router = LinearRouter(D, E, select=SHORT["top_k"]())
    router.select.__class__ = type("Own", (TopK,), {"pick": lambda self, probs_TE: probs_TE.topk(1)})
    router.scores = None  # nothing is scored in vain
    assert router.gates(torch.randn(T, D), QUIET) is None


def overriding(base, **methods):
    return type("Own", (base,), methods)


def test_a_part_that_decides_in_its_own_way_has_no_short_way_by_inheritance():
    own = {name: (lambda self, *args, **kwargs: None) for name in ("__call__", "decide", "forward", "pick")}
    assert overriding(Dense, __call__=own["__call__"]).gates is Selector.gates
    assert overriding(TopK, pick=own["pick"]).gates is Selector.gates
    assert overriding(TopK).gates is TopK.gates
    x = torch.randn(T, D)
    for name in ("decide", "forward"):
        assert overriding(DenseRouter, **{name: own[name]})(D, E).gates(x, QUIET) is None
    router = DenseRouter(D, E)
    router.decide = own["decide"]
    assert router.gates(x, QUIET) is None


def banks():
    torch.manual_seed(0)
    sizes = {"num_experts": E, "r": R, "scaling": 0.7, "init_weights": False}
    yield LowRankExperts(D, OUT, **sizes)
    activated = {name: value for name, value in sizes.items() if name != "scaling"}
    yield EXPERTS["bottleneck"](D, OUT, **activated)
    yield VectorExperts(OUT, OUT, num_experts=E, init_weights=False)


@pytest.mark.parametrize("bank", list(banks()), ids=lambda bank: type(bank).__name__)
@pytest.mark.parametrize("top_k", [None, 2])
def test_experts_act_by_weights_as_by_the_decision_with_all_gradients(bank, top_k):
    bank, router = bank.double(), LinearRouter(D, E, select=Dense() if top_k is None else TopK(top_k=top_k)).double()
    x, base = (torch.randn(T, width, dtype=torch.float64, requires_grad=True) for width in (D, OUT))
    assert bank.takes_gates(x, router.num_slots)
    routing = router(x, QUIET)
    leaves = [x, base, router.weight, *bank.parameters()]
    assert_same(bank.add_gated(x, base, routing.gate_matrix(), QUIET), bank(x, base, routing), leaves, leaves, 1e-12)
    with torch.no_grad():
        added = bank.add_gated(x, base.clone(), routing.gate_matrix(), QUIET, in_place=True)
        assert torch.equal(added, bank(x, base.clone(), routing, in_place=True))


def test_a_kind_that_combines_in_its_own_way_takes_no_weights():
    x = torch.randn(T, D)
    for base in (LowRankExperts, VectorExperts):
        kind = overriding(base, combine=lambda self, *args, **kwargs: None)
        sizes = {"r": R, "scaling": 1.0} if base is LowRankExperts else {}
        assert not kind(D, D, num_experts=E, **sizes).takes_gates(x, E)
    assert not Experts().takes_gates(x, E)
    with pytest.raises(NotImplementedError, match="Experts needs a decision"):
        Experts().add_gated(x, x, x, QUIET)
    for other in ({"shared": 1}, {"experts_implementation": "eager"}):
        assert not LowRankExperts(D, OUT, num_experts=E, r=R, scaling=1.0, **other).takes_gates(x, E)


def layers():
    from peft import get_peft_model

    from moe_peft import MovConfig, RoutedConfig

    for config in (
        RoutedConfig(num_experts=E, r=R, router="top_k", top_k=2, target_modules=["0"], init_weights=False),
        MovConfig(num_experts=E, target_modules=["0"], feedforward_modules=[], init_weights=False),
    ):
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(D, OUT)), config).eval()
        yield model, model.base_model.model[0]


@contextmanager
def counted(monkeypatch):
    made = []
    own = Routing.__post_init__
    with monkeypatch.context() as patch:
        patch.setattr(Routing, "__post_init__", lambda self: (made.append(self), own(self))[1])
        yield made


@contextmanager
def noted(seen, layer):
    """Have somebody look: at calls of a part, at those of any module, or at decisions."""
    fired: list[object] = []

    def note(*args):
        fired.append(args)

    parts, handles = dict(zip(("router", "bank"), layer.parts_of("default"), strict=True)), []
    if seen in parts:
        handles.append(parts[seen].register_forward_hook(note))
    if seen == "all":
        handles.append(nn.modules.module.register_module_forward_hook(note))
    if seen == "observer":
        layer.tracker.observers.append(note)
    try:
        yield fired
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("seen", [None, "router", "bank", "all", "observer", "training"])
def test_a_decision_is_made_where_somebody_sees_it_and_nowhere_else(seen, monkeypatch):
    for model, layer in layers():
        with torch.no_grad(), counted(monkeypatch) as made:
            expected = layer(X)
        assert not made
        with noted(seen, layer) as fired, torch.set_grad_enabled(seen == "training"), counted(monkeypatch) as made:
            found = model.train(seen == "training")(X)
        assert bool(made) == (seen is not None)
        assert bool(fired) == (seen not in (None, "training"))
        torch.testing.assert_close(found, expected)


def test_many_tokens_training_passes_and_blocks_keep_the_decision():
    _, layer = next(layers())
    router, bank = layer.parts_of("default")
    assert layer.unseen_gates(router, bank, torch.randn(SEPARATE_ROWS, D), QUIET) is not None
    assert layer.unseen_gates(router, bank, torch.randn(SEPARATE_ROWS + 1, D), QUIET) is None
    assert layer.unseen_gates(router, bank, torch.randn(3, D), TokenContext(training=True)) is None
    layer.block = "0"
    assert layer.unseen_gates(router, bank, torch.randn(3, D), QUIET) is None
    assert isinstance(router, Router)
