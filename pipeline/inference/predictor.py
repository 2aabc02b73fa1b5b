"""Detector of a finished run, ready for inference, and the teacher of the run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ezsd.adapt import restore
from ezsd.cache import Manifest
from ezsd.competitors import among, competition
from ezsd.data.dataset import pad_images, padded_size, resize
from ezsd.data.masks import encode
from ezsd.detector.masks import paste
from ezsd.detector.model import Detections, Detector, Vocabulary
from ezsd.errors import TeacherError, quantity
from ezsd.pipeline.config.schema import Config, EvalConfig, TeacherConfig, at_test_time, from_tables, to_tables
from ezsd.pipeline.devices import is_out_of_memory, more_memory, require_backend_there, said_instead
from ezsd.pipeline.errors import ConfigError, OutOfMemory, RunError
from ezsd.pipeline.extraction.encoder import CropEncoder
from ezsd.pipeline.extraction.provenance import model_inputs, proposal_settings
from ezsd.pipeline.extraction.teacher import recorded_teacher
from ezsd.pipeline.inference.ensemble import TeacherEnsemble
from ezsd.pipeline.runs.model import build_detector, require_same_body
from ezsd.pipeline.runs.run import Run, unlike_a_run
from ezsd.precision import FiniteOutputs, autocast, network_dtype
from ezsd.teacher.open_clip import Teacher
from ezsd.vocabulary import texts

log = logging.getLogger("ezsd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Names to detect, and names that compete with them unreported; `TrainedDetector.search` makes it."""

    text: Tensor
    """Unit rows of the names to detect, (C, D)."""
    base: Tensor
    """Marks the base classes of the run among them, (C,) bool."""
    competing: Tensor
    """Unit rows of the names that compete, (K, D); K = 0 when the names are searched alone."""
    competitors: tuple[str, ...]
    """Names that compete, (K,)."""
    excluded: tuple[str, ...]
    """Names of the run that do not compete, because they mean nearly what an asked name means."""


@dataclass(frozen=True, slots=True)
class ResizedImage:
    """An image as the detector sees it."""

    original: Tensor
    """(3, H, W) uint8 RGB."""
    pixels: Tensor
    """(3, H, W) uint8 RGB in the size that the detector sees."""
    across: float
    """Resized width / original width."""
    down: float
    """Resized height / original height."""


@dataclass(slots=True)
class Room:
    """Images that the device's memory was found to hold."""

    images: int | None = None
    """Most images at a time; None until more did not fit."""

    def halve(self, images: int) -> None:
        """Called once the memory of so many images, which did not fit, is free again."""
        self.images = images // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("out of memory: going on with %s at once", quantity(self.images, "image"))


@dataclass(slots=True)
class Rounding:
    """Type that a network is found to need on a device."""

    exact: bool = False
    """True once an activation was beyond float16: computed in float32 from then on."""

    def widen(self) -> None:
        """Called once an activation was."""
        self.exact = True
        log.warning(
            "an activation of this run is beyond float16's range, in which this GPU detects: going on in float32"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """Options of a pass of the network, see `TrainedDetector.detect_each`."""

    keep: int | None
    masks: bool
    likeliest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedDetector:
    """Detector of a run with its settings and text embeddings."""

    detector: Detector
    config: Config
    names: tuple[str, ...]
    """Base classes, then novel classes."""
    base_count: int
    """Number of base classes."""
    text: Tensor
    """Unit rows of `names`, (C, D)."""
    device: torch.device
    ensemble: TeacherEnsemble | None = None
    """The teacher, where it takes part in scores."""
    room: Room = field(default_factory=Room)
    """Images at a time; halved, for good, where they do not fit."""
    rounding: Rounding = field(default_factory=Rounding)
    """Widened, for good, where float16 does not hold the activations."""

    def search(self, text: Tensor, *, alone: bool = False) -> Search:
        """Prepare a search for names, with the names of the run that compete with them.

        Args:
            text: unit rows of the names to detect, (C, D).
            alone: True to let no other name compete; every object then gets an asked name.
        """
        base = among(text, self.text[: self.base_count])
        if alone:
            return Search(text=text, base=base, competing=text[:0], competitors=(), excluded=())
        competing, aside = competition(text, self.text)
        competitors = tuple(name for name, takes_part in zip(self.names, competing.tolist(), strict=True) if takes_part)
        excluded = tuple(name for name, out in zip(self.names, aside.tolist(), strict=True) if out)
        return Search(text=text, base=base, competing=self.text[competing], competitors=competitors, excluded=excluded)

    def detect(
        self,
        images: Sequence[Tensor],
        search: Search,
        *,
        keep: int | None = None,
        masks: bool = True,
        least: float = 0.0,
    ) -> list[Detections]:
        """Detect named objects; their boxes are in the pixels of the images given, and all tensors on the CPU.

        Args:
            images: (3, H, W) uint8 RGB each, at original size.
            search: the names to detect.
            keep: most detections per image; None for the run's own setting.
            masks: False to make no masks even where the settings have them.
            least: detections that cannot reach this score need not be shown to the teacher; they may be left out.
        """
        return self.detect_each(self.resized(images), [search], keep=keep, masks=masks, least=least)[0]

    def resized(self, images: Sequence[Tensor]) -> list[ResizedImage]:
        """Fit images (3, H, W) uint8 RGB to the size that the detector sees."""
        settings = self.config.train
        return [
            ResizedImage(image, *resize(image, short_side=settings.min_size, long_side=settings.max_size))
            for image in images
        ]

    def detect_each(
        self,
        images: Sequence[ResizedImage],
        searches: Sequence[Search],
        *,
        keep: int | None = None,
        masks: bool = True,
        least: float = 0.0,
        likeliest: int = 0,
    ) -> list[list[Detections]]:
        """Detect the names of several searches as `detect` does those of one, in one pass of the network.

        `likeliest` is the number of the likeliest names to give with each detection, scored by the detector alone.
        """
        options = _Options(keep=keep, masks=masks, likeliest=likeliest)
        found = self._detect_resized([image.pixels for image in images], searches, options)
        return [
            [self._finished(image, one, search, least) for image, one in zip(images, _on_host(of_search), strict=True)]
            for of_search, search in zip(found, searches, strict=True)
        ]

    def _finished(self, image: ResizedImage, found: Detections, search: Search, least: float) -> Detections:
        """Detections in the image's own pixels, with the teacher's part in their scores."""
        factors = torch.tensor([image.across, image.down, image.across, image.down])
        found = dataclasses.replace(found, boxes=found.boxes / factors)
        if self.ensemble is None:
            return found
        text = torch.cat([search.text, search.competing])
        return self.ensemble.rescore(image.original, found, text, asked_base=search.base, least=least)

    def _detect_resized(
        self, images: Sequence[Tensor], searches: Sequence[Search], options: _Options
    ) -> list[list[Detections]]:
        """Detections in the pixels of resized images, of each search."""
        vocabularies = [
            Vocabulary(
                text=search.text.to(self.device, non_blocking=True),
                competing=search.competing.to(self.device, non_blocking=True),
            )
            for search in searches
        ]
        # A map's border shows in what is found beside it: no image is padded otherwise than it would be alone.
        alike: dict[tuple[int, int], list[int]] = {}
        for place, image in enumerate(images):
            alike.setdefault(padded_size([(image.shape[1], image.shape[2])]), []).append(place)
        found: list[dict[int, Detections]] = [{} for _ in searches]
        for places in alike.values():
            done = 0
            while done < len(places):
                some = places[done : done + (self.room.images or len(places))]
                each = self._detect_batch([images[place] for place in some], vocabularies, options)
                if each is None:
                    self.room.halve(len(some))
                    continue
                for of_search, ones in zip(found, each, strict=True):
                    of_search.update(zip(some, ones, strict=True))
                done += len(some)
        return [[of_search[place] for place in range(len(images))] for of_search in found]

    def _detect_batch(
        self, images: Sequence[Tensor], vocabularies: Sequence[Vocabulary], options: _Options
    ) -> list[list[Detections]] | None:
        """Detections in resized images of one padded size; None where the memory is too small for so many.

        Raises:
            OutOfMemory: it is too small for one image.
        """
        batch, sizes = pad_images(images)
        try:
            found = self._run(self._on_device(batch), sizes, vocabularies, options)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(images) == 1:
                height, width = sizes[0]
                raise OutOfMemory(
                    f"out of memory with one image of {width} x {height}{said_instead(error)}; "
                    f"{more_memory(self.device)}"
                ) from error
            return None
        return found

    def _run(
        self,
        batch: Tensor,
        sizes: list[tuple[int, int]],
        vocabularies: Sequence[Vocabulary],
        options: _Options,
    ) -> list[list[Detections]]:
        """Detections in a batch, again in float32 where an activation is beyond float16."""
        narrow = not self.rounding.exact and network_dtype(self.device, training=False) == torch.float16
        with (
            nullcontext() if self.rounding.exact else autocast(self.device, training=False),
            FiniteOutputs(self.detector) if narrow else nullcontext() as finite,
        ):
            found = self.detector.detect_each(
                batch,
                sizes,
                vocabularies,
                score_floor=self.config.eval.score_threshold,
                nms_iou=self.config.eval.nms_iou,
                keep=self.config.eval.max_detections if options.keep is None else options.keep,
                class_agnostic_nms=self.config.eval.class_agnostic_nms,
                objectness=self.config.eval.objectness,
                masks=options.masks and self.config.model.masks,
                likeliest=options.likeliest,
            )
        if finite is None or finite:
            return found
        self.rounding.widen()
        return self._run(batch, sizes, vocabularies, options)

    def _on_device(self, batch: Tensor) -> Tensor:
        batch = batch.to(self.device, non_blocking=True)
        # The layout that a GPU's kernels read; a CPU's results would be rounded otherwise.
        return batch.contiguous(memory_format=torch.channels_last) if batch.is_cuda else batch


def _on_host(found: Sequence[Detections]) -> list[Detections]:
    """Copy the detections of all images to the CPU in one piece, for a GPU is waited for at each."""
    if not found:
        return []
    counts = [len(one.boxes) for one in found]
    # float64 holds float32 and class numbers alike.
    table = torch.cat([torch.cat([one.boxes.double(), one.scores[:, None], one.labels[:, None]], 1) for one in found])
    return [
        Detections(
            boxes=rows[:, :4].float(),
            scores=rows[:, 4].float(),
            labels=rows[:, 5].long(),
            masks=None if one.masks is None else one.masks.cpu(),
            likeliest=None if one.likeliest is None else one.likeliest.cpu(),
        )
        for rows, one in zip(table.cpu().split(counts), found, strict=True)
    ]


def encode_masks(detections: Detections, height: int, width: int) -> list[bytes] | None:
    """Run lengths of each mask over an image of this size, in pixels; None without masks.

    Boxes must be in the pixels of that image.
    """
    if detections.masks is None:
        return None
    return [encode(pixels) for pixels in paste(detections.masks, detections.boxes, height, width)]


def load_trained(
    run: Run, device: str, overrides: Sequence[str] = (), *, weights: Path | None = None
) -> TrainedDetector:
    """Load the detector of a finished run, with settings overridden as `at_test_time` allows.

    Its teacher is loaded too where the settings give it a weight in scores; `weights` are its weights, if they have
    moved.

    Raises:
        RunError: training has not ended.
        ConfigError: see `at_test_time`.
        BackendError: the run's backend cannot run on this device.
        OutOfMemory: the device has no memory left.
        TeacherError: see `run_teacher`.
    """
    checkpoint, spec, tables = run.finished(), run.spec, run.embeddings()
    own = run.config
    config = at_test_time(own, overrides)
    require_backend_there(config.train.backend, torch.device(device))
    if config.model.masks and not own.model.masks:
        raise RunError(f"`run={run.folder}`: was trained without masks; train another one with `model.masks=true`")
    embed_dim, base_count = spec["embed_dim"], spec["base_count"]
    assert isinstance(embed_dim, int)
    assert isinstance(base_count, int)
    state = checkpoint.model()
    # Frozen normalisation is chosen by the presence of weights; the state replaces them whole.
    frozen = run.had_weights
    shaped = dataclasses.replace(config, model=dataclasses.replace(config.model, masks=own.model.masks))
    try:
        detector = build_detector(shaped, embed_dim, None, frozen_norms=frozen)
    except ConfigError as error:
        raise RunError(f"`run={run.folder}`: its backbone cannot be made again: {error}") from error
    require_same_body(run, detector.backbone)
    load_weights(detector, state, run)
    names = spec["names"]
    assert isinstance(names, list)
    return TrainedDetector(
        detector=detector.to(device).eval(),
        config=config,
        names=tuple(names),
        base_count=base_count,
        text=tables["text"],
        device=torch.device(device),
        ensemble=_load_ensemble(run, config.eval, device, weights) if config.eval.shows_teacher else None,
    )


@torch.no_grad()
def _load_ensemble(run: Run, settings: EvalConfig, device: str, weights: Path | None) -> TeacherEnsemble:
    teacher = run_teacher(run, device, adapted=True, weights=weights)
    background = run_manifest(run).products["proposals"].inputs["background"]
    assert background is None or isinstance(background, str | list)
    log.info(
        "teacher %s takes part in scores with weight %g for base and %g for novel classes: it is shown a crop of each "
        "detection whose weight is above 0",
        teacher.name,
        settings.teacher_weight_base,
        settings.teacher_weight_novel,
    )
    return TeacherEnsemble(
        encoder=CropEncoder(teacher, crop_settings(run)),
        background=None if background is None else teacher.encode_text(texts(background)).cpu(),
        weight_base=settings.teacher_weight_base,
        weight_novel=settings.teacher_weight_novel,
        device=torch.device(device),
    )


def load_weights(detector: Detector, state: Mapping[str, Tensor], run: Run) -> None:
    """Load the weights of a checkpoint of a run into a detector. RunError when another version wrote them."""
    try:
        detector.load_state_dict(state)
    except RuntimeError as error:
        reason = (str(error).splitlines()[1:] or [str(error)])[0].strip()
        raise RunError(
            f"`run={run.folder}`: was trained by another version of ezsd ({reason}); train it again in another `run` "
            "folder"
        ) from error


def run_teacher(run: Run, device: str, *, adapted: bool, weights: Path | None = None) -> Teacher:
    """Load the teacher of a run.

    Args:
        run: a run whose store records its teacher.
        device: where the teacher runs.
        adapted: True for the re-normalised teacher, False for the published one.
        weights: the file with its weights, if it has moved; None takes the place that the store's build recorded.

    Raises:
        TeacherError: it cannot be had, or is not the one that the store was made with.
    """
    recorded = run.environment["teacher"]
    if not isinstance(recorded, dict):
        raise TeacherError(f"`run={run.folder}`: its store did not say which teacher made it")
    teacher = recorded_teacher(
        TeacherConfig(**recorded),
        model_inputs(run_manifest(run)),
        where=f"`run={run.folder}`",
        weights=weights,
        device=device,
    )
    if adapted:
        adapt_back(run, teacher)
    return teacher


def adapt_back(run: Run, teacher: Teacher) -> None:
    """Load the run's re-normalised LayerNorms into a teacher."""
    table = run.spec["layer_norms"]
    assert isinstance(table, list)
    norms, where = run.embeddings().get("layer_norms"), f"`run={run.folder}`"
    if norms is None or norms.dtype != torch.float32:
        raise unlike_a_run(where, "holds no LayerNorms of float32")
    try:
        restore(teacher.layer_norms(), norms.numpy(), table)
    except (ValueError, RuntimeError) as error:
        # RuntimeError: fewer numbers than the table says.
        raise unlike_a_run(where, f"its LayerNorms do not fit its teacher: {error}") from error


def crop_settings(run: Run) -> Config:
    """Configuration of a run with the crop rule of its store, which runs of earlier versions do not record."""
    tables, made_with = to_tables(run.config), proposal_settings(run_manifest(run))
    rule = {key: made_with[key] for key in ("crop_ratio", "padding")}
    return from_tables(tables | {"proposals": tables["proposals"] | rule}, where="store")


def run_manifest(run: Run) -> Manifest:
    """Manifest of the store that a run was trained from."""
    store = run.spec["store"]
    manifest = store.get("manifest") if isinstance(store, dict) else None
    if not isinstance(manifest, dict):
        raise unlike_a_run(f"`run={run.folder}`", "run.json: store: expected a manifest")
    return Manifest.from_fields(manifest, str(run.folder))
