"""Export of a trained detector to a file that runs without ezsd: `ezsd export` and `ezsd.export`.

The vocabulary is an input of the graph. A file beside it holds the text embeddings of the run's names, or of others.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from ezsd.cache import write_atomic
from ezsd.choices import BACKBONES
from ezsd.data.dataset import PAD_MULTIPLE
from ezsd.detector.bodies import first_line
from ezsd.detector.exportable import ExportableDetector
from ezsd.pipeline.config.schema import at_test_time
from ezsd.pipeline.errors import ArgumentError, ConfigError, RunError
from ezsd.pipeline.extraction.provenance import model_inputs
from ezsd.pipeline.inference.detect import Model, checked_names, resolve_names
from ezsd.pipeline.inference.export_check import Agreement, Graph, OnnxGraph, TorchGraph, check_export
from ezsd.pipeline.inference.predictor import Search, TrainedDetector, run_manifest
from ezsd.pipeline.runs.card import weights_digest
from ezsd.pipeline.runs.run import Run

if TYPE_CHECKING:
    import onnx

Format = Literal["onnx", "torch"]
ENDINGS = {"onnx": ".onnx", "torch": ".pt2"}
"""Ending of each format's file."""
NEEDED = ("onnx", "onnxscript", "onnxruntime")
"""Packages that an export to ONNX needs."""
OPSET = 20
"""Version of ONNX's operators: RoiAlign has had half-pixel coordinates since 16."""
INPUTS = ("image", "text")
OUTPUTS = ("boxes", "scores", "classes", "images", "masks")
ABOUT = "ezsd.json"
"""Name of the metadata's file within a .pt2 file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """Files of an export, and how the detections of the exported graph agree with those of the run."""

    out: Path
    """The graph."""
    vocabulary: Path
    """Text embeddings for it: `names` (C,), `text` (C, D) float32, and `asked` (C,) bool, False for a name that only
    competes."""
    agreement: Agreement


def export(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: Format = "onnx",
    classes: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    weights: str | os.PathLike[str] | None = None,
) -> Exported:
    """Export the detector of a finished run with the vocabulary as an input, and check the file that is made.

    Args:
        run: a run folder that `ezsd train` made.
        out: file to write, which ends in .onnx or .pt2; the text embeddings come beside it as NAME.classes.npz.
        format: "onnx" for ONNX, "torch" for torch.export's ExportedProgram.
        classes: names to write text embeddings of; the run's other names go with them as competitors, as in detection.
            None writes those of the run's own names.
        overrides: settings as `section.key=value` used instead of the run's, as `ezsd.load` takes them.
        weights: the teacher's weights, if they have moved; read for names that the run does not know.

    Raises:
        ArgumentError: no run, a file that is there already, another ending, a package that is missing.
        RunError: training is not finished; the backbone cannot be exported; the exported graph detects otherwise.
        ConfigError: the teacher takes part in scores, or a region has several boxes.
    """
    place = Path(out)
    vocabulary = place.with_name(f"{place.stem}.classes.npz")
    require_place(place, format)
    require_packages(format)
    opened = Run.open(Path(run))
    # A graph has no backend: whatever trained the run, its weights are read here.
    overrides = ["train.backend=eager", *([overrides] if isinstance(overrides, str) else overrides)]
    config = at_test_time(opened.config, overrides)
    if config.model.box_class == "topk":
        raise ConfigError("several boxes of one region cannot be exported; give `model.box_class=foreground`")
    if config.eval.shows_teacher:
        raise ConfigError(
            "the teacher takes part in the scores of this run, which an exported graph cannot ask; give "
            "`eval.teacher_weight_base=0` and `eval.teacher_weight_novel=0`"
        )
    model = Model(opened, device="cpu", overrides=overrides, weights=None if weights is None else Path(weights))
    trained = model.trained
    names = resolve_names(opened, checked_names(classes))
    search = model.search(names)
    program = _traced(trained, opened)
    about = _metadata(opened, trained)
    try:
        made = (_onnx_file if format == "onnx" else _torch_file)(program, about)
        agreement = check_export(made.graph, trained)
    except RunError:
        raise
    except Exception as error:
        # Translation, protobuf's limit of 2 GB, and what a runtime refuses to load or run: errors of many kinds.
        raise _not_exported(error, trained, opened) from error
    # The graph comes last: who finds it finds the rest.
    write_atomic(vocabulary, _vocabulary_file(names, search, trained))
    try:
        write_atomic(place, made.data)
    except OSError:
        vocabulary.unlink(missing_ok=True)
        raise
    return Exported(out=place, vocabulary=vocabulary, agreement=agreement)


def require_place(out: Path, format: Format) -> None:
    """ArgumentError for an unknown format, and for a place that an export cannot be written to."""
    if format not in ENDINGS:
        raise ArgumentError(f"`format={format}`: expected one of {', '.join(ENDINGS)}")
    if out.suffix != ENDINGS[format]:
        raise ArgumentError(f"`out={out}`: expected a file that ends in {ENDINGS[format]} for `format={format}`")
    if not out.absolute().parent.is_dir():
        raise ArgumentError(f"`out={out}`: there is no folder {out.parent}; make it first")
    for file in (out, out.with_name(f"{out.stem}.classes.npz")):
        if file.exists() or file.is_symlink():
            raise ArgumentError(f"`out={out}`: {file} is there already; remove it or choose another name")


def require_packages(format: Format) -> None:
    """ArgumentError for a package that a format needs and that is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None] if format == "onnx" else []
    if missing:
        raise ArgumentError(f"`format=onnx`: needs {', '.join(missing)}; pip install 'ezsd[export]'")


@dataclass(frozen=True, slots=True)
class _Made:
    """Bytes of an exported file, and the graph that they hold, loaded from them."""

    data: bytes
    graph: Graph


def _traced(trained: TrainedDetector, run: Run) -> ExportedProgram:
    """The detector as a graph, with images, heights, widths and classes left open."""
    settings = trained.config.eval
    graph = ExportableDetector(
        trained.detector,
        pad_multiple=PAD_MULTIPLE,
        score_floor=settings.score_threshold,
        nms_iou=settings.nms_iou,
        keep=settings.max_detections,
        class_agnostic_nms=settings.class_agnostic_nms,
        objectness=settings.objectness,
        masks=trained.config.model.masks,
    ).eval()
    # Two of a kind, for torch.export takes one of them for a constant.
    example = torch.zeros(2, 3, 4 * PAD_MULTIPLE, 5 * PAD_MULTIPLE, dtype=torch.uint8), trained.text[:1].repeat(2, 1)
    least = least_side(trained)
    sides = {0: Dim("batch"), 2: Dim("height", min=least), 3: Dim("width", min=least)}
    shapes = {"image": sides, "text": {0: Dim("classes")}}
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(graph, example, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        # Bodies of others may do what no graph holds.
        if trained.config.model.backbone in BACKBONES:
            raise
        raise _not_exported(error, trained, run) from error
    _drop_least_counts(program)
    return program


def _not_exported(error: Exception, trained: TrainedDetector, run: Run) -> RunError:
    backbone = trained.config.model.backbone
    return RunError(f"`run={run.folder}`: its backbone {backbone} cannot be exported: {first_line(error)}")


def least_side(trained: TrainedDetector) -> int:
    """Least height and width of the images of a graph, pixels: the coarsest map has two cells along each side."""
    coarsest = max(trained.detector.backbone.strides)
    return 1 if coarsest < PAD_MULTIPLE else coarsest + 1


def _onnx_file(program: ExportedProgram, about: dict[str, str]) -> _Made:
    with _quiet():
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=OUTPUTS[: len(program.graph_signature.user_outputs)],
            verbose=False,
        )
    assert made is not None
    model: onnx.ModelProto = made.model_proto
    model.producer_name, model.producer_version = "ezsd", version("ezsd")
    for key, value in about.items():
        model.metadata_props.add(key=key, value=value)
    _name_sizes(model)
    for node in model.graph.node:
        # Lines of code with their places on this disk.
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    data = model.SerializeToString()
    return _Made(data, OnnxGraph(data))


def _name_sizes(model: onnx.ModelProto) -> None:
    """Give the open sizes of inputs and outputs names that say what they are, instead of the exporter's numbers."""
    named = {"image": {0: "batch", 2: "height", 3: "width"}, "text": {0: "classes"}}
    for value in (*model.graph.input, *model.graph.output):
        for place, name in named.get(value.name, {0: "detections"}).items():
            value.type.tensor_type.shape.dim[place].dim_param = name
    # Sizes between them are in terms of the numbers; a runtime infers them anew.
    model.graph.ClearField("value_info")


def _torch_file(program: ExportedProgram, about: dict[str, str]) -> _Made:
    for graph in _graphs(program):
        for node in graph.nodes:
            # Lines of code with their places on this disk.
            node.meta.pop("stack_trace", None)
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(program, buffer, extra_files={ABOUT: json.dumps(about, indent=1)})
    return _Made(buffer.getvalue(), TorchGraph(buffer.getvalue()))


def _graphs(program: ExportedProgram) -> Iterator[fx.Graph]:
    """The graph of a program and those within it."""
    return (one.graph for one in program.graph_module.modules() if isinstance(one, fx.GraphModule))


def _drop_least_counts(program: ExportedProgram) -> None:
    """Let an NMS keep fewer than two boxes.

    torchvision states its number of results to torch.export without a least one, which is then taken for 2, and the
    program would stop where an image has no detection or a single one.
    """
    for graph in _graphs(program):
        for node in list(graph.nodes):
            if node.target is torch.ops.aten._assert_scalar.default and _MORE_THAN_ONE.search(str(node.args[1])):
                graph.erase_node(node)


_MORE_THAN_ONE = re.compile(r"for expression u\d+ >= 2 on node")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' remarks on their own progress and future out of ours; their errors are raised."""
    exporters = logging.getLogger("onnx_ir"), logging.getLogger("onnxscript")
    levels = [one.level for one in exporters]
    for one in exporters:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for one, level in zip(exporters, levels, strict=True):
            one.setLevel(level)


def _vocabulary_file(names: Sequence[str], search: Search, trained: TrainedDetector) -> bytes:
    """Text embeddings of names and of those that compete with them, as `Exported.vocabulary` says."""
    competing = {row.numpy().tobytes() for row in search.competing}
    rivals = [n for n, row in zip(trained.names, trained.text, strict=True) if row.numpy().tobytes() in competing]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        names=np.array([*names, *rivals]),
        text=torch.cat([search.text, search.competing]).numpy(),
        asked=np.arange(len(names) + len(rivals)) < len(names),
    )
    return buffer.getvalue()


def _metadata(run: Run, trained: TrainedDetector) -> dict[str, str]:
    """Metadata of an exported file by name; values are texts or JSON."""
    settings, backbone = trained.config, trained.detector.backbone
    recorded = run.environment["teacher"]
    # No weights: they may be a place on the disk of whoever built the store.
    teacher = {key: recorded.get(key) for key in ("name", "template", "names")} if isinstance(recorded, dict) else None
    resize = {"min_size": settings.train.min_size, "max_size": settings.train.max_size}
    outputs = {
        "boxes": "(N, 4) float32, x1 y1 x2 y2 in pixels of the images given",
        "scores": "(N,) float32 in [0, 1]",
        "classes": "(N,) int64, rows of text",
        "images": "(N,) int64, images of the batch",
        "masks": "(N, M, M) float32, probability that a cell of the box is the object",
    }
    if not settings.model.masks:
        del outputs["masks"]
    values: dict[str, object] = {
        "ezsd_version": version("ezsd"),
        "run_digest": f"sha256 {weights_digest(run.finished())}",
        "class_names": list(trained.names),
        "base_classes": trained.base_count,
        "image": "uint8 RGB, 0 to 255, (batch, 3, height, width), all images of a batch in one size",
        "least_side": least_side(trained),
        "resize": resize if settings.train.min_size else None,
        "normalisation": {
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "pixels": "[0, 1]",
            "by": "the graph",
        },
        "text": f"float32, unit rows (classes, {trained.text.shape[1]})",
        "text_embeddings": {
            "teacher": teacher,
            "weights_sha256": model_inputs(run_manifest(run)).get("weights_sha256"),
            "rows": "mean of the unit embeddings of a name's prompts, normalised; by the re-normalised teacher",
            "made_by": "`ezsd export RUN --out NAME.onnx --classes NAMES`, as NAME.classes.npz",
        },
        "outputs": outputs,
        "score_threshold": settings.eval.score_threshold,
        "nms_iou": settings.eval.nms_iou,
        "class_agnostic_nms": settings.eval.class_agnostic_nms,
        "max_detections": settings.eval.max_detections,
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
