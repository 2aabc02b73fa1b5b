"""AP50 on a subset of the validation images during training; for monitoring only, it selects no checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch

from ezsd.errors import quantity
from ezsd.metrics import Evaluation, evaluate
from ezsd.pipeline.config.schema import Config
from ezsd.pipeline.data.annotation_cache import evaluation_annotations
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.data.requirements import require_evaluation
from ezsd.pipeline.errors import ConfigError
from ezsd.pipeline.files import read_object, write_text
from ezsd.pipeline.inference.evaluate import detect_split
from ezsd.pipeline.inference.evaluation_tables import percent
from ezsd.pipeline.inference.predictor import TrainedDetector
from ezsd.pipeline.runs.loggers import MetricsLog
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.training.trainer import Trainer

log = logging.getLogger("ezsd")
SLICE = "validation_slice.json"


@dataclass(frozen=True, slots=True)
class Validation:
    """Schedule and data of the validations during training."""

    run: Run
    trainer: Trainer
    dataset: Dataset
    config: Config
    images: int
    """Images of an epoch, on average."""

    @classmethod
    def of_run(cls, run: Run, trainer: Trainer, dataset: Dataset, config: Config, images: int) -> Validation:
        """Prepare the validation of a run whose dataset has passed `require_validation`."""
        made = cls(run, trainer, dataset, config, images)
        if config.train.validate_every and trainer.distributed.is_main:
            cut_slice(dataset.annotations("val"), run.folder / SLICE, config.train.validate_images)
        return made

    def due(self, step: int) -> bool:
        """Test whether a validation is due after a step."""
        every, per_step = self.config.train.validate_every * self.images, self.config.train.batch_size
        return bool(every) and step * per_step // every > (step - 1) * per_step // every

    def missing(self, step: int) -> bool:
        """Test whether the validation after a step, whose checkpoint exists, has not been made."""
        return step > 0 and self.due(step) and all(line["step"] != step for line in self.run.read_validation())

    def look(self, step: int, metrics: MetricsLog) -> None:
        """Evaluate, log and record the results."""
        found = self._evaluate()
        scores = {group: found[group]["AP50"] for group in ("base", "novel", "all")}
        metrics.write_validation({"step": step, **scores})
        shown = ", ".join(f"{group} {percent(score)}" for group, score in scores.items())
        log.info("step %d, AP50 on %s: %s", step, quantity(found["images"], "validation image"), shown)

    def _evaluate(self) -> Evaluation:
        detector, text = self.trainer.detector, self.run.embeddings()["text"]
        split, path = self.dataset.split, self.run.folder / SLICE
        trained = TrainedDetector(
            detector=detector,
            config=self.config,
            names=split.names,
            base_count=len(split.base),
            text=text,
            device=next(detector.parameters()).device,
        )
        own = None if self.trainer.average is None else {k: v.clone() for k, v in detector.state_dict().items()}
        if self.trainer.average is not None:
            detector.load_state_dict(self.trainer.average.state)
        detector.eval()
        try:
            annotations, images = evaluation_annotations(path, split), self.dataset.images("val")
            (found,) = detect_split(trained, annotations, images, [trained.search(text)], "validate", masks=False)
        finally:
            detector.train()
            if own is not None:
                detector.load_state_dict(own)
        return evaluate(path, found, split)


def require_validation(dataset: Dataset, config: Config) -> None:
    """Check the validation files before training, so that evaluation after the last step does not fail.

    A training that does not validate also runs without validation files.

    Raises:
        ConfigError: it validates, and the dataset has no validation part.
        ValueError: the validation files are not valid, see `require_evaluation`.
    """
    if config.train.validate_every and "val" not in dataset.parts:
        raise ConfigError(
            f"train.validate_every={config.train.validate_every}: dataset {dataset.name} has no validation part; take "
            "`train.validate_every=0`, or build a store of a dataset with one (`ezsd data split`)"
        )
    missing = dataset.missing("val")
    if missing and not config.train.validate_every:
        log.warning("%s: %s; `ezsd eval` will need it", dataset.root, "; ".join(missing))
        return
    require_evaluation(dataset, masks=config.model.masks)


def cut_slice(annotations: Path, out: Path, images: int) -> None:
    """Cut an annotation file, already read by `read_truth`, to `images` images spaced evenly by id."""
    document = read_object(annotations)
    ids = sorted(image["id"] for image in document["images"])
    kept = set(_spread(ids, images))
    document["images"] = [image for image in document["images"] if image["id"] in kept]
    document["annotations"] = [one for one in document["annotations"] if _belongs(one, kept)]
    write_text(out, json.dumps(document))


def _belongs(annotation: Mapping[str, object], images: Set[int]) -> bool:
    # Of annotations outside the split nothing but the class was checked.
    image = annotation.get("image_id")
    return isinstance(image, int) and image in images


def _spread(ids: Sequence[int], count: int) -> list[int]:
    count = min(count, len(ids))
    return [ids[int(place)] for place in torch.linspace(0, len(ids) - 1, count).round()]
