"""Stage one, second half: one task turns one block of images into journaled proposals, regions and ground truth."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ezsd.adapt import restore
from ezsd.cache import PER_IMAGE, Block, RaggedRows, forget_block, journaled_bad_images, write_block
from ezsd.crops import with_least_side
from ezsd.data.annotations import Annotations
from ezsd.detector.proposer import Proposer
from ezsd.pipeline.config.schema import Config, ProposalConfig
from ezsd.pipeline.data.annotation_cache import training_annotations
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.data.image_source import ImageSource
from ezsd.pipeline.data.images import most_bad_images, require_few_bad
from ezsd.pipeline.errors import ImageError
from ezsd.pipeline.extraction.anchors import anchor_looks
from ezsd.pipeline.extraction.encoder import SHORT, CropEncoder, single_thread
from ezsd.pipeline.extraction.external_proposals import given_proposals
from ezsd.pipeline.extraction.in_flight import Fetched, Work, in_flight
from ezsd.pipeline.extraction.proposer import ProposerWeights, load_proposer, propose
from ezsd.pipeline.extraction.read_ahead import read_images
from ezsd.pipeline.extraction.reuse import Columns, KnownRegion, Reuse, ReusedRows
from ezsd.pipeline.extraction.teacher import configured_teacher
from ezsd.proposals.refine import vote
from ezsd.proposals.select import Looks, choose_regions, clear_of_base, looks_of, may_be_unseen
from ezsd.teacher.open_clip import Teacher, device_of
from ezsd.transfer import to_device

log = logging.getLogger("ezsd")

_READ_AHEAD = 2
"""Images that are read while a CPU encodes another one."""
_IN_FLIGHT = 3
"""Images that a GPU works on in turns, see benchmarks/stage_one_model.py; a CPU works on one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractJob:
    """The inputs of an extraction; a worker makes the teacher and reads the annotations itself.

    Jobs are equal when they make the same rows for the same store: `made_from` stands for the arrays.
    """

    store: str
    dataset: Dataset = field(hash=False)
    config: Config
    device: str
    values: NDArray[np.float32] = field(compare=False)
    """Re-normalised LayerNorms, (K,)."""
    parameters: list[dict[str, object]] = field(compare=False)
    """Names and shapes of the LayerNorms."""
    text: NDArray[np.float32] = field(compare=False)
    """Unit text rows of base + novel classes, (C, D)."""
    made_from: str
    """Digest of the manifest: a worker that outlives a build keeps nothing for another one."""
    limit: int | None = None
    """Only the first images of the training split are the store's."""
    reuse: Reuse | None = None
    """An earlier store to take rows from."""
    proposer: ProposerWeights | None = None
    """The learned proposer; None where anchors or given boxes become proposals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """State that a process keeps between blocks."""

    config: Config
    images: ImageSource
    annotations: Annotations
    teacher: Teacher
    encoder: CropEncoder
    text: Tensor
    """Unit text rows of base + novel classes, (C, D), where the teacher is."""
    base_count: int
    """Number of base classes, the first in `text`."""
    background: Tensor | None
    """Unit text rows of the background prompts, (B, D), where the teacher is."""
    reused: ReusedRows | None = None
    most_bad: int = 0
    """Images that may be left out because they cannot be read."""
    proposer: Proposer | None = None
    given: Mapping[int, Columns] | None = None
    """Proposals by image, where a file has them."""


@lru_cache(maxsize=1)
def _worker(job: ExtractJob) -> Worker:
    config, dataset = job.config, job.dataset
    teacher = configured_teacher(config.teacher, job.device)
    restore(teacher.layer_norms(), job.values, job.parameters)
    background = None
    if config.teacher.backgrounds:
        with torch.no_grad():
            background = to_device(teacher.encode_text(config.teacher.backgrounds), device_of(teacher))
    annotations = training_annotations(dataset.root / dataset.train_annotations, dataset.split)
    images = min(job.limit or len(annotations.images), len(annotations.images))
    return Worker(
        config=config,
        images=dataset.images("train"),
        annotations=annotations,
        teacher=teacher,
        encoder=CropEncoder(teacher, config),
        text=torch.from_numpy(np.array(job.text, np.float32)).to(device_of(teacher)),
        base_count=len(dataset.split.base),
        background=background,
        most_bad=most_bad_images(config.build.max_bad_images, images),
        reused=None if job.reuse is None else ReusedRows(job.reuse),
        proposer=None
        if job.proposer is None
        else load_proposer(
            config.proposer,
            job.proposer,
            proposals=config.max_proposals,
            nms_iou=config.proposals.nms_iou,
            device=job.device,
        ),
        given=given_proposals(config.proposals, annotations.images) if config.proposals.boxes else None,
    )


def extract_block(job: ExtractJob, block: Block) -> int:
    """Compute one block and write it whole into the store's journal; returns how many crops the teacher was shown.

    Raises:
        ImageError: with the block's, more images cannot be read than `build.max_bad_images` allows; nothing of the
            block is kept then.
    """
    found = _extract(job, block)
    write_block(job.store, block, found.rows, bad_images=found.bad)
    if found.bad:
        try:
            # Counted once they are written: of two processes that find one each, the later sees both.
            require_few_bad(journaled_bad_images(job.store), _worker(job).most_bad)
        except ImageError:
            forget_block(job.store, block)
            raise
    return found.passes


def block_rows(job: ExtractJob, block: Block, *, left_out: Collection[int] = ()) -> dict[str, RaggedRows]:
    """All rows of one block of images; none of those that are left out, by id.

    Raises:
        ImageError: another one cannot be read.
    """
    return _extract(job, block, left_out).rows


@dataclass(frozen=True, slots=True)
class _Extracted:
    rows: dict[str, RaggedRows]
    passes: int
    """Crops that the teacher was shown."""
    bad: dict[int, str]
    """Faults of the images that cannot be read, by id."""


def _extract(job: ExtractJob, block: Block, left_out: Collection[int] | None = None) -> _Extracted:
    """The rows of a block, without images of given ids, or else without those that cannot be read.

    The store has the same bytes from any number of workers, see `single_thread`.
    """
    images: list[dict[str, Columns]] = []
    bad: dict[int, str] = {}
    passes = 0
    worker = _worker(job)
    most = 1 if device_of(worker.teacher).type == "cpu" else _IN_FLIGHT
    with single_thread(), contextlib.closing(_views(worker, block)) as views:
        for found, shown in in_flight((_extract_view(view, left_out, bad) for view in views), most=most):
            images.append(found)
            passes += shown
    return _Extracted(_collate(images), passes, bad)


def _extract_view(
    view: View, left_out: Collection[int] | None, bad: dict[int, str]
) -> Work[tuple[dict[str, Columns], int]]:
    """The rows of an image, and how many crops the teacher was shown; adds to `bad`, see `_Extracted`."""
    worker = view.worker
    if left_out is not None and view.record.id in left_out:
        return _no_rows(worker.teacher.embed_dim), 0
    try:
        if left_out is None and worker.reused is None:
            # Also where there is no box to encode: training is going to read it.
            view.require_readable()
        return (yield from _extract_image(view)), view.passes
    except ImageError as error:
        if left_out is not None or not worker.most_bad:
            raise
        log.warning("left out: %s", error)
        bad[view.record.id] = worker.images.portable_reason(error)
        return _no_rows(worker.teacher.embed_dim), view.passes


def _views(worker: Worker, block: Block) -> Generator[View, None, None]:
    """The images of a block in order. The next ones are read while one is encoded, unless they may not be needed."""
    positions = range(block.start, block.stop)
    if worker.reused is not None:
        yield from (View(worker, position, partial(_read, worker, position)) for position in positions)
        return
    records = worker.annotations.images
    reads = read_images(
        positions,
        partial(_read, worker),
        lambda position: records[position].width * records[position].height,
        device=device_of(worker.teacher),
        most=_READ_AHEAD,
    )
    with contextlib.closing(reads):
        for position, read in reads:
            yield View(worker, position, read)


def _read(worker: Worker, position: int) -> Tensor:
    """(3, H, W) uint8."""
    return worker.images.read(worker.annotations.images[position])


def _no_rows(embed_dim: int) -> dict[str, Columns]:
    """The rows of an image that cannot be read."""
    return {
        product: {field.name: np.zeros((0, *field.row_shape(embed_dim)), field.dtype) for field in PER_IMAGE[product]}
        for product in PER_IMAGE
    }


@torch.no_grad()
def _extract_image(view: View) -> Work[dict[str, Columns]]:
    worker, record, position = view.worker, view.record, view.position
    rows = {} if worker.reused is None else worker.reused.taken(record.id)
    objects = None if "ground_truth" in rows else _encoded_objects(view)
    if "proposals" not in rows and worker.given is not None:
        rows["proposals"] = worker.given[record.id]
    if "proposals" not in rows and worker.proposer is not None:
        rows["proposals"] = propose(worker.proposer, view.pixels, worker.config.proposer)
    if "regions" not in rows:
        base_boxes = torch.from_numpy(worker.annotations.box[worker.annotations.rows(position)])
        if "proposals" not in rows:
            rows |= yield from _proposed(view, base_boxes)
        if "regions" not in rows:
            rows["regions"] = yield from filtered(view, rows["proposals"], base_boxes)
    if objects is not None:
        rows["ground_truth"] = _ground_truth(view, objects.result()[0])
    return rows


class View:
    """An image as the teacher sees it."""

    def __init__(self, worker: Worker, position: int, read: Callable[[], Tensor]) -> None:
        self.worker, self.position, self._read = worker, position, read
        self.record = worker.annotations.images[position]
        self.passes = 0
        """Crops that the teacher was shown, but for those that fill up a batch."""

    def encode(self, boxes: Tensor) -> Tensor:
        """Unit embeddings (R, D) float32, where the teacher is, of boxes (R, 4)."""
        if not len(boxes):
            return torch.zeros(0, self.worker.teacher.embed_dim, device=device_of(self.worker.teacher))
        embedding, passes = self.worker.encoder.encode(self.pixels, boxes)
        self.passes += passes
        return embedding

    def looks(self, embedding: Tensor) -> Looks:
        """Score embeddings (R, D) by the teacher, where they are."""
        worker = self.worker
        return looks_of(
            embedding,
            worker.text,
            worker.background,
            base_count=worker.base_count,
            logit_scale=worker.teacher.logit_scale,
            score=worker.config.proposals.score,
        )

    def score(self, embedding: Tensor) -> Tensor:
        """Scores (R,) of embeddings (R, D); see `select_regions`."""
        return self.looks(embedding).score

    def require_readable(self) -> None:
        """ImageError when the image cannot be read."""
        self._read()

    @cached_property
    def pixels(self) -> Tensor:
        """(3, H, W) uint8, where the teacher is. ImageError when it cannot be read."""
        return to_device(self._read(), device_of(self.worker.teacher))


def _proposed(view: View, base_boxes: Tensor) -> Work[dict[str, Columns]]:
    """Proposals from the anchors, and the regions among them unless they are refined first."""
    worker, record = view.worker, view.record
    settings = worker.config.proposals
    anchors, embedding = yield from anchor_looks(settings, record.width, record.height, view.encode, view.score)
    coming = Fetched(*view.looks(embedding), embedding.half())
    yield
    *looks, half = coming.result()
    found = choose_regions(
        anchors,
        Looks(*looks),
        base_boxes,
        base_count=worker.base_count,
        nms_iou=settings.nms_iou,
        keep_proposals=settings.max_proposals,
        base_iou=settings.base_iou,
        drop_base_guesses=settings.drop_base_guesses,
        keep_regions=settings.max_regions,
        drop_background=settings.drop_background,
    )
    proposals = {"box": anchors[found.proposal].numpy(), "score": found.proposal_score.numpy()}
    if settings.refine != "none":
        return {"proposals": proposals}
    return {
        "proposals": proposals,
        "regions": {
            "box": anchors[found.region].numpy(),
            "score": found.region_score.numpy(),
            "confidence": found.confidence.numpy(),
            "class_index": found.class_index.numpy().astype(np.int32),
            "embedding": half[found.region].numpy(),
        },
    }


def filtered(view: View, proposals: Columns, base_boxes: Tensor) -> Work[Columns]:
    """Regions from kept proposals, best first, encoding only as many as filters and ranking make necessary."""
    worker, settings = view.worker, view.worker.config.proposals
    box, score = refined(settings, proposals)
    passing = torch.nonzero(clear_of_base(box, base_boxes, base_iou=settings.base_iou))[:, 0]
    known = {} if worker.reused is None else worker.reused.known(view.record.id)
    found: list[tuple[int, np.float32, int, np.ndarray]] = []
    weight = settings.objectness_weight if settings.has_objectness else 1.0
    # Where the teacher has a say in the ranking, it has to be shown all.
    for places in passing.split(max(settings.max_regions, SHORT) if weight == 1 else len(passing) or 1):
        missing = [place for place in places.tolist() if box[place].numpy().tobytes() not in known]
        known |= yield from _encoded(view, box[missing])
        for place in places.tolist():
            one = known[box[place].numpy().tobytes()]
            foreground, guess = torch.tensor([one.foreground]), torch.tensor([one.class_index])
            if may_be_unseen(
                foreground,
                guess,
                base_count=worker.base_count,
                drop_base_guesses=settings.drop_base_guesses,
                drop_background=settings.drop_background,
            ):
                found.append((place, one.confidence, one.class_index, one.embedding))
        if len(found) >= settings.max_regions:
            break
    places = np.array([place for place, *_ in found], np.int64)
    confidence = np.array([confidence for _, confidence, _, _ in found], np.float32)
    # A weight of 1 changes no bit.
    objectness, certainty = score.numpy()[places].astype(np.float64), confidence.astype(np.float64)
    ranked = (objectness**weight * certainty ** (1 - weight)).astype(np.float32)
    order = np.argsort(-ranked, kind="stable")[: settings.max_regions]
    kept = [found[row] for row in order.tolist()]
    empty = np.zeros((0, worker.teacher.embed_dim), np.float16)
    return {
        "box": box.numpy()[places[order]],
        "score": ranked[order],
        "confidence": confidence[order],
        "class_index": np.array([guess for _, _, guess, _ in kept], np.int32),
        "embedding": np.stack([embedding for *_, embedding in kept]) if kept else empty,
    }


def refined(config: ProposalConfig, proposals: Columns) -> tuple[Tensor, Tensor]:
    """Boxes (P, 4) and scores (P,) of an image's proposals that regions are chosen among, best first."""
    box, score = torch.from_numpy(proposals["box"]), torch.from_numpy(proposals["score"])
    if config.refine == "none":
        return box, score
    return vote(box, score, refine_iou=config.refine_iou, nms_iou=config.nms_iou)


def _encoded(view: View, boxes: Tensor) -> Work[dict[bytes, KnownRegion]]:
    """Encode boxes with the teacher; returns regions by the bytes of their boxes."""
    embedding = view.encode(boxes)
    looks = view.looks(embedding)
    coming = Fetched(looks.foreground, looks.confidence * looks.foreground, looks.class_index, embedding.half())
    yield
    foreground, confidence, guess, half = (one.numpy() for one in coming.result())
    return {
        box.numpy().tobytes(): KnownRegion(float(foreground[row]), confidence[row], int(guess[row]), half[row])
        for row, box in enumerate(boxes)
    }


def _encoded_objects(view: View) -> Fetched:
    """Embeddings (N, D) float16 of an image's base objects, on their way."""
    worker = view.worker
    boxes = torch.from_numpy(worker.annotations.box[worker.annotations.rows(view.position)])
    return Fetched(view.encode(with_least_side(boxes, worker.config.adapt.min_crop_size)).half())


def _ground_truth(view: View, embedding: Tensor) -> Columns:
    annotations = view.worker.annotations
    rows = annotations.rows(view.position)
    return {
        "box": annotations.box[rows],
        "class_index": annotations.class_index[rows],
        "annotation_id": annotations.annotation_id[rows],
        "embedding": embedding.numpy(),
    }


def _collate(images: Sequence[dict[str, Columns]]) -> dict[str, RaggedRows]:
    return {
        product: RaggedRows(
            counts=np.array([len(image[product]["box"]) for image in images], np.int32),
            fields={name: np.concatenate([image[product][name] for image in images]) for name in images[0][product]},
        )
        for product in images[0]
    }
