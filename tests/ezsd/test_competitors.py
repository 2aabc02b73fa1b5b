"""Which names compete with the ones asked for: by what their text rows say beyond their mean, never by position."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ezsd.competitors import NEAR, competition

DIM = 64


def alike_rows(count, seed=1):
    """Rows as one teacher gives them: whatever they name, their cosines are above 0.8."""
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(3 + torch.randn(count, DIM, generator=generator), dim=1)
    assert (rows @ rows.T).min() > 0.8
    return rows


def said(own, asked):
    competing, aside = competition(asked, own)
    assert not (competing & aside).any()
    return competing.nonzero().flatten().tolist(), aside.nonzero().flatten().tolist()


def test_a_name_that_is_asked_for_is_itself_and_all_others_compete():
    own = alike_rows(5)
    # The nearest thing to a synonym: an own name has always competed with it.
    own[4] = F.normalize(own[3] + 0.001, dim=0)
    assert said(own, own[[3, 1]]) == ([0, 2, 4], [])
    assert said(own, own) == ([], [])


def test_a_synonym_steps_aside_and_a_stranger_does_not():
    own, stranger = alike_rows(6), alike_rows(1, seed=9)
    synonym = F.normalize(own[2:3] + 0.02 * torch.randn(1, DIM, generator=torch.Generator().manual_seed(2)), dim=1)
    assert said(own, synonym) == ([0, 1, 3, 4, 5], [2])
    # A plain cosine of 0.8 and more says nothing.
    assert said(own, stranger) == ([0, 1, 2, 3, 4, 5], [])
    assert said(own, torch.cat([own[:1], synonym])) == ([1, 3, 4, 5], [2])


def test_one_own_name_and_equal_ones_do_no_harm():
    own = alike_rows(1)
    assert said(own, alike_rows(1, seed=9)) == ([0], [])
    assert said(own.expand(3, -1), own) == ([], [])


@pytest.fixture(scope="module")
def clip_rows(conse_tools):
    """CLIP's text rows of COCO's and LVIS's names."""
    folder = conse_tools.parent / "data"
    coco = json.loads((folder / "coco_photos/annotations/instances_val2017.json").read_text())["categories"]
    lvis = json.loads((folder / "conse/lvis_v1_train_cat_info.json").read_text())
    names = ([one["name"] for one in coco], [one["name"] for one in sorted(lvis, key=lambda one: one["id"])])
    tables = {}
    for part, known in zip(("coco", "lvis_v1"), names, strict=True):
        rows = torch.from_numpy(np.load(folder / f"conse/{part}_clip_a+cname.npy").astype(np.float32))
        tables[part] = dict(zip(known, F.normalize(rows, dim=1), strict=True))
    return tables


def test_clips_own_rows_tell_synonyms_from_siblings(clip_rows):
    coco, lvis = clip_rows["coco"], clip_rows["lvis_v1"]
    names, own = list(coco), torch.stack(list(coco.values()))
    for asked, near in (
        ("sofa", "couch"),
        ("necktie", "tie"),
        ("doughnut", "donut"),
        ("ski", "skis"),
        ("computer_keyboard", "keyboard"),
        ("cellular_telephone", "cell phone"),
        ("wineglass", "wine glass"),
    ):
        assert said(own, lvis[asked][None])[1] == [names.index(near)]
    for stranger in ("helicopter", "tiger", "ladder", "pliers", "camera", "goat"):
        assert said(own, lvis[stranger][None])[1] == []
    # No two names of COCO itself are near: each could be asked for by a run that has the others.
    centred = F.normalize(own - own.mean(0), dim=1)
    assert (centred @ centred.T - 2 * torch.eye(80)).max() < NEAR
