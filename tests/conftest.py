"""Settings of the whole test run."""

from __future__ import annotations

import torch

# Models of the tests are too small to gain from threads, which cost ten times the run on a busy machine.
torch.set_num_threads(1)
