"""A training of an auto-encoder that takes a second."""

import pytest

from tokenkit.config import build
from tokenkit.verbs.tokenizer.pretrain import TokenizerPretrainRun, pretrain_tokenizer

TINY = {"hidden": 32, "byte_width": 8, "encoder_blocks": 1, "decoder_blocks": 1, "groups": 2, "min_groups": 1}


@pytest.fixture
def run_file(tmp_path, corpus):
    """A run of 20 steps that measures every 5, saves every 2 and mines at 12 and 16; keywords change `train`."""

    def make(name, *, text=corpus, network=TINY, pins=0, **train):
        values = {
            "output": tmp_path / name,
            "network": network,
            "data": {"source": {"path": str(text), "separator": "\n\n"}, "validation_split": 0.3},
            "draw": {"mine_every": 4, "invented": 0.1},
            "pins": pins,
            "train": {
                "steps": 20,
                "batch_size": 16,
                "device": "cpu",
                "eval_every": 5,
                "save_every": 2,
                "log_every": 1,
                "optimizer": {"warmup_steps": 3},
                **train,
            },
        }
        return build(TokenizerPretrainRun, values)

    return make


@pytest.fixture
def pretrain(run_file):
    """Runs it."""

    def run(name, *, resume=False, resume_from=None, allow_config_change=False, **changes):
        options = {"resume": resume, "resume_from": resume_from, "allow_config_change": allow_config_change}
        return pretrain_tokenizer(run_file(name, **changes), quiet=True, **options)

    return run
