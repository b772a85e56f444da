"""One of the processes that shard a model with FSDP2 under activation checkpointing, train a step and save.

python -m tests.processes.saving_worker <rank> <world size> <folder>
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from tests.tiny import padded_batch
from tests.tuner.test_saving import CASES
from tests.tuner.ways import adapted


def sharded(model: nn.Module) -> nn.Module:
    layers = model.base_model.model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
        fully_shard(layers[index])
    fully_shard(model)
    return model


def main(rank: int, world_size: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    for case, (build, config) in CASES.items():
        model = sharded(adapted(build(), config).train())
        model(**padded_batch([9, 6]), use_cache=False).logits.sum().backward()
        tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        assert bool(tensors) == (rank == 0)
        model.save_pretrained(folder / case, state_dict=tensors, is_main_process=rank == 0)
        try:
            model.save_pretrained(folder / case, is_main_process=rank == 0)
        except ValueError as error:
            assert "split over processes" in str(error)
        else:
            raise AssertionError("parts of tensors were saved")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
