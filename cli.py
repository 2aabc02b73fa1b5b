"""The `ezsd` command: parse, call, print."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core

from ezsd.choices import Benchmark
from ezsd.errors import EzsdError, quantity
from ezsd.pipeline.console.options import OptionFormatter, as_options
from ezsd.pipeline.errors import is_of_a_place, with_cure
from ezsd.pipeline.interrupts import Stopped, end_listening, keeping, listen
from ezsd.pipeline.process_environment import (
    drop_output,
    keep_freed_memory,
    nobody_reads,
    prepare_streams,
    require_launcher,
)


class _Commands(typer.core.TyperGroup):
    """Group of all commands that tells broken pipes apart: typer would end in silence, whichever it was."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - the type of contexts is private in typer
        """Run a command; the reader of its output may leave early."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            if nobody_reads():
                drop_output()
                raise SystemExit(128 + signal.SIGPIPE) from None
            raise ConnectionError(f"a connection has ended: {error}") from error


app = typer.Typer(
    name="ezsd",
    cls=_Commands,
    help="Train an object detector that also finds classes without boxes, by distilling CLIP.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Create and check datasets.", no_args_is_help=True)
cache_app = typer.Typer(help="Build and inspect stores of regions and embeddings.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(cache_app, name="cache")

Set = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DataRoot = Annotated[Path | None, typer.Option(help="Image folder, if it has moved.")]
MovedWeights = Annotated[Path | None, typer.Option("--weights", help="The teacher's weights, if they have moved.")]
RunFolder = Annotated[Path, typer.Option("--run", help="A run folder made by `ezsd train`.")]
DatasetName = Annotated[
    str,
    typer.Option(
        help="shapes, clutter, coco, lvis, lvis-frequent, voc-16-4, voc-15-5, your own FILE.toml, or a COCO FILE.json."
    ),
]
DatasetRoot = Annotated[
    Path | None,
    typer.Option(help="Folder of images and annotations; data/NAME or the file's folder by default."),
]
NovelOfJson = Annotated[
    list[str] | None,
    typer.Option("--novel", help="With FILE.json: novel classes, as CSV; all others are base."),
]
NovelFileOfJson = Annotated[
    list[Path] | None,
    typer.Option("--novel-file", help="With FILE.json: file of novel classes, one name per line."),
]
Verify = Annotated[
    Literal["full", "quick"],
    typer.Option(help="full: check the checksums of all data read; quick: of all but the rows."),
]
TestTimeSet = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Change one setting of inference, such as eval.class_agnostic_nms=true or eval.teacher_weight_novel=0.3.",
    ),
]
Preset = Annotated[
    str | None, typer.Option(help="Settings to start from: shapes, coco (or fast), lvis, paper or photos.")
]


def _say_version(asked: bool) -> None:
    if asked:
        python = ".".join(map(str, sys.version_info[:3]))
        torch = importlib.metadata.version("torch")
        typer.echo(f"ezsd {importlib.metadata.version('ezsd')} (torch {torch}, Python {python})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


DrawnFolder = Annotated[Path, typer.Option(help="Output folder.")]
TrainImages = Annotated[int, typer.Option(min=1, help="Number of training images.")]
ValImages = Annotated[int, typer.Option(min=1, help="Number of validation images.")]
DrawnSeed = Annotated[int, typer.Option(min=0, help="Use 0 to choose settings, 4 to 8 to report results.")]


@data_app.command("shapes", epilog="Example:  ezsd data shapes --out data/shapes")
@keeping("the folder appears when it is whole; run the same command again")
def data_shapes(out: DrawnFolder, train: TrainImages = 500, val: ValImages = 250, seed: DrawnSeed = 0) -> None:
    """Draw the embedded benchmark as a COCO-format folder."""
    _draw("shapes", out, train, val, seed)


@data_app.command("clutter", epilog="Example:  ezsd data clutter --out data/clutter")
@keeping("the folder appears when it is whole; run the same command again")
def data_clutter(out: DrawnFolder, train: TrainImages = 500, val: ValImages = 250, seed: DrawnSeed = 0) -> None:
    """Draw the embedded benchmark with 3 to 6 nameless shapes in each scene, as a COCO-format folder."""
    _draw("clutter", out, train, val, seed)


def _draw(benchmark: Benchmark, out: Path, train: int, val: int, seed: int) -> None:
    from ezsd.pipeline.data.shapes import write_shapes

    write_shapes(out, train=train, val=val, seed=seed, benchmark=benchmark)
    typer.echo(f"{out}: {train} training and {quantity(val, 'validation image')}, seed {seed}")


ConvertedFolder = Annotated[Path, typer.Option(help="Output folder.")]
BaseNames = Annotated[list[str] | None, typer.Option("--base", help="Base classes, as CSV; all others are novel.")]
BaseFiles = Annotated[list[Path] | None, typer.Option(help="File of base classes, one name per line.")]
NovelNames = Annotated[list[str] | None, typer.Option("--novel", help="Novel classes, as CSV; all others are base.")]
NovelFiles = Annotated[list[Path] | None, typer.Option(help="File of novel classes, one name per line.")]
CopyImages = Annotated[bool, typer.Option("--copy", help="Copy the images instead of linking to their folder.")]


@data_app.command("voc", epilog="Example:  ezsd data voc --root VOCdevkit --out data/voc")
@keeping("the folder appears when it is whole; run the same command again")
def data_voc(
    root: Annotated[Path, typer.Option(help="VOCdevkit, or its folder VOC2007 or VOC2012.")],
    out: ConvertedFolder,
    year: Annotated[Literal["2007", "2012"], typer.Option(help="Edition.")] = "2007",
    copy: CopyImages = False,
) -> None:
    """Convert Pascal VOC to a COCO-format folder, for --dataset voc-16-4 and voc-15-5."""
    from ezsd.pipeline.console.data_messages import conversion_lines
    from ezsd.pipeline.data.voc import convert_voc

    typer.echo("\n".join(conversion_lines(convert_voc(root, year, out, copy=copy), copied=copy)))


@data_app.command("convert", epilog="Example:  ezsd data convert farm --out data/farm --novel 'goat,sheep'")
@keeping("the folder appears when it is whole; run the same command again")
def data_convert(
    folder: Annotated[Path, typer.Argument(help="Folder of images with Pascal-VOC XML or YOLO text files.")],
    out: ConvertedFolder,
    format_: Annotated[
        Literal["voc", "yolo"] | None, typer.Option("--format", help="Format of the labels; found by default.")
    ] = None,
    corners: Annotated[
        Literal["inclusive", "edges"],
        typer.Option(help="XML: corners are pixels counted from 1, as in VOC, or distances from the image's edges."),
    ] = "inclusive",
    names: Annotated[
        Path | None, typer.Option(help="YOLO: data.yaml or classes.txt with the class names; looked for by default.")
    ] = None,
    base: BaseNames = None,
    base_file: BaseFiles = None,
    novel: NovelNames = None,
    novel_file: NovelFiles = None,
    copy: CopyImages = False,
) -> None:
    """Convert images with Pascal-VOC or YOLO labels to a COCO-format folder with its FILE.toml."""
    from ezsd.pipeline.console.arguments import class_names
    from ezsd.pipeline.console.data_messages import conversion_lines
    from ezsd.pipeline.data.convert import convert_folder

    made = convert_folder(
        folder,
        out,
        format=format_,
        corners=corners,
        names=names,
        base=class_names("--base", lists=base or (), files=base_file or ()),
        novel=class_names("--novel", lists=novel or (), files=novel_file or ()),
        copy=copy,
    )
    typer.echo("\n".join(conversion_lines(made, copied=copy)))


@data_app.command("split", epilog="Example:  ezsd data split all.json --out data/farm --val 0.2 --novel goat")
@keeping("the folder appears when it is whole; run the same command again")
def data_split(
    annotations: Annotated[Path, typer.Argument(help="A COCO-format JSON file.")],
    out: ConvertedFolder,
    data_root: Annotated[
        Path | None,
        typer.Option(help="Folder of the images; looked for around the JSON file by default."),
    ] = None,
    val: Annotated[
        str | None, typer.Option(metavar="N|FRACTION", help="Validation images: 500, 0.2 or 20%; none by default.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of validation images.")] = 0,
    base: BaseNames = None,
    base_file: BaseFiles = None,
    novel: NovelNames = None,
    novel_file: NovelFiles = None,
) -> None:
    """Split one COCO JSON into training and validation images, base and novel classes; write FILE.toml."""
    from ezsd.pipeline.console.arguments import class_names
    from ezsd.pipeline.console.data_messages import conversion_lines, parse_val
    from ezsd.pipeline.data.split_images import split_images

    made = split_images(
        annotations,
        out,
        data_root=data_root,
        val=None if val is None else parse_val(val),
        seed=seed,
        base=class_names("--base", lists=base or (), files=base_file or ()),
        novel=class_names("--novel", lists=novel or (), files=novel_file or ()),
    )
    typer.echo("\n".join(conversion_lines(made)))


@data_app.command("check", epilog="Example:  ezsd data check --dataset coco --data-root DIR")
@keeping("a check leaves nothing behind; run the same command again")
def data_check(
    dataset: DatasetName,
    data_root: DatasetRoot = None,
    novel: NovelOfJson = None,
    novel_file: NovelFileOfJson = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode whole images, not only their headers.")] = False,
    masks: Annotated[
        bool, typer.Option("--masks", help="Check segmentations too; model.masks=true needs them.")
    ] = False,
) -> None:
    """List all problems of a dataset with their places; exit code 2 if there are any."""
    from ezsd.pipeline.console.arguments import class_names

    names = class_names("--novel", lists=novel or (), files=novel_file or ())
    from ezsd.pipeline.data.check import check_dataset, check_table
    from ezsd.pipeline.data.datasets import find_dataset

    named = find_dataset(dataset, data_root, strict=False, novel=names)
    found = check_dataset(named, decode=decode, masks=masks)
    for warning in found.warnings:
        typer.echo(f"warning: {as_options(warning)}")
    for line in (*found.problems, *found.notes):
        typer.echo(as_options(line))
    if found.problems:
        count = quantity(len(found.problems), "problem")
        typer.echo(f"ezsd: {count} in dataset {found.dataset.name}", err=True)
        raise SystemExit(2)
    typer.echo(check_table(found))


Scheduler = Annotated[
    str,
    typer.Option(
        metavar="local|sync|tcp://HOST:PORT", help="Local worker processes, this process only, or a Dask cluster."
    ),
]
Workers = Annotated[int, typer.Option(min=0, help="Number of local processes; 0 means one per GPU or core.")]
Dashboard = Annotated[bool, typer.Option("--dashboard", help="Serve the Dask dashboard.")]
WaitForWorkers = Annotated[
    float | None,
    typer.Option(min=0, metavar="SECONDS", help="How long to wait for a Dask cluster's first worker; 10 s by default."),
]


@cache_app.command("build", epilog="Example:  ezsd cache build --dataset shapes")
@keeping("run the same command to go on")
def cache_build(
    dataset: DatasetName,
    data_root: DatasetRoot = None,
    novel: NovelOfJson = None,
    novel_file: NovelFileOfJson = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the store; cache/NAME by default.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="An open_clip model, tiny-shapes, or plugin:package.module:factory.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="An open_clip tag or a local file.")] = None,
    activation: Annotated[
        str | None,
        typer.Option(help="gelu or quickgelu: activation of the weights in a local file, if ezsd cannot tell."),
    ] = None,
    backbone_weights: Annotated[
        Path | None, typer.Option(help="Pretrained weights of the learned proposer's backbone, .safetensors or .pth.")
    ] = None,
    preset: Preset = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first images.")] = None,
    device: Device = "auto",
    scheduler: Scheduler = "local",
    workers: Workers = 0,
    dashboard: Dashboard = False,
    wait_for_workers: WaitForWorkers = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Build only part I of N of the blocks (I from 1 to N); then: ezsd cache commit."
        ),
    ] = None,
    reuse: Annotated[Path | None, typer.Option(help="Another store, to copy products that would be the same.")] = None,
    proposals_from: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN|FILE",
            help="A finished run, whose proposal network proposes, or a file of boxes in COCO's results format.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate the size of the store and the time to build it, and stop.")
    ] = False,
    set_: Set = None,
) -> None:
    """Re-normalise the teacher, find CLIP proposals and embed them; once per dataset and teacher."""
    from ezsd.pipeline.console.arguments import class_names, parse_share, require_novel, require_scheduler

    names = class_names("--novel", lists=novel or (), files=novel_file or ())
    require_novel(dataset, names)
    share = None if blocks is None else parse_share(blocks)
    require_scheduler(scheduler, workers=workers, dashboard=dashboard, wait=wait_for_workers, share=share)
    from ezsd.pipeline.console.defaults import build_config, drawn, require_known_proposer, require_known_teacher
    from ezsd.pipeline.data.datasets import find_dataset
    from ezsd.pipeline.devices import require_device_name, resolve_device

    # What can be refused is, before anything heavy is loaded and before the benchmark is drawn.
    require_device_name(device)
    named = find_dataset(dataset, data_root, novel=names)
    start = preset or named.preset
    config = build_config(
        start,
        set_ or [],
        teacher=teacher,
        weights=weights,
        activation=activation,
        backbone_weights=backbone_weights,
        prompts=named.prompts,
        proposals_from=proposals_from,
    )
    if data_root is not None or named.root.exists():
        named.require()
    require_known_teacher(config)
    require_known_proposer(config)
    where = resolve_device(device)
    from ezsd.pipeline.console.store_messages import build_lines, forecast_lines, share_lines
    from ezsd.pipeline.extraction.build import build_cache, build_share
    from ezsd.pipeline.extraction.forecast import forecast_build
    from ezsd.pipeline.extraction.request import BuildRequest
    from ezsd.pipeline.scheduling.job_array import Share

    found = drawn(named, data_root)
    store = out or Path("cache") / found.name
    request = BuildRequest(
        dataset=found,
        config=config,
        out=store,
        preset=start,
        limit=limit,
        device=where,
        scheduler=scheduler,
        workers=workers,
        dashboard=dashboard,
        wait_for_workers=wait_for_workers,
        reuse=reuse,
    )
    if dry_run:
        lines = forecast_lines(store, forecast_build(request))
    elif share is not None:
        lines = share_lines(store, build_share(request, Share(*share)))
    else:
        lines = build_lines(store, build_cache(request))
    typer.echo("\n".join(lines))


@cache_app.command("commit", epilog="Example:  ezsd cache commit cache/coco")
@keeping("the shards that are written stay; run the same command to go on")
def cache_commit(
    store: Annotated[Path, typer.Argument(help="A store with all blocks built.")],
    scheduler: Scheduler = "local",
    workers: Workers = 0,
    dashboard: Dashboard = False,
    wait_for_workers: WaitForWorkers = None,
) -> None:
    """Finish a store that was built in parts (`ezsd cache build --blocks I/N`)."""
    from ezsd.pipeline.console.arguments import require_scheduler

    require_scheduler(scheduler, workers=workers, dashboard=dashboard, wait=wait_for_workers)
    from ezsd.pipeline.console.store_messages import commit_lines
    from ezsd.pipeline.extraction.commit import commit_cache
    from ezsd.pipeline.scheduling.pool import Schedule

    schedule = Schedule(scheduler=scheduler, workers=workers, dashboard=dashboard, wait_for_workers=wait_for_workers)
    typer.echo("\n".join(commit_lines(store, commit_cache(store, schedule))))


@cache_app.command("ls", epilog="Example:  ezsd cache ls cache")
def cache_ls(folder: Annotated[str, typer.Argument(help="A folder that contains stores, or its URL.")]) -> None:
    """List the stores in a folder."""
    from ezsd.pipeline.console.store_messages import list_lines

    typer.echo("\n".join(list_lines(folder)))


@cache_app.command("info", epilog="Example:  ezsd cache info cache/shapes")
def cache_info(
    store: Annotated[str, typer.Argument(help="A store, or its URL.")],
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON document, with all settings and versions.")
    ] = False,
) -> None:
    """Show a store's contents, provenance and completeness."""
    from ezsd.pipeline.console.store_messages import info_json, info_lines

    typer.echo(info_json(store) if json_ else "\n".join(info_lines(store)))


@cache_app.command("verify", epilog="Example:  ezsd cache verify cache/shapes --deep")
@keeping("a check leaves nothing behind; run the same command again")
def cache_verify(
    store: Annotated[str, typer.Argument(help="A store, or its URL.")],
    deep: Annotated[bool, typer.Option("--deep", help="Check every byte, not only sizes and metadata.")] = False,
) -> None:
    """Check a store and list damaged files, rows and images; exit code 1 if there are any."""
    from ezsd.pipeline.console.store_messages import verify_lines

    lines = verify_lines(store, deep=deep)
    typer.echo("\n".join(lines or [f"{store}: nothing is wrong"]))
    if lines:
        raise typer.Exit(1)


@cache_app.command("repair", epilog="Example:  ezsd cache repair cache/shapes --data-root data/shapes")
@keeping("what is repaired stays; run the same command to go on")
def cache_repair(
    store: Annotated[Path, typer.Argument(help="A store.")],
    data_root: Annotated[Path | None, typer.Option(help="Image folder, to compute lost rows again.")] = None,
    weights: Annotated[str | None, typer.Option(help="The teacher's weights, if they have moved.")] = None,
    device: Device = "auto",
) -> None:
    """Rebuild damaged parts of a store; if that fails, mark it incomplete, with exit code 1."""
    from ezsd.cache import repair
    from ezsd.pipeline.console.store_messages import repair_lines
    from ezsd.pipeline.devices import require_device_name, resolve_device

    require_device_name(device)
    if data_root is None:
        report = repair(store, None)
    else:
        from ezsd.pipeline.extraction.repair import repair_store

        report = repair_store(store, data_root, weights=weights, device=resolve_device(device))
    typer.echo("\n".join(repair_lines(store, report)))
    if report.left:
        raise typer.Exit(1)


@cache_app.command("look", epilog="Example:  ezsd cache look cache/shapes")
@keeping("no page is written; run the same command again")
def cache_look(
    store: Annotated[Path, typer.Argument(help="A complete store.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the page; look/STORE by default.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Number of images to measure on; up to 40 are drawn.")] = 40,
    top: Annotated[int, typer.Option(min=1, help="Best regions drawn per image.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of images and held-out names.")] = 0,
    no_teacher: Annotated[
        bool, typer.Option("--no-teacher", help="Do not load the teacher: measure proposals before the filters only.")
    ] = False,
    evaluate: Annotated[
        bool,
        typer.Option("--evaluate", help="Read novel boxes too: draw and measure them, to report, not to choose by."),
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
    weights: MovedWeights = None,
    data_root: DataRoot = None,
    device: Device = "auto",
) -> None:
    """Draw a store's regions over its images, and measure what they find of base objects held out of the filters."""
    from ezsd.pipeline.devices import require_device_name, resolve_device

    require_device_name(device)
    from ezsd.pipeline.look import LookRequest, look_at_store
    from ezsd.pipeline.look.verdict import as_json, summary

    request = LookRequest(
        store=store,
        out=out or Path("look") / store.absolute().name,
        images=images,
        top=top,
        seed=seed,
        teacher=not no_teacher,
        evaluate=evaluate,
        weights=weights,
        data_root=data_root,
        device=resolve_device(device),
    )
    document, page = look_at_store(request)
    typer.echo(as_json(document) if json_ else summary(document, page))


@cache_app.command("gc", epilog="Example:  ezsd cache gc cache/shapes")
def cache_gc(
    store: Annotated[Path, typer.Argument(help="A store.")],
    strays: Annotated[
        bool, typer.Option("--strays", help="Also remove files, links and empty folders that ezsd did not make.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files that would be removed, and stop.")] = False,
) -> None:
    """Remove leftovers of killed builds and copies; list and keep other files that do not belong to the store."""
    from ezsd.pipeline.console.store_messages import collect_lines

    typer.echo("\n".join(collect_lines(store, strays=strays, dry_run=dry_run)))


@cache_app.command("diff", epilog="Example:  ezsd cache diff cache/a cache/b")
def cache_diff(
    first: Annotated[str, typer.Argument(help="A complete store, or its URL.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
) -> None:
    """List the settings, products and files that differ between two stores."""
    from ezsd.pipeline.console.store_messages import compare_lines

    typer.echo("\n".join(compare_lines(first, second)))


@cache_app.command("push", epilog="Example:  ezsd cache push cache/shapes s3://bucket/shapes")
@keeping("the files that are sent stay; run the same command to go on")
def cache_push(
    store: Annotated[Path, typer.Argument(help="A complete store.")],
    url: Annotated[str, typer.Argument(help="Destination: s3://, gs://, file:// or another fsspec URL.")],
) -> None:
    """Copy a store to a URL, or resume a copy; files already there with the right bytes are not sent again."""
    from ezsd.pipeline.console.store_messages import transfer_line

    typer.echo(transfer_line("push", str(store), url))


@cache_app.command("pull", epilog="Example:  ezsd cache pull s3://bucket/shapes cache/shapes")
@keeping("the files that have come stay; run the same command to go on")
def cache_pull(
    url: Annotated[str, typer.Argument(help="A complete store: s3://, gs://, https:// or another fsspec URL.")],
    folder: Annotated[Path, typer.Argument(help="Destination.")],
) -> None:
    """Copy a store from a URL, or resume a copy; every file is compared with its digest."""
    from ezsd.pipeline.console.store_messages import transfer_line

    typer.echo(transfer_line("pull", url, str(folder)))


@cache_app.command("export", epilog="Example:  ezsd cache export cache/shapes --format npz --out out")
@keeping("the folder appears when it is whole; run the same command again")
def cache_export(
    store: Annotated[str, typer.Argument(help="A complete store, or its URL.")],
    out: Annotated[Path, typer.Option(help="Output folder.")],
    format_: Annotated[Literal["npz", "parquet", "webdataset"], typer.Option("--format", help="File format.")],
    verify: Verify = "full",
) -> None:
    """Export a store to npz, Parquet or WebDataset."""
    from ezsd.pipeline.console.store_messages import export_line

    typer.echo(export_line(store, out, format_, verify=verify))


@app.command(epilog="Example:  ezsd train --cache cache/shapes --run runs/a")
@keeping("no step of this start is done; run the same command again")
def train(
    cache: Annotated[Path, typer.Option(help="A complete store.")],
    run: Annotated[Path | None, typer.Option(help="Run folder, resumed if it exists; runs/STORE by default.")] = None,
    preset: Preset = None,
    data_root: DataRoot = None,
    backbone_weights: Annotated[
        Path | None, typer.Option(help="Pretrained weights of the backbone, .safetensors or .pth.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of weights, sampling and augmentation; the preset's by default.")
    ] = None,
    verify: Verify = "full",
    accept_store: Annotated[
        bool,
        typer.Option(
            "--accept-store", help="Resume with a store whose bytes differ from the run's; both are recorded."
        ),
    ] = False,
    device: Device = "auto",
    log: Annotated[
        str | None,
        typer.Option(
            metavar="csv,tensorboard,wandb,mlflow",
            help="Loggers of metrics beside metrics.jsonl, as CSV; the same as train.loggers.",
        ),
    ] = None,
    set_: Set = None,
) -> None:
    """Train the detector from base boxes and cached regions; on several GPUs with `torchrun`."""
    require_launcher(os.environ)
    from ezsd.pipeline.console.arguments import loggers_override
    from ezsd.pipeline.console.defaults import train_config
    from ezsd.pipeline.devices import require_device_name, resolve_device

    # What can be refused is, before anything heavy is loaded.
    require_device_name(device)
    settings = [*(set_ or []), *loggers_override(log)]
    config, preset = train_config(cache, preset, settings, seed=seed, backbone_weights=backbone_weights)
    from ezsd.pipeline.runs.schedule import can_train_longer
    from ezsd.pipeline.training.train import TrainRequest
    from ezsd.pipeline.training.train import train as start

    folder = run or Path("runs") / cache.absolute().name
    request = TrainRequest(
        cache=cache,
        run=folder,
        config=config,
        data_root=data_root,
        backbone_weights=backbone_weights,
        device=resolve_device(device),
        verify=verify,
        accept_store=accept_store,
        preset=preset,
    )
    trained, steps = start(request), request.config.train.steps
    if trained.began_at == steps:
        longer = ""
        if can_train_longer(request.config.train):
            longer = ", or train longer: the same command with more train.steps goes on"
        typer.echo(
            f"{folder}: already trained for its {quantity(steps, 'step')}; next: ezsd eval --run "
            f"{shlex.quote(str(folder))}{longer}"
        )
    else:
        typer.echo(f"{folder}: trained; next: ezsd eval --run {shlex.quote(str(folder))}")


@app.command("eval", epilog="Example:  ezsd eval --run runs/a --crops")
@keeping("no figures are kept; run the same command again")
def evaluate(
    run: Annotated[Path | None, typer.Option("--run", help="A run folder made by `ezsd train`.")] = None,
    detections: Annotated[
        Path | None, typer.Option(help="A COCO results file from any detector, instead of a run.")
    ] = None,
    annotations: Annotated[Path | None, typer.Option(help="With --detections: COCO or LVIS ground truth.")] = None,
    split_file: Annotated[
        Path | None, typer.Option(help="With --detections: TOML file with the lists base and novel.")
    ] = None,
    base: Annotated[list[str] | None, typer.Option(help="With --detections: base classes, as CSV.")] = None,
    base_file: Annotated[
        list[Path] | None, typer.Option(help="With --detections: file of base classes, one name per line.")
    ] = None,
    novel: Annotated[
        list[str] | None, typer.Option(help="With --detections: novel classes, as CSV; all others are base.")
    ] = None,
    novel_file: Annotated[
        list[Path] | None, typer.Option(help="With --detections: file of novel classes, one name per line.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --detections: JSON file to write all results to.")] = None,
    split: Annotated[
        Literal["val", "train"] | None, typer.Option(help="With --run: images to evaluate; val by default.")
    ] = None,
    classes: Annotated[
        Literal["all", "base", "novel"] | None,
        typer.Option(help="Classes to evaluate, all by default; a run's other classes still compete with them."),
    ] = None,
    alone: Annotated[
        bool,
        typer.Option(
            "--alone",
            help="With --run: no other class competes with --classes; without --classes, evaluate novel alone as well.",
        ),
    ] = False,
    max_detections: Annotated[
        int | None, typer.Option(min=1, help="Detections per image in the headline; 100 by default, LVIS 300.")
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also show every class.")] = False,
    crops: Annotated[
        bool, typer.Option("--crops", help="With --run: crop accuracy of the raw and the re-normalised teacher.")
    ] = False,
    weights: MovedWeights = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    set_: TestTimeSet = None,
) -> None:
    """Evaluate a run or any detector's results on base, novel and all classes, by COCO's or LVIS's rules."""
    from ezsd.pipeline.console.arguments import (
        class_names,
        require_alone,
        require_one_source,
        require_output,
        require_weights,
        shows_teacher,
    )
    from ezsd.pipeline.devices import require_device_name
    from ezsd.pipeline.runs.folder import require_run

    of_run = {
        "--split": split,
        "--alone": alone or None,
        "--crops": crops or None,
        "--weights": weights,
        "--data-root": data_root,
        "--set": set_,
    }
    of_file = {
        "--annotations": annotations,
        "--split-file": split_file,
        "--base": base,
        "--base-file": base_file,
        "--novel": novel,
        "--novel-file": novel_file,
        "--out": out,
    }
    require_one_source(run=run, of_run=of_run, detections=detections, of_file=of_file)
    require_device_name(device)
    if run is None:
        from ezsd.pipeline.inference.evaluation_tables import evaluate_results, evaluation_tables

        assert detections is not None
        assert annotations is not None
        if out is not None:
            require_output(out)
        result = evaluate_results(
            detections,
            annotations,
            base=class_names("--base", lists=base or (), files=base_file or ()),
            novel=class_names("--novel", lists=novel or (), files=novel_file or ()),
            split_file=split_file,
            classes=classes,
            max_detections=max_detections,
        )
        typer.echo(evaluation_tables(result, per_class=per_class))
        if out is not None:
            from ezsd.pipeline.files import write_json

            write_json(out, result)
        return
    require_weights(weights, used=weights is None or crops or shows_teacher(run, set_ or []))
    require_alone(alone, classes)
    require_run(run)
    from ezsd.pipeline.console.defaults import crop_table, score_table
    from ezsd.pipeline.devices import resolve_device
    from ezsd.pipeline.inference.evaluate import evaluate_crops, evaluate_run
    from ezsd.pipeline.inference.evaluation_tables import evaluation_tables, headline
    from ezsd.pipeline.runs.run import Run

    opened, where = Run.open(run), resolve_device(device)
    result = evaluate_run(
        opened,
        data_root=data_root,
        device=where,
        split=split or "val",
        classes=classes,
        alone=alone,
        max_detections=max_detections,
        overrides=set_ or [],
        weights=weights,
    )
    typer.echo(score_table({str(run): headline(result)}))
    typer.echo(f"\n{evaluation_tables(result, per_class=per_class)}")
    if crops:
        typer.echo(f"\n{crop_table(evaluate_crops(opened, data_root=data_root, device=where, weights=weights))}")


@app.command(epilog="Example:  ezsd detect photo.jpg --run runs/a --classes 'cat,red ball'")
@keeping("pictures that are drawn stay; run the same command again")
def detect(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES...",
            help="Images, videos, folders of them, patterns, URLs of images, .txt lists of paths, 0 for a camera.",
        ),
    ],
    run: RunFolder,
    classes: Annotated[
        list[str] | None, typer.Option(help="Classes to detect, as CSV; the run's own classes by default.")
    ] = None,
    class_: Annotated[
        list[str] | None, typer.Option("--class", help="One class name, taken literally; repeatable.")
    ] = None,
    classes_file: Annotated[
        list[Path] | None, typer.Option(help="File of classes to detect, one name per line.")
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Minimum score.")] = 0.3,
    class_threshold: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SCORE", help="Minimum score of one class; repeatable.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Prompt such as 'a photo of a {}' instead of the run's, or imagenet for CLIP's 80."),
    ] = None,
    class_agnostic_nms: Annotated[
        bool, typer.Option("--class-agnostic-nms", help="Suppress overlapping boxes of different classes too.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that the network sees at once.")] = 8,
    frame_step: Annotated[int, typer.Option(min=1, help="Videos, cameras: look at every n-th frame.")] = 1,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Videos, cameras: stop after so many frames.")] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Image or video file to draw the boxes into; a folder for several images."),
    ] = None,
    save: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT=PLACE",
            help="Also write coco=FILE.json, csv=FILE.csv, yolo=FOLDER, yolo-scores=FOLDER or fiftyone=FOLDER; "
            "repeatable.",
        ),
    ] = None,
    weights: MovedWeights = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one COCO-format document instead of lines.")] = False,
    alone: Annotated[
        bool,
        typer.Option(
            "--alone", help="The run's other classes do not compete: every object is assigned to a requested class."
        ),
    ] = False,
    device: Device = "auto",
    set_: TestTimeSet = None,
) -> None:
    """Detect objects of any named classes in images and videos; boxes refer to the image as viewers show it."""
    from ezsd.pipeline.console.arguments import (
        class_names,
        find_sources,
        is_image,
        is_named_itself,
        parse_class_thresholds,
        parse_outputs,
        picture_places,
        require_template,
        require_weights,
    )
    from ezsd.pipeline.devices import require_device_name
    from ezsd.pipeline.runs.folder import require_run

    asked = class_names("--classes", lists=classes or (), files=classes_file or (), literal=class_ or ())
    least = parse_class_thresholds(class_threshold or ())
    require_template(template)
    require_device_name(device)
    require_weights(weights)
    require_run(run)
    found = find_sources(images)
    drawn = picture_places(found, out, alone=is_named_itself(found, images))
    saved = parse_outputs(save or (), found)
    from ezsd.pipeline.devices import resolve_device
    from ezsd.pipeline.inference.detect import detect_images, resolve_names
    from ezsd.pipeline.inference.detection_files import outputs_of
    from ezsd.pipeline.inference.detections import detection_lines
    from ezsd.pipeline.runs.run import Run

    opened = Run.open(run)
    seen = detect_images(
        found,
        opened,
        resolve_names(opened, asked),
        threshold=threshold,
        device=resolve_device(device),
        drawn=drawn,
        overrides=[*(["eval.class_agnostic_nms=true"] if class_agnostic_nms else []), *(set_ or [])],
        weights=weights,
        alone=alone,
        class_thresholds=least,
        template=template,
        batch_size=batch_size,
        frame_step=frame_step,
        max_frames=max_frames,
        outputs=outputs_of(saved, printed=json_),
        progress=not is_image(found),
    )
    asked_scores = f"{threshold} (or that of --class-threshold)" if least else f"{threshold}"
    for one in seen:
        if json_:
            continue
        for line in detection_lines(one, with_path=not is_image(found)):
            typer.echo(line)
        if not one.objects and one.frame is None:
            typer.echo(f"{one.source}: nothing found with a score of {asked_scores} or more", err=True)


@app.command(epilog="Example:  ezsd export runs/a --out detector.onnx")
@keeping("no file is written")
def export(
    run: Annotated[Path, typer.Argument(help="A run folder made by `ezsd train`.")],
    out: Annotated[Path, typer.Option(help="Output file, which ends in .onnx or .pt2.")],
    format_: Annotated[
        Literal["onnx", "torch"], typer.Option("--format", help="ONNX, or torch.export's ExportedProgram.")
    ] = "onnx",
    classes: Annotated[
        list[str] | None,
        typer.Option(help="Classes to write text embeddings of, as CSV; the run's own classes by default."),
    ] = None,
    class_: Annotated[
        list[str] | None, typer.Option("--class", help="One class name, taken literally; repeatable.")
    ] = None,
    classes_file: Annotated[list[Path] | None, typer.Option(help="File of such classes, one name per line.")] = None,
    weights: MovedWeights = None,
    set_: TestTimeSet = None,
) -> None:
    """Export a detector to a file that runs without ezsd, with text embeddings of classes as an input."""
    from ezsd.pipeline.console.arguments import class_names, require_weights
    from ezsd.pipeline.runs.folder import require_run

    asked = class_names("--classes", lists=classes or (), files=classes_file or (), literal=class_ or ())
    require_weights(weights)
    require_run(run)
    from ezsd.pipeline.inference.export import export as write

    made = write(run, out, format=format_, classes=asked, overrides=set_ or [], weights=weights)
    found = made.agreement
    typer.echo(
        f"{made.out}: {found.agreeing} of {found.detections} detections agree with the run's; boxes differ by at most "
        f"{found.box:.1g} px, scores by {found.score:.1g}"
    )
    typer.echo(f"{made.vocabulary}: text embeddings of the classes")


@app.command(epilog="Example:  ezsd report --run runs/a --compare runs/plain")
@keeping("no page is written; run the same command again")
def report(
    run: RunFolder,
    compare: Annotated[list[Path] | None, typer.Option(help="Other runs to compare with.")] = None,
    data_root: DataRoot = None,
) -> None:
    """Write an HTML report with results, curves and pictures."""
    from ezsd.pipeline.runs.folder import require_run

    for folder in (run, *(compare or [])):
        require_run(folder)
    from ezsd.pipeline.report import write_report
    from ezsd.pipeline.runs.run import Run

    others = [Run.open(folder) for folder in compare or []]
    typer.echo(str(write_report(Run.open(run), data_root=data_root, compare=others)))


@app.command(epilog="Example:  ezsd view runs/a --compare runs/plain")
@keeping("the page is closed; run the same command to open it again")
def view(
    target: Annotated[Path, typer.Argument(metavar="RUN|STORE", help="A run folder or a complete store.")],
    compare: Annotated[Path | None, typer.Option(help="Another run, to see side by side.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 for any free one.")] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the page's address.")] = False,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Show novel boxes of training images too: to report, not to choose by.")
    ] = False,
    weights: MovedWeights = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    set_: TestTimeSet = None,
) -> None:
    """Serve a page, on this machine alone, to browse a run or a store and to try a run on images of your own."""
    from ezsd.pipeline.console.arguments import require_weights
    from ezsd.pipeline.devices import require_device_name, resolve_device
    from ezsd.pipeline.runs.folder import require_run

    require_device_name(device)
    require_weights(weights)
    if compare is not None:
        require_run(compare)
    from ezsd.pipeline.view import Viewer, ViewRequest

    request = ViewRequest(
        target=target,
        compare=compare,
        evaluate=evaluate,
        data_root=data_root,
        weights=weights,
        device=resolve_device(device),
        overrides=tuple(set_ or []),
    )
    with Viewer(request, port) as viewer:
        typer.echo(f"{viewer.address}  (Ctrl-C closes it)")
        if not no_browser:
            viewer.open_browser()
        viewer.serve()


@app.command(epilog="Example:  ezsd audit runs/a --setting ovd-strict")
@keeping("a check leaves nothing behind; run the same command again")
def audit(
    target: Annotated[str, typer.Argument(metavar="RUN|STORE", help="A run folder, a complete store, or its URL.")],
    setting: Annotated[
        Literal["zad", "ovd-strict"],
        typer.Option(help="zad: novel names may be known in training; ovd-strict: not before evaluation."),
    ] = "zad",
    cache: Annotated[str | None, typer.Option(help="Folder or URL of the run's store, if it has moved.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder of images and annotations, if it has moved.")] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="Training annotations to compare with, such as the published ones; the dataset's by default."
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Trace which boxes and names entered each stage; exit code 1 unless it is proven that no novel box did."""
    from ezsd.pipeline.audit import AuditRequest
    from ezsd.pipeline.audit import audit as examine
    from ezsd.pipeline.console.audit_messages import audit_json, audit_lines

    request = AuditRequest(target=target, setting=setting, cache=cache, data_root=data_root, annotations=annotations)
    result = examine(request)
    typer.echo(audit_json(result) if json_ else "\n".join(audit_lines(result)))
    if result.verdict != "passed":
        raise typer.Exit(1)


@app.command(epilog="Example:  ezsd doctor")
def doctor(
    folder: Annotated[Path, typer.Option(help="Where stores are to lie.")] = Path("cache"),
    json_: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Examine this machine: packages, GPU, a first kernel, memory, disk, weights; exit code 2 if there is a problem."""
    from ezsd.pipeline.console.doctor_messages import finding_lines, findings_json
    from ezsd.pipeline.doctor import examine

    found = examine(folder)
    typer.echo(findings_json(found) if json_ else "\n".join(finding_lines(found)))
    if any(finding.level == "problem" for finding in found):
        raise SystemExit(2)


@app.command(epilog="Example:  ezsd demo")
@keeping("what is finished stays; run the same command to go on")
def demo(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of data and training; 0 is the dev seed.")] = 0,
    dataset: Annotated[Benchmark, typer.Option(help="Embedded benchmark.")] = "shapes",
    device: Device = "auto",
    set_: Set = None,
) -> None:
    """Run the whole pipeline on the embedded benchmark, in minutes."""
    from ezsd.pipeline.console.defaults import score_table, seconds_table
    from ezsd.pipeline.demo import run_demo
    from ezsd.pipeline.devices import resolve_device

    result = run_demo(out, seed=seed, device=resolve_device(device), overrides=tuple(set_ or []), benchmark=dataset)
    typer.echo(score_table(result.scores))
    typer.echo(seconds_table(result.seconds))
    typer.echo(f"report: {result.report}")


def main() -> None:
    """Run the command; wrong input is one line and exit code 2, anything else is a bug and shows itself.

    A first SIGINT or SIGTERM ends with what is kept and exit code 130 or 143, output that nobody reads with 141.
    """
    try:
        listen()
        prepare_streams()
        keep_freed_memory()
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(OptionFormatter())
        # Details, such as the backend that was chosen, are for log files.
        handler.setLevel(logging.INFO)
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        logging.getLogger("ezsd").setLevel(logging.DEBUG)
        with keeping(""):
            app(prog_name="ezsd")
    except Stopped as stopped:
        if stopped.is_told:
            typer.echo(f"ezsd: {stopped}", err=True)
        raise SystemExit(stopped.code) from None
    except Exception as error:
        if not _is_users(error):
            raise
        said = with_cure(error) if isinstance(error, OSError) else str(error)
        typer.echo(f"ezsd: {as_options(_one_line(said))}", err=True)
        raise SystemExit(2) from None
    finally:
        end_listening()


_LONGEST = 4000
"""Characters of an error's line; what a hostile file is quoted with may be a million."""


def _one_line(said: str) -> str:
    """Text of an error as a terminal may have it: without control characters, and not without an end."""
    line = " ".join(said.split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in line)


def _is_users(error: BaseException) -> bool:
    """Test whether our own code raised the error about its input, or the system about a place."""
    return is_of_a_place(error) if isinstance(error, OSError) else isinstance(error, EzsdError)


if __name__ == "__main__":
    main()
