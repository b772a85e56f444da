"""The end of a training script: nothing that communicates with the process group outlives it."""

import sys

import pytest

from tests.processes.test_trainers import free_port
from tests.processes.together import run_together
from tests.train.tiny_run import make_base, make_data, words, write_run

WORKER = """
import gc, os, sys
rank, port, config = sys.argv[1:]
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": os.path.dirname(config) + "/cache" + rank}
sys.path.insert(0, "train")
import sft, torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

def wrappers():
    return sum(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())

seen, destroy, backward = [], dist.destroy_process_group, torch.Tensor.backward
torch.Tensor.backward = lambda *args, **kwargs: (seen.append(wrappers()), backward(*args, **kwargs))[1]
dist.destroy_process_group = lambda *args: (seen.append(wrappers()), destroy(*args))[1]
trainer = sft.main(*sft.make_parser().parse_args_and_config(["--config", config]))
assert seen == [1, 1, 1, 0], seen
assert not dist.is_initialized() and trainer.model_wrapped is trainer.model
"""


@pytest.mark.slow
@pytest.mark.multi_process
def test_the_wrapper_of_the_model_is_gone_before_the_process_group(tmp_path):
    base = make_base(tmp_path / "base")
    data = make_data(tmp_path / "data", [{"text": words(i, 6)} for i in range(10)])
    run = write_run(tmp_path, model_name_or_path=base, dataset_name=data, save_strategy="no")
    port = str(free_port())
    run_together([[sys.executable, "-c", WORKER, rank, port, str(run)] for rank in "01"])
