"""One small model of every open_clip family, with random weights: a teacher, or refused in one line.

Minutes, so left out unless asked for: pytest -m slow tests/ezsd/test_families.py
"""

import copy
import json
from importlib.util import find_spec

import open_clip
import pytest
import torch

from ezsd.errors import TeacherError
from ezsd.teacher.open_clip import has_quick_gelu, load_teacher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROUNDED = "cannot be used in bf16 .*; use `teacher.precision=fp32`"
PACKAGE = r"pip install 'ezsd\[transformers\]'"
FAMILIES = {
    # open_clip's own towers.
    "ViT-S-32": None,
    "ViT-B-32-quickgelu": None,
    "ViT-L-14": None,
    "RN50": None,
    "RN50-quickgelu": None,
    "coca_ViT-B-32": None,
    # Vision towers of timm, whose norms open_clip rounds in bf16.
    "convnext_tiny": ROUNDED,
    "swin_base_patch4_window7_224": ROUNDED,
    "vit_medium_patch16_gap_256": ROUNDED,
    "vit_relpos_medium_patch16_cls_224": ROUNDED,
    "EVA02-B-16": ROUNDED,
    "MobileCLIP2-S0": ROUNDED,
    "MobileCLIP-B": ROUNDED,
    "PE-Core-T-16-384": ROUNDED,
    "ViTamin-S": ROUNDED,
    # Text towers or tokenizers of Hugging Face's transformers.
    "ViT-B-16-SigLIP": PACKAGE,
    "ViT-B-32-SigLIP2-256": PACKAGE,
    "ViT-B-16-SigLIP-i18n-256": PACKAGE,
    "ViT-L-14-CLIPA": PACKAGE,
    "ViT-L-14-worldwide": PACKAGE,
    "ViT-H-14-worldwide": PACKAGE,
    "roberta-ViT-B-32": PACKAGE,
    "coca_roberta-ViT-B-32": PACKAGE,
    "xlm-roberta-base-ViT-B-32": PACKAGE,
    "mt5-base-ViT-B-32": PACKAGE,
    "nllb-clip-base": PACKAGE,
    "nllb-clip-base-siglip": PACKAGE,
}
"""What stands against each in bf16 (`ROUNDED`) or at all (`PACKAGE`). Left out: EVA01, which is EVA02's code in timm
and begins at a thousand million parameters."""


def family(name):
    """What tells a model's code from another's: whose towers, whose tokenizer."""
    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    tower = vision.get("timm_model_name") or ("resnet" if isinstance(vision["layers"], list) else "vit")
    tower = tower.split("_")[0].removesuffix("02")
    tokenizer = str(text.get("hf_tokenizer_name", "own")).split("/")[-1]
    kinds = ("SigLIP2", "SigLIP", "nllb", "mt5", "xlm")
    tokenizer = next((kind for kind in kinds if kind in tokenizer), tokenizer)
    return "multimodal_cfg" in config, tower, str(text.get("hf_model_name", "own")).split("-")[0], tokenizer


def test_every_family_of_open_clip_has_a_model_here():
    assert {family(name) for name in open_clip.list_models() if not name.startswith("small-")} <= {
        family(name) for name in FAMILIES
    }


def small(name, folder):
    """The model's name and weights with towers of two layers, where they are open_clip's own."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        if "layers" in config.get(part, {}):
            layers = config[part]["layers"]
            config[part]["layers"] = [1] * 4 if isinstance(layers, list) else 2
    path = folder / f"small-{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    state = open_clip.create_model(path.stem, pretrained=None).state_dict()
    torch.save(state, path.with_suffix(".pt"))
    return path.stem, path.with_suffix(".pt")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name, fault in FAMILIES.items() if fault != PACKAGE])
def test_a_model_is_a_teacher_or_refused_in_one_line(name, precision, tmp_path):
    known, weights = small(name, tmp_path)
    quick = "quickgelu" if has_quick_gelu(open_clip.create_model(known, load_weights=False)) else "gelu"
    options = {"template": "a {}", "activation": quick, "precision": precision}
    if FAMILIES[name] and precision == "bf16":
        with pytest.raises(TeacherError, match=FAMILIES[name]) as caught:
            load_teacher(known, str(weights), **options)
        assert "\n" not in str(caught.value)
    else:
        teacher = load_teacher(known, str(weights), **options)
        with torch.no_grad():
            images = teacher.encode_image(torch.rand(2, 3, teacher.input_size, teacher.input_size))
            texts = teacher.encode_text(["cat", "dining table"])
        for rows in (images, texts):
            assert rows.shape == (2, teacher.embed_dim)
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
        norms = teacher.layer_norms()
        assert any(key.startswith("visual.") for key in norms)
        assert any(not key.startswith("visual.") for key in norms)
        assert {parameter.dtype for parameter in norms.values()} == {torch.float32}


@pytest.mark.skipif(find_spec("transformers") is not None, reason="the package is here, its tokenizers are on the hub")
@pytest.mark.parametrize("name", [name for name, fault in FAMILIES.items() if fault == PACKAGE])
def test_a_model_of_another_package_is_refused_before_it_is_made(name, tmp_path):
    (tmp_path / "any.pt").write_bytes(b"")
    with pytest.raises(TeacherError, match=PACKAGE) as caught:
        load_teacher(name, str(tmp_path / "any.pt"), template="a {}", activation="gelu")
    assert "\n" not in str(caught.value)
