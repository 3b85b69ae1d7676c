"""Train a model of random weights for a few steps in this process, and print how far its memory rose, in bytes.

``python -m tests.train.measure_rss JSON`` with shape, padded_vocab_size, train and trainable.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

from megatron_adapt.config import Layout, StageSettings, TrainSettings
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.parallel import start_engine
from megatron_adapt.engine.trainable import freeze_rest
from megatron_adapt.shape import LlamaShape
from megatron_adapt.train.optimizer import build_trainer
from megatron_adapt.train.step import train_step

NUM_STEPS = 2


def read_status(name):
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def main(asked):
    torch.set_num_threads(1)
    shape, train = LlamaShape.from_dict(asked["shape"]), TrainSettings(**asked["train"])
    stage = StageSettings(name="a", tokens=1, blend={"xx": 1.0}, trainable=asked["trainable"])
    draw = np.random.default_rng(0)
    with start_engine(Layout(), 1):
        before = read_status("VmRSS")
        model = build_model(
            shape, padded_vocab_size=asked["padded_vocab_size"], layout=Layout(), seq_length=train.seq_length,
            bf16=train.bf16,
        )  # fmt: skip
        freeze_rest(model, stage.trainable)
        trainer = build_trainer([model], train, stage, NUM_STEPS)
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(0.01) if weight.dim() > 1 else weight.fill_(1.0)
        trainer.optimizer.reload_model_params()
        for _ in range(NUM_STEPS):
            windows = draw.integers(0, shape.vocab_size, (train.global_batch_size, train.seq_length + 1))
            train_step(trainer, windows, train.micro_batch_size)
        sys.stdout.write(json.dumps({"grown": read_status("VmHWM") - before}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
