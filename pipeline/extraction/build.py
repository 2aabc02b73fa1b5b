"""`ezsd cache build`: from a folder of images and base boxes to a committed store."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ezsd.adapt import restore
from ezsd.cache import (
    JSON,
    PER_STORE,
    Block,
    Manifest,
    Store,
    StoreMismatch,
    StoreWriter,
    Unfinished,
    info,
    is_committed,
)
from ezsd.data.annotations import Annotations
from ezsd.errors import inflected
from ezsd.pipeline.config.schema import Config, TeacherConfig
from ezsd.pipeline.data.datasets import require_prompts
from ezsd.pipeline.data.images import most_bad_images, require_few_bad
from ezsd.pipeline.data.requirements import (
    require_evaluation,
    require_image_files,
    too_few_to_hold_out,
)
from ezsd.pipeline.errors import ConfigError, ImageError
from ezsd.pipeline.extraction.adapt import adapt_teacher
from ezsd.pipeline.extraction.base_images import BaseImages
from ezsd.pipeline.extraction.commit import require_workers, write_shards
from ezsd.pipeline.extraction.environment import describe_build, weights_file_digest
from ezsd.pipeline.extraction.external_proposals import given_proposals
from ezsd.pipeline.extraction.forecast import warn_of_room
from ezsd.pipeline.extraction.jobs import extract_numbered, leave_job
from ezsd.pipeline.extraction.manifest_names import as_settings
from ezsd.pipeline.extraction.proposer import (
    ProposerWeights,
    make_proposer,
    proposer_weights,
    train_proposer,
)
from ezsd.pipeline.extraction.provenance import describe, model_inputs
from ezsd.pipeline.extraction.request import BuildRequest, read_annotations
from ezsd.pipeline.extraction.reuse import Reuse, plan_reuse
from ezsd.pipeline.extraction.run_proposer import run_proposer, with_run_network
from ezsd.pipeline.extraction.teacher import check_precision, configured_teacher, require_words
from ezsd.pipeline.extraction.worker import ExtractJob
from ezsd.pipeline.files import as_json
from ezsd.pipeline.interrupts import keeping
from ezsd.pipeline.progress import Progress, log_file, now, timed
from ezsd.pipeline.runs.model import require_sizes, warn_of_random_weights
from ezsd.pipeline.scheduling.job_array import Share, open_share
from ezsd.pipeline.scheduling.pool import Pool
from ezsd.teacher.open_clip import Teacher, require_told_apart
from ezsd.vocabulary import canonical, first_few

log = logging.getLogger("ezsd")


@dataclass(frozen=True, slots=True)
class BuildReport:
    """Result of a build."""

    path: Path
    already_complete: bool
    images: int = 0
    extracted: int = 0
    """Images whose rows this call made."""
    crops: int = 0
    """Crops of these images that the teacher was shown."""
    bad_images: int = 0
    """Images left out because they cannot be read; the store says which and why."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by stage: adapt, extract, commit."""
    reused: tuple[str, ...] = ()
    """Products taken over from another store."""
    computed: tuple[str, ...] = ()
    """Products that this build computed."""


@dataclass(frozen=True, slots=True)
class ShareReport:
    """Result of one part of a build."""

    path: Path
    share: Share
    already_complete: bool
    """True if the whole store was there already."""
    blocks: int = 0
    """Blocks of this part; all of them are finished."""
    missing: int = 0
    """Blocks of other parts that are not finished yet."""
    bad_images: int = 0
    """Images left out so far, by all parts, because they cannot be read."""


def build_cache(request: BuildRequest) -> BuildReport:
    """Build a store, or go on with an unfinished one; a complete one with the same fingerprint is left alone.

    Reads the training split only, and of its boxes only the base ones.

    Raises:
        ValueError: (of many kinds) something about the input is wrong; the message is one line.
    """
    request = with_run_network(request)
    source = _source(request)
    if source is None:
        return BuildReport(request.out, already_complete=True)
    seconds: dict[str, float] = {}
    with Pool(request.schedule) as pool, _open_writer(request, source) as writer:
        if writer.complete:
            return BuildReport(request.out, already_complete=True)
        with log_file(writer.log_path), keeping(lambda: _kept(writer)):
            environment = _begin(writer, request, source, pool)
            with timed(seconds, "adapt"):
                job = _prepare(writer, request, source)
            with timed(seconds, "extract"):
                _retry_mended(writer, request, source)
                _require_few_bad(writer, request)
                passes = _extract(writer, job, pool, writer.pending(), writer.blocks)
            with timed(seconds, "commit"):
                write_shards(writer, pool)
                bad = len(writer.bad_images())
                spent = {stage: round(duration, 2) for stage, duration in seconds.items()}
                writer.write_environment({**environment, "seconds": spent, "encoded": dict(passes), "finished": now()})
                writer.finish()
    return BuildReport(
        request.out,
        already_complete=False,
        images=len(source.annotations.images),
        extracted=passes["images"],
        crops=passes["crops"],
        bad_images=bad,
        seconds=seconds,
        reused=source.reused,
        computed=tuple(product for product in source.manifest.products if product not in source.reused),
    )


def build_share(request: BuildRequest, share: Share) -> ShareReport:
    """Extract the blocks of one part of a store, beside other processes that extract other parts.

    The first to come prepares the store, the others wait for it. `commit_cache` finishes what all of them did.

    Raises:
        ValueError: see `build_cache`.
    """
    request = with_run_network(request)
    source = _source(request)
    if source is None:
        return ShareReport(request.out, share, already_complete=True)
    with (
        Pool(request.schedule) as pool,
        open_share(lambda shared: _open_writer(request, source, shared=shared)) as writer,
    ):
        if writer.complete:
            return ShareReport(request.out, share, already_complete=True)
        with log_file(writer.log_path), keeping(lambda: _kept(writer)):
            if not writer.shared:
                _begin(writer, request, source, pool, shares=share.count)
            job = _prepare(writer, request, source)
            if not writer.shared:
                _retry_mended(writer, request, source)
            _require_few_bad(writer, request)
            writer.share()
            own = [block for block in writer.blocks if share.has(block)]
            _extract(writer, job, pool, [block for block in writer.pending() if share.has(block)], own)
            missing, bad = len(writer.pending()), len(writer.bad_images())
    return ShareReport(request.out, share, already_complete=False, blocks=len(own), missing=missing, bad_images=bad)


def _kept(writer: StoreWriter) -> str:
    """Describe what a build that is stopped now leaves, and what to type."""
    total, left = len(writer.blocks), len(writer.pending())
    made = total - left
    done = (
        f"{made} of {total} blocks {inflected(made, 'is', 'are')} done"
        if writer.has_per_store("teacher")
        else "no block is begun yet"
    )
    return f"{done}; run the same command to go on"


@dataclass(frozen=True, slots=True)
class _Source:
    """Inputs of a store, as far as they are known before anything is written."""

    annotations: Annotations
    teacher: Teacher
    manifest: Manifest
    reuse: Reuse | None

    @property
    def reused(self) -> tuple[str, ...]:
        """Products taken over from another store."""
        return () if self.reuse is None else self.reuse.products


def _source(request: BuildRequest) -> _Source | None:
    """Inputs of the store to build; None if it is complete already, which is decided without loading the teacher."""
    request.dataset.require()
    annotations = read_annotations(request)
    if _known_complete(request, annotations):
        return None
    if request.config.proposals.boxes:
        # Whatever is wrong with them is said before anything is written.
        given_proposals(request.config.proposals, read_annotations(dataclasses.replace(request, limit=None)).images)
    require_buildable(request, annotations)
    if request.reuse is not None:
        # Whether there is anything to reuse shows without the teacher.
        Store(request.reuse).require_regions()
    _tell_of_undescribed(request)
    teacher = configured_teacher(request.config.teacher, request.device)
    require_words(teacher, request.dataset.split.names, request.config.teacher.backgrounds)
    manifest = describe(request.dataset, annotations, request.config, teacher.fingerprint())
    reuse = None if request.reuse is None else plan_reuse(request.reuse, manifest)
    return _Source(annotations, teacher, manifest, reuse)


def require_buildable(request: BuildRequest, annotations: Annotations) -> None:
    """Refuse, before anything heavy is loaded, what would be refused in the middle of a build or after it.

    Raises:
        ConfigError: too few images with base boxes.
        DatasetError: an image file is listed twice, or files of the evaluation are missing.
        AnnotationError: the validation annotations are not in order.
        VocabularyError: no prompts can be made of the names.
    """
    dataset, config = request.dataset, request.config
    require_prompts(dataset.split, config.teacher)
    if config.proposals.learned:
        trained = config.proposer.run is None
        proposer = make_proposer(config.proposer, pretrained=trained)
        if trained:
            sizes = np.stack([annotations.images.width, annotations.images.height], axis=1)
            require_sizes("proposer", config.proposer, proposer.backbone, config.proposer, sizes)
    with_boxes = len(np.unique(annotations.image_index))
    if too_few_to_hold_out(with_boxes, config.adapt.held_out):
        cure = "add boxes of base names" if request.limit is None else f"raise `limit={request.limit}`"
        raise ConfigError(
            f"{dataset.annotations('train')}: re-normalisation needs base boxes in at least 2 images, found them in "
            f"{with_boxes}; {cure}"
        )
    require_image_files(dataset, "train", annotations, all_there=False)
    if "val" in dataset.parts:
        require_evaluation(dataset, masks=config.model.masks)


def _tell_of_undescribed(request: BuildRequest) -> None:
    names = request.dataset.split.names
    described = {canonical(name) for name, *_ in request.config.teacher.descriptions}
    missing = [repr(name) for name in names if canonical(name) not in described] if described else []
    if missing:
        log.info(
            "%d of %d names %s no descriptions, and prompts come from the template there: %s",
            len(missing),
            len(names),
            inflected(len(missing), "has", "have"),
            first_few(missing, 5),
        )


def _begin(
    writer: StoreWriter, request: BuildRequest, source: _Source, pool: Pool, shares: int | None = None
) -> dict[str, JSON]:
    """Check that a build can be done and record who does it, before any work; returns that record."""
    config = _anywhere(request.config)
    files = [request.dataset.root.absolute() / request.dataset.train_annotations]
    files += [Path(name) for name in (config.teacher.weights, config.proposals.boxes) if name and Path(name).is_file()]
    require_workers(pool, writer, device=request.device, files=files)
    warn_of_room(request, source.annotations, source.teacher)
    # With absolute paths: whoever needs the teacher again stands elsewhere.
    environment = describe_build(dataclasses.replace(request, config=config), workers=pool.workers, shares=shares)
    writer.write_environment(environment)
    return environment


def _open_writer(request: BuildRequest, source: _Source, *, shared: bool = False) -> StoreWriter:
    return _writer(request, source.manifest, source.annotations, source.teacher.embed_dim, shared=shared)


def _writer(
    request: BuildRequest, manifest: Manifest, annotations: Annotations, embed_dim: int, *, shared: bool = False
) -> StoreWriter:
    try:
        return StoreWriter.open(
            request.out,
            manifest,
            image_ids=[image.id for image in annotations.images],
            widths=[image.width for image in annotations.images],
            heights=[image.height for image in annotations.images],
            embed_dim=embed_dim,
            block_images=request.config.build.block_images,
            shared=shared,
        )
    except StoreMismatch as error:
        raise error.reworded(as_settings, cure=_cure(error, request.out.absolute())) from None


def _cure(error: StoreMismatch, store: Path) -> str | None:
    """Advice where a complete store has other settings: the products that a build in another folder takes over."""
    if error.folder is None:
        return None
    if not error.shared:
        return f"build into another folder: `out={error.folder}`"
    return f"build into another folder: `out={error.folder}` `reuse={store}` takes over {', '.join(error.shared)}"


def _known_complete(request: BuildRequest, annotations: Annotations) -> bool:
    """True if a complete store is the wanted one, decided without loading the teacher.

    The store remembers the digest of the file that its teacher's weights came from: the same file under the same
    name makes the same teacher. Where that does not settle it, nothing is known, and the teacher has to be loaded.
    """
    if not is_committed(request.out):
        return False
    found = info(request.out)
    recorded = found.environment or {}
    same_file = recorded.get("weights_file_sha256") == (weights_file_digest(request.config) or "unknown")
    same_loader = recorded.get("versions", {}).get("open_clip_torch") == importlib.metadata.version("open_clip_torch")
    if not same_file or not same_loader or found.problems:
        return False
    asked = as_json(dataclasses.asdict(request.config.teacher)) | {"weights": None}
    # What an earlier version did not record was as it is by default.
    defaults = as_json(dataclasses.asdict(TeacherConfig(name="")))
    if {**defaults, **recorded.get("teacher", {}), "weights": None} != asked:
        return False
    model = model_inputs(found.manifest)
    wanted = describe(request.dataset, annotations, request.config, model)
    if wanted != found.manifest:
        return False
    # The store may have leftovers of its build, which opening it for writing removes.
    assert found.embed_dim is not None
    _writer(request, wanted, annotations, found.embed_dim).close()
    return True


def _prepare(writer: StoreWriter, request: BuildRequest, source: _Source) -> ExtractJob:
    """Re-normalise and embed the names, or take both from the journal or an earlier store."""
    teacher, annotations, reuse = source.teacher, source.annotations, source.reuse
    split = request.dataset.split
    if not writer.has_per_store("text"):
        # Re-normalisation does not tell equal prompts apart: better now than after it.
        require_told_apart(split.names, torch.from_numpy(embed_names(teacher, split.names)))
    for product in PER_STORE:
        if reuse is not None and product in reuse.products and not writer.has_per_store(product):
            writer.write_per_store(product, *Store(reuse.store).read_per_store(product))
    if not writer.has_per_store("teacher"):
        values, tuned = adapted(request, teacher, annotations)
        writer.write_per_store("teacher", {"values": values}, as_json(tuned))
    arrays, attributes = writer.read_per_store("teacher")
    restored = (arrays["values"], attributes["parameters"])
    restore(teacher.layer_norms(), *restored)
    check_precision(teacher, request.config, request.dataset, annotations, restored, request.device)
    if not writer.has_per_store("text"):
        names = {"names": split.names, "base_count": len(split.base), "template": request.config.teacher.template}
        writer.write_per_store("text", {"embedding": embed_names(teacher, split.names)}, as_json(names))
    text_rows, _ = writer.read_per_store("text")
    network = _proposer(writer, request, annotations) if "proposer" in source.manifest.products else None
    return extract_job(
        request,
        attributes["parameters"],
        arrays["values"],
        text_rows["embedding"],
        source.manifest.digest,
        reuse=reuse,
        proposer=network,
    )


def _proposer(writer: StoreWriter, request: BuildRequest, annotations: Annotations) -> ProposerWeights:
    """Train the proposer, or take it from a run, or from the journal."""
    if not writer.has_per_store("proposer"):
        values, trained = trained_proposer(request, annotations, writer.unfinished("proposer"))
        writer.write_per_store("proposer", {"values": values}, as_json(trained))
    return proposer_weights(*writer.read_per_store("proposer"))


def trained_proposer(
    request: BuildRequest, annotations: Annotations, unfinished: Unfinished | None = None
) -> tuple[NDArray[np.float32], dict[str, object]]:
    """Train a proposer on the base boxes, or read that of a run; its state, and its steps and figures."""
    config = request.config
    if config.proposer.run is not None:
        values, of_run = run_proposer(config.proposer)
        log.info("proposer: the proposal network of %s after %s steps", config.proposer.run, of_run["steps"])
        return values, of_run
    if config.proposer.backbone != "tiny" and config.proposer.weights is None:
        warn_of_random_weights(config.proposer.backbone, "proposer.weights", "the proposer's ")
    values, trained = train_proposer(
        _base_images(request, annotations, "the proposer's training"),
        config.proposer,
        held_out=config.adapt.held_out,
        device=torch.device(request.device),
        seed=config.build.seed,
        unfinished=unfinished,
    )
    log.info(
        "proposer: %d boxes an image cover %.1f %% of %d held-out base objects at IoU 0.5, %.1f %% at IoU 0.7",
        trained["held_out_boxes_per_image"],
        100 * float(str(trained["held_out_recall_50"])),
        trained["held_out_objects"],
        100 * float(str(trained["held_out_recall_70"])),
    )
    return values, trained


def _base_images(request: BuildRequest, annotations: Annotations, reader: str) -> BaseImages:
    most_bad = most_bad_images(request.config.build.max_bad_images, len(annotations.images))
    source = request.dataset.images("train")
    return BaseImages(annotations=annotations, source=source, reader=reader, most_bad=most_bad)


def adapted(
    request: BuildRequest, teacher: Teacher, annotations: Annotations
) -> tuple[NDArray[np.float32], dict[str, object]]:
    """Re-normalise the teacher in place; its tuned values and what is said about them."""
    config = request.config
    torch.manual_seed(config.build.seed)
    values, tuned = adapt_teacher(
        teacher,
        _base_images(request, annotations, "re-normalisation"),
        config=config.adapt,
        crops=config.proposals,
        seed=config.build.seed,
    )
    before, after = tuned["base_accuracy_before"], tuned["base_accuracy_after"]
    if tuned["steps"]:
        log.info("re-normalised: held-out base accuracy %.3f -> %.3f", before, after)
    else:
        why = "adapt.steps is 0" if not config.adapt.steps else f"teacher {teacher.name} has nothing that it tunes"
        log.warning("not re-normalised, as %s: held-out base accuracy %.3f", why, before)
    return values, tuned


def _retry_mended(writer: StoreWriter, request: BuildRequest, source: _Source) -> None:
    """Have the blocks done again of which an image could not be read when they were, and now can."""
    images = request.dataset.images("train")
    bad, mended = writer.bad_images(), list[int]()
    for record in source.annotations.images:
        if record.id in bad:
            with contextlib.suppress(ImageError):
                images.read(record)
                mended.append(record.id)
    writer.retry_images(mended)


def _require_few_bad(writer: StoreWriter, request: BuildRequest) -> None:
    """Stop when blocks that are done leave out too many: killed before it counted, or the limit was higher."""
    images = _images(writer.blocks)
    require_few_bad(writer.bad_images(), most_bad_images(request.config.build.max_bad_images, images))


def embed_names(teacher: Teacher, names: Sequence[str]) -> NDArray[np.float32]:
    """Unit text rows (C, D) float32."""
    with torch.no_grad():
        rows: NDArray[np.float32] = teacher.encode_text(names).float().cpu().numpy()
    return rows


def extract_job(
    request: BuildRequest,
    parameters: list[dict[str, object]],
    values: NDArray[np.float32],
    text: NDArray[np.float32],
    made_from: str,
    *,
    reuse: Reuse | None = None,
    proposer: ProposerWeights | None = None,
) -> ExtractJob:
    """The job of a build's workers; its places are absolute, since workers run in other folders."""
    return ExtractJob(
        store=str(request.out.absolute()),
        dataset=dataclasses.replace(request.dataset, root=request.dataset.root.absolute()),
        config=_anywhere(request.config),
        device=request.device,
        values=values,
        parameters=parameters,
        text=text,
        limit=request.limit,
        made_from=made_from,
        reuse=reuse,
        proposer=proposer,
    )


def _anywhere(config: Config) -> Config:
    """Make the paths of a configuration absolute, for workers in any working folder."""
    teacher, proposer, proposals = config.teacher, config.proposer, config.proposals
    if teacher.weights and Path(teacher.weights).is_file():
        teacher = dataclasses.replace(teacher, weights=str(Path(teacher.weights).absolute()))
    if proposals.boxes:
        proposals = dataclasses.replace(proposals, boxes=str(Path(proposals.boxes).absolute()))
    # What is no place is a digest.
    if proposer.weights and Path(proposer.weights).is_file():
        proposer = dataclasses.replace(proposer, weights=str(Path(proposer.weights).absolute()))
    if proposer.run and Path(proposer.run).is_dir():
        proposer = dataclasses.replace(proposer, run=str(Path(proposer.run).absolute()))
    return dataclasses.replace(config, teacher=teacher, proposer=proposer, proposals=proposals)


class _Extraction(Progress):
    """Counts blocks as the images and crops that they are."""

    def __init__(self, blocks: Sequence[Block], pending: Sequence[Block]) -> None:
        done = _images(blocks) - _images(pending)
        super().__init__("extract", _images(blocks), unit="image", done=done)
        self._sizes = {block.index: _images([block]) for block in pending}
        self.crops = 0
        """Crops that the teacher was shown."""

    def finish(self, item: object, result: object) -> None:
        """Count a block, by its number, and the crops that were encoded for it."""
        assert isinstance(item, int)
        assert isinstance(result, int)
        self.crops += result
        self.advance(self._sizes[item], note=f"{self.crops / self.seconds:,.0f} crops/s")


def _images(blocks: Sequence[Block]) -> int:
    return sum(block.stop - block.start for block in blocks)


def _extract(
    writer: StoreWriter, job: ExtractJob, pool: Pool, pending: Sequence[Block], blocks: Sequence[Block]
) -> dict[str, int]:
    """Do what is left of some blocks; says how many images that were, and how many crops were encoded for them."""
    if len(pending) < len(blocks):
        log.info("resuming: %d of %d blocks are done", len(blocks) - len(pending), len(blocks))
    task = partial(extract_numbered, leave_job(writer, job))
    numbers = [block.index for block in pending]
    with _Extraction(blocks, pending) as progress:
        pool.run(task, numbers, named=lambda number: f"block {number}", progress=progress)
    images, crops = _images(pending), progress.crops
    log.info("the teacher saw %s crops, %.0f an image", f"{crops:,}", crops / max(images, 1))
    return {"images": images, "crops": crops}
