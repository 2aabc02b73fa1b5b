"""`torchrun_train.py STORE DATA WEIGHTS RUNS SETTINGS`, a run per setting, in one of the processes of `torchrun`."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ezsd.pipeline.config.schema import from_tables
from ezsd.pipeline.training.train import TrainRequest, train


def main():
    store, data, weights, runs, settings = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, tables in json.loads(settings.read_text()).items():
        config = from_tables(tables, where="test")
        train(TrainRequest(cache=store, run=runs / name, config=config, data_root=data, backbone_weights=weights))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
