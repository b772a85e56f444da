"""One thread per test process: the models are tiny, and threads of several processes would wait for each other.

Tests are handed out to the processes in groups: whoever shares a fixture of a module or of the session runs where it
has been made. Rooms whose tests take seconds each come first, so that no process waits long for another at the end.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections import Counter

import pytest
import torch
from huggingface_hub import constants

from tests.versions import NOT_COMPATIBLE, TRANSFORMERS_ASKS_FOR_MORE

# pytest imports moe_peft for its warning filter before it reads this file, too early for the variable above.
constants.HF_HUB_OFFLINE = os.environ["HF_HUB_OFFLINE"] == "1"
torch.set_num_threads(1)

# Rooms with tests that train, or start processes.
LONG = ("hub", "integrations", "processes", "train", "test_docs.py")
# Tests of a file that are handed out together, where none of them takes long.
TOGETHER = 16


def shared_fixtures(item: pytest.Item) -> list[str]:
    """Where the fixtures are made that a test shares with others: folder or file."""
    definitions = [own for made in item._fixtureinfo.name2fixturedefs.values() for own in made]
    return sorted({own.baseid for own in definitions if own.scope != "function" and own.baseid.startswith("tests/")})


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Group the tests for `--dist loadgroup`, and put those that take long first."""
    before: Counter[str] = Counter()
    for item in items:
        file, shared = item.nodeid.partition("::")[0], shared_fixtures(item)
        before[file] += 1
        group = shared[0] if shared else file if is_long(item) else f"{file}, part {before[file] // TOGETHER}"
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: not is_long(item))


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
