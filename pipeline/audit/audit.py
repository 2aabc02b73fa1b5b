"""Audit of a run or a store; `ezsd audit`.

It is an evaluation: it reads novel boxes of the training images, to compare and to count, and writes down no more than
its verdict and the boxes that are wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ezsd.cache import Store, StoreMismatch
from ezsd.errors import AnnotationError, inflected, quantity
from ezsd.pipeline.audit.annotation_file import AnnotationFile, read_annotation_file
from ezsd.pipeline.audit.findings import Finding, Setting, Verdict, as_table, summary, verdict
from ezsd.pipeline.audit.run_stages import RunStages
from ezsd.pipeline.audit.store_stages import StoreStages
from ezsd.pipeline.data.datasets import Dataset, recorded_dataset
from ezsd.pipeline.errors import ArgumentError, DatasetError
from ezsd.pipeline.extraction.provenance import dataset_inputs
from ezsd.pipeline.files import reading, write_json
from ezsd.pipeline.progress import now
from ezsd.pipeline.runs.card import write_card
from ezsd.pipeline.runs.run import Run
from ezsd.vocabulary import Split, first_few

_FILES: dict[Setting, str] = {"zad": "audit.json", "ovd-strict": "audit-ovd-strict.json"}
_FEW = 10
"""Most class names in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRequest:
    """Request for an audit, as the command line makes it."""

    target: str
    """Folder of a run or a store, or a store's URL."""
    setting: Setting = "zad"
    """"zad": names of novel classes may be known in training. "ovd-strict": not before evaluation."""
    cache: Path | str | None = None
    """Folder or URL of a run's store, if it has moved."""
    data_root: Path | None = None
    """Folder of the images and annotations, if it has moved."""
    annotations: Path | None = None
    """Annotations of the training images to compare with; None takes the dataset's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """Findings of an audit, and what they are of."""

    setting: Setting
    name: str
    """Name of the folder of the run or the store."""
    date: str
    """Time of the audit, UTC."""
    findings: tuple[Finding, ...]
    unlabelled: dict[str, Any]
    """Objects without a label in the training images: `novel` and `other` by class, `images` that have any."""
    facts: dict[str, Any]
    """Digests of store and annotations, and a run's `step`."""

    @property
    def verdict(self) -> Verdict:
        """Verdict of all findings."""
        return verdict(self.findings)

    @property
    def summary(self) -> str:
        """The verdict, with the numbers of findings that are not ok."""
        return summary(self.findings)

    def document(self) -> dict[str, Any]:
        """The result as JSON has it."""
        return {
            "name": self.name,
            "setting": self.setting,
            "verdict": self.verdict,
            "summary": self.summary,
            "date": self.date,
            **self.facts,
            "unlabelled": self.unlabelled,
            "findings": [as_table(finding) for finding in self.findings],
        }


def audit(request: AuditRequest) -> AuditResult:
    """Trace what entered each stage; of a run, write the result into its folder and its card.

    Raises:
        ArgumentError: the target is neither a run nor a store.
        DatasetError: the annotations are not there.
        AnnotationError: they are not in order, or of other images.
        StoreError: the store is gone, unfinished, damaged or of another schema; StoreMismatch if it is not the run's.
        RunError: another version made the run.
        DamagedFile: a record of the run or the store holds something else.
        OSError: a run's folder cannot be written to.
    """
    target = Path(request.target)
    run = Run.open(target) if (target / "run.json").is_file() else None
    if run is None and request.cache is not None:
        raise ArgumentError(f"`cache={request.cache}`: goes with a run, and {target} holds none")
    store = _store(request, run)
    dataset = None if request.annotations is not None and run is None else _dataset(request, run, store)
    file = _annotations(request, store, dataset)
    stages = StoreStages(store, file)
    of_run = None
    if run is not None:
        assert dataset is not None
        of_run = RunStages(run, stages, dataset)
    novel, other, images = stages.unlabelled()
    findings = [
        *stages.findings(),
        *([] if of_run is None else of_run.findings()),
        stages.teacher(),
        *_names(request.setting, stages, of_run),
        _unlabelled(request.setting, novel, other, images, len(stages.trained_images)),
    ]
    facts: dict[str, Any] = {
        "store": {"manifest": store.manifest.digest, "sha256": store.digest},
        "annotations": {"file": file.path.name, "sha256": file.sha256},
    }
    if run is not None:
        checkpoint = run.latest()
        facts["step"] = 0 if checkpoint is None else checkpoint.step
    result = AuditResult(
        setting=request.setting,
        name=target.absolute().name,
        date=now(),
        findings=tuple(findings),
        unlabelled={"novel": novel, "other": other, "images": images},
        facts=facts,
    )
    if run is not None:
        write_json(run.folder / _FILES[request.setting], result.document())
        write_card(run)
    return result


def _store(request: AuditRequest, run: Run | None) -> Store:
    """The store to look at. StoreMismatch when it is not the one that the run was trained from."""
    if run is None:
        if "://" not in request.target and not Path(request.target).is_dir():
            raise ArgumentError(f"{request.target}: no such folder; give that of a run or a store")
        store = Store(request.target)
        store.require_regions()
        return store
    place = str(run.environment["cache"]) if request.cache is None else str(request.cache)
    if request.cache is None and "://" in place:
        # No file makes ezsd ask an address.
        raise ArgumentError(
            f"`run={run.folder}`: its record says that its store is at {place}, and addresses are asked only where you "
            "give them; give `cache=URL`, or a folder"
        )
    if "://" not in place and not Path(place).is_dir():
        raise ArgumentError(f"`run={run.folder}`: its store is not in {place}; give `cache=STORE`")
    store = Store(place)
    store.require_regions()
    recorded = run.spec["store"]
    assert isinstance(recorded, dict)
    if store.manifest.digest != recorded["digest"]:
        raise StoreMismatch(
            f"{store}: another store than the run {run.folder} was trained from; give `cache=STORE` of that one"
        )
    return store


def _dataset(request: AuditRequest, run: Run | None, store: Store) -> Dataset:
    """The dataset of a run or a store, wherever it lies now; its files need not be there."""
    environment = store.environment if run is None else run.environment
    root = request.data_root
    if root is None:
        if "data_root" not in environment:
            raise DatasetError(f"{store}: does not say where its annotations lie; give `data_root=DIR`")
        root = Path(str(environment["data_root"]))
    where = f"{store if run is None else run.folder}/environment.json"
    with reading(Path(where), "give `annotations=FILE`" if run is None else "run the same `ezsd train` again"):
        found = recorded_dataset(environment.get("dataset"), str(dataset_inputs(store.manifest)["name"]), root)
        # Another type shows here first.
        for part in found.parts:
            found.annotations(part)
        return found


def _annotations(request: AuditRequest, store: Store, dataset: Dataset | None) -> AnnotationFile:
    """The annotations to compare with, by the split of the store."""
    path = request.annotations
    if path is None:
        assert dataset is not None
        path = dataset.annotations("train")
    if not path.is_file():
        raise DatasetError(
            f"{path}: the annotations of the training images are not there; give `data_root=DIR` or `annotations=FILE`"
        )
    words = store.manifest.products["text"].inputs
    base, novel = (words[key] for key in ("base_names", "novel_names"))
    assert isinstance(base, list)
    assert isinstance(novel, list)
    split = Split(base=tuple(map(str, base)), novel=tuple(map(str, novel)))
    file = read_annotation_file(path, split)
    if not set(store.image_ids.tolist()) & set(file.images.id.tolist()):
        raise AnnotationError(f"{path}: has none of the images of {store}; give the annotations of its training images")
    return file


def _names(setting: Setting, store: StoreStages, run: RunStages | None) -> Iterator[Finding]:
    """Uses of novel names, by stage."""
    told = store.names_of_run()
    if told and setting == "ovd-strict":
        text = f"the run whose network proposes was told {quantity(len(told), 'novel name')} ({first_few(told, _FEW)})"
        yield Finding(level="violation", subject="names in proposer", text=text)
    novel = store.file.split.novel
    if not novel:
        yield Finding(level="ok", subject="names", text="no novel name is known to the store")
        return
    few = first_few(list(novel), _FEW)
    listed = f"{quantity(len(novel), 'novel name')} ({few}) {inflected(len(novel), 'takes', 'take')} part"
    stages = {"names in filters": store.uses_of_names()}
    if run is not None:
        stages["names in training"] = run.uses_of_names()
    for subject, uses in stages.items():
        if not uses:
            yield Finding(level="ok", subject=subject, text="no novel name takes part")
        elif setting == "zad":
            yield Finding(level="ok", subject=subject, text=f"{listed}, by {', '.join(uses)}")
        else:
            text = f"{listed} before evaluation, by {', '.join(uses)}"
            yield Finding(level="violation", subject=subject, text=text)
    files = [] if run is None else run.evaluation_files()
    if files:
        text = f"novel names may be asked for here: {', '.join(file.name for file in files)}"
        yield Finding(level="ok", subject="names in evaluation", text=text)


def _unlabelled(setting: Setting, novel: dict[str, int], other: dict[str, int], images: int, of: int) -> Finding:
    """Objects that training images show without a label."""
    if not novel and not other:
        text = f"none in the {quantity(of, 'training image')}, as far as the annotation file knows"
        return Finding(level="ok", subject="unlabelled", text=text)
    parts = [
        f"{quantity(sum(counts.values()), *kind)} ({first_few([f'{name} {n:,}' for name, n in counts.items()], 5)})"
        for kind, counts in (
            (("novel object", "novel objects"), novel),
            (("object of another class", "objects of other classes"), other),
        )
        if counts
    ]
    shown = inflected(sum(novel.values()) + sum(other.values()), "is", "are")
    text = f"{' and '.join(parts)} {shown} shown without a label in {images:,} of {of:,} training images"
    return Finding(level="ok" if setting == "zad" else "note", subject="unlabelled", text=text)
