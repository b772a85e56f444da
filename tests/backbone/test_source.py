"""What is asked of the source of a forward: the functions it leads to, their syntax, and paths of attributes."""

from __future__ import annotations

import ast

import pytest
from torch import nn

from moe_peft.backbone.source import attribute_path, definition_of, functions_of


def helper(module, x):
    return module.inner.up(x)


class Layer(nn.Module):
    def forward(self, x):
        return self.own(helper(self, x))

    def own(self, x):
        return self.forward(x) if x is None else x

    def unused(self, x):
        return x


def test_functions_are_the_forward_and_what_it_leads_to():
    assert {function.__name__ for function in functions_of(Layer)} == {"forward", "own", "helper"}


def test_class_without_a_forward_leads_nowhere():
    assert list(functions_of(int)) == []


def test_code_without_source_or_argument_has_no_definition():
    scope: dict = {}
    exec("def made(self):\n    return self", scope)
    assert definition_of(scope["made"]) is None
    assert definition_of(lambda: 1) is None
    definition = definition_of(helper)
    assert definition is not None and definition.name == "helper"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("module.inner.up", "inner.up"),
        ("module.up", "up"),
        ("module", None),
        ("other.up", None),
        ("f(module).up", None),
    ],
)
def test_path_of_attributes_begins_at_the_module(text, path):
    assert attribute_path(ast.parse(text, mode="eval").body, "module") == path
