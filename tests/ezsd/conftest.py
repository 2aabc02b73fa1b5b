"""A small open_clip model with random weights: a real teacher that knows nothing."""

import json
from types import SimpleNamespace

import open_clip
import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file

from ezsd.teacher.open_clip import load_teacher

# Tests share their cores with other work, so the time that an example takes says nothing.
settings.register_profile("ezsd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ezsd")

TEMPLATE = "a photo of a {}"
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory):
    """An open_clip model by `name`, its random `state`, and `file`, where that state is saved."""
    folder = tmp_path_factory.mktemp("small_clip")
    config = folder / "small-for-tests.json"
    config.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(config)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        state = open_clip.CLIP(**CONFIG).state_dict()
    file = folder / "weights.safetensors"
    save_file(state, file)
    return SimpleNamespace(name=config.stem, state=state, file=file)


@pytest.fixture
def small_teacher(small_clip):
    return load_teacher(small_clip.name, str(small_clip.file), template=TEMPLATE, activation="gelu")


@pytest.fixture(scope="session")
def tiny_shapes():
    """The teacher that the package ships; tests must leave it as it is."""
    return load_teacher("tiny-shapes", None, template="a {}")
