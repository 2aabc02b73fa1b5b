"""Teachers: unit embeddings, a fingerprint of contents, and one clear refusal for whatever is unfit."""

import contextlib
import hashlib
import json
import os
import pickle
import re
import socket
import sys
import tomllib
import zipfile
from importlib.resources import files
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from ezsd.data.shapes import SHAPES_SPLIT, picture
from ezsd.errors import TeacherError, VocabularyError
from ezsd.teacher import weights as checkpoints
from ezsd.teacher.open_clip import (
    NORMALISATIONS,
    OpenClipTeacher,
    Teacher,
    load_teacher,
    require_told_apart,
    shipped_weights,
    state_digest,
)
from ezsd.teacher.requirements import TINY_SHAPES

TEMPLATE = "a photo of a {}"


def refusal(name, weights, match, activation="gelu"):
    """The one line in which a teacher is refused."""
    with pytest.raises(TeacherError, match=match) as caught:
        load_teacher(name, None if weights is None else str(weights), template=TEMPLATE, activation=activation)
    message = str(caught.value)
    assert "\n" not in message
    assert isinstance(caught.value, ValueError)
    return message


def crops(count=5, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(4))


def test_embeddings_are_of_unit_length(small_teacher):
    image, text = small_teacher.encode_image(crops()), small_teacher.encode_text(["circle", "square"])
    for rows, count in ((image, 5), (text, 2)):
        assert rows.shape == (count, small_teacher.embed_dim)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(count))


def test_pixels_are_normalised_as_the_model_expects(small_teacher, small_clip):
    model = open_clip.create_model(small_clip.name, pretrained=None)
    model.load_state_dict(small_clip.state)
    mean, std = (torch.tensor(v)[:, None, None] for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        expected = model.eval().encode_image((crops() - mean) / std, normalize=True)
    torch.testing.assert_close(small_teacher.encode_image(crops()), expected)


def test_names_are_put_into_the_template(small_teacher):
    tokens = open_clip.get_tokenizer(small_teacher.name)(["a photo of a circle", "a photo of a bar"])
    expected = small_teacher.encode_text_tokens(tokens)
    assert torch.equal(small_teacher.encode_text(["circle", "bar"]), expected)
    assert not torch.allclose(expected[0], expected[1])


def loaded(small_clip, template, **options):
    return load_teacher(small_clip.name, str(small_clip.file), template=template, activation="gelu", **options)


def mean_of(rows):
    return torch.nn.functional.normalize(rows.mean(0), dim=0)


def test_of_several_templates_a_name_is_the_mean_of_its_prompts(small_teacher, small_clip):
    """As in CLIP's code: unit rows, their mean, a unit row."""
    several = loaded(small_clip, [TEMPLATE, "a drawing of a {}"])
    single = [loaded(small_clip, template).encode_text(["circle", "bar"]) for template in several.templates]
    for place, row in enumerate(several.encode_text(["circle", "bar"])):
        torch.testing.assert_close(row, mean_of(torch.stack([rows[place] for rows in single])))
    assert torch.equal(loaded(small_clip, [TEMPLATE]).encode_text(["bar"]), small_teacher.encode_text(["bar"]))


def test_many_prompts_are_embedded_a_part_at_a_time(small_clip, monkeypatch):
    several = loaded(small_clip, [TEMPLATE, "a drawing of a {}"])
    whole = several.encode_text(["circle", "bar"])
    monkeypatch.setattr("ezsd.teacher.open_clip._ROWS", 3)
    torch.testing.assert_close(several.encode_text(["circle", "bar"]), whole)


def test_descriptions_take_the_place_of_a_names_prompts(small_teacher, small_clip):
    sentences = ("a round thing", "a ring that is filled")
    # The same letter in one character and in two.
    described = loaded(small_clip, TEMPLATE, descriptions=[("circl\u00e9", *sentences)])
    rows = described.encode_text(["bar", "circle\u0301"])
    expected = small_teacher.encode_text_tokens(open_clip.get_tokenizer(small_teacher.name)(list(sentences)))
    torch.testing.assert_close(rows[1], mean_of(expected))
    torch.testing.assert_close(rows[0], small_teacher.encode_text(["bar"])[0])


def test_imagenet_stands_for_the_templates_of_clip(small_clip):
    teacher = loaded(small_clip, "imagenet")
    assert len(teacher.fingerprint()["template"]) == 80
    tokens, counts = teacher.tokens(["bar"])
    assert torch.equal(tokens[:1], open_clip.get_tokenizer(small_clip.name)(["a bad photo of a bar."]))
    assert counts == [80]


def test_the_fingerprint_tells_lists_and_descriptions_apart_by_what_they_say(small_teacher, small_clip):
    own = small_teacher.fingerprint()
    assert loaded(small_clip, [TEMPLATE]).fingerprint() == own
    assert loaded(small_clip, [TEMPLATE, "a {}"]).fingerprint() == own | {"template": [TEMPLATE, "a {}"]}
    cat, dog = ("cat", "it purrs", "it has paws"), ("dog", "it barks")
    described = loaded(small_clip, TEMPLATE, descriptions=[cat, dog]).fingerprint()
    assert described.keys() - own.keys() == {"descriptions_sha256"}
    assert loaded(small_clip, TEMPLATE, descriptions=[dog, cat]).fingerprint() == described
    assert loaded(small_clip, TEMPLATE, descriptions=[dog]).fingerprint() != described


def test_a_teacher_says_what_it_is(small_teacher, small_clip):
    assert isinstance(small_teacher, Teacher)
    assert small_teacher.name == small_clip.name
    assert (small_teacher.embed_dim, small_teacher.input_size) == (24, 16)
    assert small_teacher.logit_scale == pytest.approx(small_clip.state["logit_scale"].exp().item())


def test_a_loaded_teacher_is_frozen_and_in_evaluation_mode(small_teacher):
    assert not any(p.requires_grad for p in small_teacher.model.parameters())
    assert not any(m.training for m in small_teacher.model.modules())


def test_layer_norms_are_those_of_both_towers(small_teacher):
    parameters = small_teacher.layer_norms()
    own = dict(small_teacher.model.named_parameters())
    assert set(parameters) == {name for name in own if "ln_" in name}
    assert all(parameters[name] is own[name] for name in parameters)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_fingerprint_does_not_depend_on_file_or_format(small_teacher, small_clip, tmp_path, suffix, wrapped):
    path = tmp_path / f"elsewhere{suffix}"
    if suffix == ".safetensors":
        # Training loops add this prefix.
        save_file({f"module.{k}" if wrapped else k: v for k, v in small_clip.state.items()}, path)
    else:
        torch.save({"state_dict": small_clip.state} if wrapped else small_clip.state, path)
    other = load_teacher(small_clip.name, str(path), template=TEMPLATE, activation="gelu")
    assert other.fingerprint() == small_teacher.fingerprint()
    assert torch.equal(other.encode_image(crops()), small_teacher.encode_image(crops()))


def test_the_fingerprint_tells_other_weights_and_prompts_apart(small_teacher, small_clip, tmp_path):
    path = tmp_path / "other.safetensors"
    state = {name: value.clone() for name, value in small_clip.state.items()}
    state["visual.proj"][0, 0] += 1e-3
    save_file(state, path)
    own = small_teacher.fingerprint()
    other_weights = load_teacher(small_clip.name, str(path), template=TEMPLATE, activation="gelu").fingerprint()
    other_prompt = load_teacher(small_clip.name, str(small_clip.file), template="a {}", activation="gelu").fingerprint()
    assert {k for k in own if own[k] != other_weights[k]} == {"weights_sha256"}
    assert {k for k in own if own[k] != other_prompt[k]} == {"template"}


def test_the_fingerprint_is_of_the_weights_before_tuning(small_teacher):
    before = small_teacher.fingerprint()
    for parameter in small_teacher.layer_norms().values():
        parameter.data.add_(1)
    assert small_teacher.fingerprint() == before


def test_a_state_digest_sees_names_shapes_dtypes_and_values_and_no_order():
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.5)}
    same = {"b": torch.tensor(1.5), "a": torch.arange(6.0).reshape(3, 2).T.contiguous().T.reshape(2, 3)}
    assert state_digest(same) == state_digest(state)
    others = [
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"].reshape(3, 2), "b": state["b"]},
        {"a": state["a"].view(torch.int32), "b": state["b"]},
        {"a": state["a"], "b": torch.tensor(-1.5)},
        {"a": state["a"]},
    ]
    assert len({state_digest(one) for one in [state, *others]}) == 6


@pytest.mark.parametrize("teacher", ["small_teacher", "tiny_shapes"])
def test_names_with_one_text_row_are_named(teacher, request):
    teacher = request.getfixturevalue(teacher)
    names = ["circle", "square", "Circle", "SQUARE", "ring"]
    rows = teacher.encode_text(names)
    words = "cannot tell 'circle' from 'Circle', 'square' from 'SQUARE': their text embeddings are equal"
    with pytest.raises(VocabularyError, match=words):
        require_told_apart(names, rows)
    require_told_apart(["circle", "square", "ring"], rows[[0, 1, 4]])


def test_rows_count_as_equal_within_a_millionth_of_the_cosine():
    for angle, equal in ((1e-3, True), (2e-3, False)):
        rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, angle]])
        with pytest.raises(VocabularyError) if equal else contextlib.nullcontext():
            require_told_apart(["a", "b", "c"], torch.cat(rows))


def test_many_names_are_compared_with_one_another():
    rows = torch.eye(2051)
    rows[2050] = rows[1]
    names = [str(number) for number in range(2051)]
    with pytest.raises(VocabularyError, match="cannot tell '1' from '2050': "):
        require_told_apart(names, rows)


def test_prompts_that_are_cut_at_the_token_limit_are_named_once(small_teacher, caplog):
    # 8 tokens, 2 of which are the marks of start and end, and 4 the template.
    cut, fits = "red circle on a table", "red circle"
    rows = small_teacher.encode_text([fits, cut, "red circle on a chair"])
    assert [record.message for record in caplog.records] == [
        f"teacher {small_teacher.name} reads 8 tokens of a prompt: the end is cut off, and makes no difference, for "
        f"{cut!r}, 'red circle on a chair'"
    ]
    small_teacher.encode_text([cut, fits])
    assert len(caplog.records) == 1
    with pytest.raises(VocabularyError, match="cannot tell"):
        require_told_apart([cut, "red circle on a chair"], rows[1:])


# The shipped teacher.


def test_the_shipped_teacher_knows_clean_pictures(tiny_shapes):
    names = [*SHAPES_SPLIT.names, "background"]
    drawn = [picture(seed=77, index=i) for i in range(100)]
    pixels = torch.stack([torch.from_numpy(d[0]).permute(2, 0, 1) for d in drawn]) / 255
    guess = (tiny_shapes.encode_image(pixels) @ tiny_shapes.encode_text(names).T).argmax(1)
    right = [names[i] == d[3] for i, d in zip(guess.tolist(), drawn, strict=True)]
    assert sum(right) >= 95


def test_the_shipped_teacher_is_a_small_open_clip_model(tiny_shapes):
    assert isinstance(tiny_shapes.model, open_clip.CLIP)
    assert (tiny_shapes.name, tiny_shapes.embed_dim, tiny_shapes.input_size) == ("tiny-shapes", 128, 32)
    with files("ezsd.weights").joinpath("tiny-shapes.safetensors").open("rb") as file:
        assert file.seek(0, os.SEEK_END) <= 3_000_000


@pytest.mark.parametrize("name", ["cat", "circle with a hat", "Kreis"])
def test_the_shipped_teacher_refuses_a_word_it_has_no_rows_for(tiny_shapes, name):
    with pytest.raises(TeacherError, match=f"no weights for a word of '{name}'.*another `teacher`"):
        tiny_shapes.encode_text(["circle", name])


def test_the_shipped_teacher_refuses_a_template_with_unknown_words():
    teacher = load_teacher("tiny-shapes", None, template="a photo of a {}")
    with pytest.raises(TeacherError, match="no weights for a word"):
        teacher.encode_text(["circle"])


def test_shipped_rows_that_no_caption_used_are_zero(tiny_shapes):
    shipped = load_file(files("ezsd.weights").joinpath("tiny-shapes.safetensors"))
    table = tiny_shapes.model.token_embedding.weight
    used = torch.zeros(len(table), dtype=torch.bool)
    used[shipped["token_embedding.ids"]] = True
    assert torch.equal(table[used], shipped["token_embedding.rows"].float())
    assert (table[~used] == 0).all()


# Refusals.


def test_an_unknown_model_is_refused():
    refusal("ViT-B-33", "openai", r"^`teacher=ViT-B-33`: no such open_clip model")


def test_an_open_clip_model_needs_weights():
    refusal("ViT-B-32", None, r"^`teacher=ViT-B-32` needs `weights`: a tag such as openai, or a local")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_a_missing_file_is_refused_by_its_path(tmp_path, suffix):
    path = tmp_path / f"absent{suffix}"
    assert refusal("ViT-B-32", path, "no such file").startswith(f"`weights={path}`")


def test_a_missing_file_for_the_shipped_teacher_is_refused_by_its_path(tmp_path):
    path = tmp_path / "absent.safetensors"
    assert str(path) in refusal("tiny-shapes", path, "no such file")


def test_an_unknown_tag_is_refused():
    refusal("ViT-B-32", "opnai", "has no weights tagged 'opnai'")


@pytest.mark.parametrize(
    ("name", "tag", "cure"),
    [
        ("ViT-B-32", "openai", "expect QuickGELU, the model has GELU.*use `teacher=ViT-B-32-quickgelu`"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "has no weights tagged|use `teacher=ViT-B-32`$"),
    ],
)
def test_an_activation_that_the_weights_do_not_expect_is_refused(name, tag, cure):
    refusal(name, tag, cure)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No cached download, no connection, and a hub client that knows so and does not try for a minute."""

    def unreachable(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(socket.socket, "connect", unreachable)


def test_a_tag_without_a_network_is_refused_with_the_way_round(no_network):
    message = refusal("ViT-B-32-quickgelu", "openai", "Without a network, download .* `weights=FILE`$")
    assert message.startswith("`teacher=ViT-B-32-quickgelu` `weights=openai`: ")


def test_a_tag_without_a_network_logs_nothing_beside_the_error(no_network, caplog):
    refusal("ViT-B-32-quickgelu", "openai", "Without a network")
    assert [record.getMessage() for record in caplog.records] == []


def test_a_hub_model_without_a_network_is_refused(no_network):
    refusal("hf-hub:nobody/nothing", None, "nobody/nothing.*Without a network")


def test_a_hub_that_cannot_be_reached_is_asked_once(no_network, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *a, **k: asked.append(a) or 1 / 0)
    refusal(
        "ViT-B-32-quickgelu", "openai", "open_clip_model.safetensors of .* give `activation=quickgelu` and its path"
    )
    assert len(asked) == 2  # one for each format


def test_a_file_that_nobody_knows_needs_its_activation(small_clip):
    refusal(small_clip.name, small_clip.file, "say `activation=quickgelu` .* or `activation=gelu`", activation=None)


def test_a_file_of_another_activation_is_refused(small_clip):
    refusal(small_clip.name, small_clip.file, "expect QuickGELU, the model has GELU", activation="quickgelu")


def test_a_file_that_may_need_one_of_two_normalisations_is_asked_for_it(small_clip):
    said = refusal("ViT-L-14", small_clip.file, "ViT-L-14 differ in the mean and deviation of pixels")
    offered = re.findall(r"(\w+) \(", said.partition("teacher.normalisation=")[2])
    assert offered == ["openai", "inception"]
    assert "inception (laion2b_s32b_b82k)" in said


@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_a_stated_normalisation_is_used_and_stands_in_the_fingerprint(small_teacher, small_clip, kind):
    told = load_teacher(small_clip.name, str(small_clip.file), template=TEMPLATE, activation="gelu", normalisation=kind)
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALISATIONS[kind])
    with torch.no_grad():
        expected = told.model.encode_image((crops() - mean) / std, normalize=True)
    torch.testing.assert_close(told.encode_image(crops()), expected)
    ours, default = told.fingerprint(), small_teacher.fingerprint()
    assert {key for key in ours if ours[key] != default[key]} == (set() if kind == "openai" else {"mean", "std"})


@pytest.mark.parametrize(
    ("name", "weights"),
    [("ViT-B-32", "laion2b_s34b_b79k"), (TINY_SHAPES, None), ("plugin:a.b:c", None), (TINY_SHAPES, shipped_weights())],
)
def test_a_normalisation_of_anything_but_a_local_file_is_refused(name, weights):
    weights = None if weights is None else str(weights)
    with pytest.raises(TeacherError, match="teacher.normalisation=openai is for a local file"):
        load_teacher(name, weights, template=TEMPLATE, normalisation="openai")


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "ViT-L-14-CLIPA", "roberta-ViT-B-32", "nllb-clip-base"])
def test_a_model_that_needs_a_package_is_refused_by_its_extra(name, small_clip, monkeypatch):
    monkeypatch.setattr(checkpoints, "find_spec", lambda _: None)
    for weights in (small_clip.file, "webli"):
        refusal(name, weights, rf"`teacher={name}`: its text side needs .* pip install 'ezsd\[transformers\]'")


def test_the_extra_that_a_refusal_names_is_there():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert any(one.startswith("transformers") for one in project["optional-dependencies"]["transformers"])


@pytest.fixture(scope="session")
def small_coca(tmp_path_factory):
    """A CoCa of two layers, with its class token and the queries of its pooler."""
    config = open_clip.get_model_config("coca_ViT-B-32")
    config["vision_cfg"] |= {"layers": 2, "width": 64, "image_size": 32, "patch_size": 16, "head_width": 32}
    config["text_cfg"] |= {"layers": 2, "width": 64, "heads": 2}
    config["multimodal_cfg"] |= {"layers": 1, "width": 64, "heads": 2, "dim_head": 32}
    path = tmp_path_factory.mktemp("coca") / "small-coca.json"
    path.write_text(json.dumps(config | {"embed_dim": 64}))
    open_clip.add_model_config(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model("small-coca", pretrained=None)
    torch.save(model.state_dict(), path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def test_a_coca_computes_in_bf16(small_coca):
    rounded, exact = (
        load_teacher("small-coca", str(small_coca), template=TEMPLATE, activation="gelu", precision=precision)
        for precision in ("bf16", "fp32")
    )
    images = [teacher.encode_image(crops(size=32)) for teacher in (rounded, exact)]
    texts = [teacher.encode_text(["cat", "ox"]) for teacher in (rounded, exact)]
    for ours, theirs in (images, texts):
        assert ((ours * theirs).sum(1) > 0.999).all()
        assert not torch.equal(ours, theirs)


def test_a_model_whose_norms_would_be_rounded_is_refused_in_bf16(tmp_path):
    config = open_clip.get_model_config("vit_medium_patch16_gap_256")
    config["vision_cfg"]["timm_model_name"] = "test_vit"
    config["vision_cfg"]["image_size"] = 160
    config["text_cfg"] |= {"layers": 1, "width": 64, "heads": 2}
    (tmp_path / "small-timm.json").write_text(json.dumps(config | {"embed_dim": 64}))
    open_clip.add_model_config(tmp_path / "small-timm.json")
    model = open_clip.create_model("small-timm", pretrained=None)
    torch.save(model.state_dict(), tmp_path / "timm.pt")
    options = {"template": TEMPLATE, "activation": "gelu"}
    with pytest.raises(TeacherError, match=r"cannot be used in bf16 \(open_clip rounds .*teacher.precision=fp32`$"):
        load_teacher("small-timm", str(tmp_path / "timm.pt"), precision="bf16", **options)
    assert load_teacher("small-timm", str(tmp_path / "timm.pt"), precision="fp32", **options).embed_dim == 64


def test_a_known_file_needs_no_word_and_takes_no_wrong_one(small_clip, monkeypatch):
    digest = hashlib.sha256(small_clip.file.read_bytes()).hexdigest()
    monkeypatch.setitem(checkpoints._KNOWN, digest, "gelu")
    assert load_teacher(small_clip.name, str(small_clip.file), template=TEMPLATE).embed_dim == 24
    refusal(small_clip.name, small_clip.file, "published weights trained with gelu", activation="quickgelu")


def test_a_torchscript_archive_is_refused_with_the_file_to_bring(tmp_path):
    path = tmp_path / "ViT-B-32.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for member in ("constants.pkl", "code/__torch__.py", "data.pkl"):
            archive.writestr(f"ViT-B-32/{member}", "")
    message = "TorchScript archive.*bring open_clip_model.safetensors of huggingface.co/timm/vit_base_patch32_clip_224"
    with pytest.raises(TeacherError, match=message):
        checkpoints.load_checkpoint(torch.nn.Identity(), "ViT-B-32-quickgelu", path)


# Precision.


def test_rounded_weights_say_nearly_the_same_and_are_named(small_teacher, small_clip):
    rounded = load_teacher(
        small_clip.name, str(small_clip.file), template=TEMPLATE, activation="gelu", precision="bf16"
    )
    own, other = small_teacher.fingerprint(), rounded.fingerprint()
    assert {key: other[key] for key in own if own[key] != other[key]} == {"precision": "bf16"}
    assert rounded.model.visual.conv1.weight.dtype == torch.bfloat16
    assert {p.dtype for p in rounded.layer_norms().values()} == {torch.float32}
    assert list(rounded.layer_norms()) == list(small_teacher.layer_norms())
    found, wanted = rounded.encode_image(crops()), small_teacher.encode_image(crops())
    assert found.dtype == torch.float32
    assert not torch.equal(found, wanted)
    assert (found * wanted).sum(1).min() > 0.999
    assert (rounded.encode_text(["cat"]) * small_teacher.encode_text(["cat"])).sum() > 0.999


def test_auto_follows_the_hardware(small_clip, monkeypatch):
    for has, wanted in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        teacher = load_teacher(
            small_clip.name, str(small_clip.file), template=TEMPLATE, activation="gelu", precision="auto"
        )
        assert teacher.fingerprint()["precision"] == wanted


def test_a_resnet_offers_its_batch_norms():
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    model = open_clip.CLIP(**config)
    open_clip.factory.set_model_preprocess_cfg(model, {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    teacher = OpenClipTeacher(model, "RN50", template=TEMPLATE)
    assert teacher.encode_image(crops(size=32)).shape == (5, 16)
    vision = teacher.layer_norms(vision_only=True)
    norms = [m for m in model.visual.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(vision) == 2 * len(norms)
    assert set(vision) < set(teacher.layer_norms())


def half(path):
    content = path.read_bytes()
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"not weights" * 20, half], ids=["empty", "junk", "half"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_damaged_file_is_refused_by_its_path(small_clip, tmp_path, suffix, damage):
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"damaged{suffix}"
    save_file(small_clip.state, whole) if suffix == ".safetensors" else torch.save(small_clip.state, whole)
    path.write_bytes(damage(whole))
    assert refusal(small_clip.name, path, "not loadable").startswith(f"`weights={path}`: ")


@pytest.mark.parametrize("change", ["shape", "missing", "extra"])
def test_weights_of_another_model_are_refused_by_the_tensor_that_differs(small_clip, tmp_path, change):
    state = {name: value.clone() for name, value in small_clip.state.items()}
    if change == "extra":
        state["visual.another"] = torch.zeros(2)
    elif change == "missing":
        del state["visual.proj"]
    else:
        state["visual.proj"] = torch.zeros(3, 3)
    path = tmp_path / "other.safetensors"
    save_file(state, path)
    refusal(small_clip.name, path, "visual.another" if change == "extra" else "visual.proj")


@pytest.mark.parametrize("content", [{}, torch.zeros(3), [1, 2]], ids=["no tensors", "a tensor", "a list"])
def test_a_file_that_holds_no_state_is_refused(small_clip, tmp_path, content):
    path = tmp_path / "strange.pt"
    torch.save(content, path)
    refusal(small_clip.name, path, "not loadable")


def test_a_folder_is_refused(small_clip, tmp_path):
    refusal(small_clip.name, tmp_path, "Is a directory")


def test_weights_of_another_width_are_refused_for_the_shipped_teacher(small_clip):
    refusal("tiny-shapes", small_clip.file, "not loadable")


def test_a_compact_file_that_lacks_tensors_is_refused(small_clip, tmp_path):
    path = tmp_path / "compact.safetensors"
    save_file({"token_embedding.ids": torch.tensor([1]), "token_embedding.rows": torch.zeros(1, 16)}, path)
    refusal(small_clip.name, path, r"weights lack \S+ and \d+ more")


class Payload:
    """Pickled code: unpickling it makes a folder."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture(params=["archive", "beside true weights", "bare pickle"])
def pickled_code(request, small_clip, tmp_path):
    """A weights file whose unpickling would make the folder `made` beside it."""
    path, payload = tmp_path / "code.pt", Payload(tmp_path / "made")
    if request.param == "bare pickle":
        path.write_bytes(pickle.dumps({"visual.proj": payload}, protocol=2))
    else:
        torch.save({"x": payload} if request.param == "archive" else {**small_clip.state, "x": payload}, path)
    return path


def test_the_code_would_run_in_a_careless_loader(pickled_code):
    # A bare pickle is no torch file, which is noticed only after it has run.
    with contextlib.suppress(RuntimeError):
        torch.load(pickled_code, weights_only=False)
    assert (pickled_code.parent / "made").exists()


def test_pickled_code_is_never_run(pickled_code, small_clip):
    with pytest.raises(Exception, match=r".+"):
        load_teacher(small_clip.name, str(pickled_code), template=TEMPLATE, activation="gelu")
    assert not (pickled_code.parent / "made").exists()


def test_pickled_code_is_refused_in_one_line(pickled_code, small_clip):
    assert str(pickled_code) in refusal(small_clip.name, pickled_code, "without pickled code")


# Plug-ins.


WORKING = """
import torch
import torch.nn.functional as F

class Own:
    name, embed_dim, input_size, logit_scale = "own", 3, 4, 50.0

    def __init__(self, device):
        self.device = device

    def encode_image(self, pixels):
        return F.normalize(pixels.mean((2, 3)), dim=1)

    def encode_text(self, names):
        return torch.eye(3)[: len(names)]

    def layer_norms(self, *, vision_only=False):
        return {}

    def fingerprint(self):
        return {"name": self.name}

def factory(device):
    return Own(device)

class Half:
    name, embed_dim = "half", 3

    def encode_image(self, pixels):
        return pixels

def half(device):
    return Half()

def without_device():
    return Own("cpu")
"""


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """A folder on the path with working and broken plug-ins."""
    for name, source in {
        "plugin_for_tests": WORKING,
        "plugin_needs_more": "import a_package_that_nobody_has",
    }.items():
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_plugin_is_a_teacher(plugins):
    teacher = load_teacher("plugin:plugin_for_tests:factory", None, template=TEMPLATE, device=torch.device("cpu"))
    assert isinstance(teacher, Teacher)
    assert (teacher.name, teacher.embed_dim, teacher.device) == ("own", 3, "cpu")
    torch.testing.assert_close(teacher.encode_image(crops(size=4)).norm(dim=1), torch.ones(5))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plugin:plugin_for_tests", "expected plugin:package.module:factory"),
        ("plugin:plugin_for_tests:factory:more", "expected plugin:package.module:factory"),
        ("plugin:no_such_module:factory", "No module named 'no_such_module'; is its folder on PYTHONPATH"),
        ("plugin:plugin_for_tests:absent", "has no attribute 'absent'"),
        ("plugin:plugin_needs_more:factory", "No module named 'a_package_that_nobody_has'"),
        ("plugin::factory", "plugin::factory"),
        ("plugin:.relative:factory", "plugin:.relative:factory"),
    ],
)
def test_a_plugin_that_cannot_be_found_is_refused(plugins, name, message):
    assert refusal(name, None, message).startswith(f"`teacher={name}`")


def test_a_plugin_that_makes_half_a_teacher_is_refused_by_what_is_missing(plugins):
    message = refusal("plugin:plugin_for_tests:half", None, "is no Teacher")
    missing = ["input_size", "logit_scale", "encode_text", "layer_norms", "fingerprint"]
    assert message.endswith("it lacks " + ", ".join(missing))


@pytest.mark.parametrize("factory", ["without_device", "__name__"])
def test_a_factory_that_cannot_be_called_with_a_device_is_refused(plugins, factory):
    refusal(f"plugin:plugin_for_tests:{factory}", None, f"^`teacher=plugin:plugin_for_tests:{factory}`")
