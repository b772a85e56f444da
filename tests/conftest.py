"""One thread per test process: the models are tiny, and threads of several processes would wait for each other."""

import os

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


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Skip a test at the call that this release of transformers refuses with this release of peft."""
    try:
        return (yield)
    except ValueError as error:
        if TRANSFORMERS_ASKS_FOR_MORE and NOT_COMPATIBLE in str(error):
            pytest.skip(f"transformers {TRANSFORMERS_ASKS_FOR_MORE}")
        raise
