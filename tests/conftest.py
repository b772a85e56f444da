"""One thread per test process: the models are tiny, and threads of several processes would wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from huggingface_hub import constants

# pytest imports moe_peft for its warning filter before it reads this file, too early for the variable above.
constants.HF_HUB_OFFLINE = os.environ["HF_HUB_OFFLINE"] == "1"
torch.set_num_threads(1)
