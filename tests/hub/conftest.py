"""A local Hub with a base model on it, and a process that pushes to it; both serve all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import get_peft_model

from moe_peft import LoraMoeConfig
from tests.hub.client import Client
from tests.hub.server import LocalHub
from tests.tiny import tiny_llama

BASE = "user/base"


@pytest.fixture(scope="session")
def server():
    with LocalHub() as hub:
        yield hub
    assert not hub.unknown


@pytest.fixture(scope="session")
def client(server, tmp_path_factory):
    with Client(server, tmp_path_factory.mktemp("pushing")) as client:
        client.call("push_base", name=BASE, token=server.token)
        yield client


@pytest.fixture
def hub(server):
    """The Hub with its switches in their normal position."""
    server.upload_mode, server.read_only = "lfs", False
    server.cuts.clear()
    server.lfs.clear()
    return server


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved adapter of a base model that is on the Hub."""
    model = tiny_llama()
    model.name_or_path = BASE
    config = LoraMoeConfig(task_type="CAUSAL_LM", num_experts=3, init_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
