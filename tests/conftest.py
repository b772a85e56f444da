"""One thread per test process: the models are tiny, and threads of several processes would wait for each other.

Tests are handed out to the processes by file (`--dist loadfile`), so that a file's fixtures are made once. Rooms whose
tests take seconds each come first, so that no process waits long for another at the end.
"""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from huggingface_hub import constants

from tests.versions import NOT_COMPATIBLE, TRANSFORMERS_ASKS_FOR_MORE

# pytest imports moe_peft for its warning filter before it reads this file, too early for the variable above.
constants.HF_HUB_OFFLINE = os.environ["HF_HUB_OFFLINE"] == "1"
torch.set_num_threads(1)

# Rooms with tests that train, or start processes.
LONG = ("hub", "integrations", "processes", "train", "test_docs.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Put the rooms whose tests take long first."""
    items.sort(key=lambda item: not is_long(item))


@pytest.fixture(autouse=True)
def compiled_code_is_forgotten():
    """Let a compiler look anew at what an earlier test compiled: it remembers functions that it could not trace."""
    yield
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is not None and frames.FRAME_COUNTER:
        torch._dynamo.reset()


def is_long(item: pytest.Item) -> bool:
    """Whether a test stands in a room whose tests take seconds."""
    return not set(LONG).isdisjoint(item.nodeid.partition("::")[0].split("/"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Skip a test at the call that this release of transformers refuses with this release of peft."""
    try:
        return (yield)
    except ValueError as error:
        if TRANSFORMERS_ASKS_FOR_MORE and NOT_COMPATIBLE in str(error):
            pytest.skip(f"transformers {TRANSFORMERS_ASKS_FOR_MORE}")
        raise
