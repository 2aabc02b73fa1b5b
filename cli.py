"""The `ezsd` command: parse, call, print."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="ezsd",
    help="Teach an object detector to find classes it never saw a box of.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Make datasets.", no_args_is_help=True)
cache_app = typer.Typer(help="Build and inspect stores of regions and embeddings.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(cache_app, name="cache")

Set = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DataRoot = Annotated[Path | None, typer.Option(help="Where the images lie now, if they have moved.")]
RunFolder = Annotated[Path, typer.Option("--run", help="A run folder that `ezsd train` made.")]
Preset = Annotated[str | None, typer.Option(help="Settings to start from: shapes, coco, paper or photos.")]


@data_app.command("shapes", epilog="Example:  ezsd data shapes --out data/shapes")
def data_shapes(
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    train: Annotated[int, typer.Option(min=1, help="Training images.")] = 500,
    val: Annotated[int, typer.Option(min=1, help="Validation images.")] = 250,
    seed: Annotated[int, typer.Option(min=0, help="0 is for choosing, 1 to 3 for reporting.")] = 0,
) -> None:
    """Draw the embedded benchmark as a COCO-format folder."""
    from pipeline.shapes import write_shapes

    write_shapes(out, train=train, val=val, seed=seed)
    typer.echo(f"{out}: {train} training and {val} validation images, seed {seed}")


@cache_app.command("build", epilog="Example:  ezsd cache build --dataset shapes")
def cache_build(
    dataset: Annotated[str, typer.Option(help="shapes or coco (any folder in COCO's layout).")],
    data_root: Annotated[
        Path | None, typer.Option(help="Folder with images and annotations; data/NAME by default.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The store; cache/NAME by default.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="An open_clip model, tiny-shapes, or plugin:package.module:factory.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="An open_clip tag or a local file.")] = None,
    preset: Preset = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first images.")] = None,
    device: Device = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 chooses.")] = 0,
    set_: Set = None,
) -> None:
    """Re-normalise the teacher, find CLIP proposals, embed them: once per dataset and teacher."""
    from pipeline.build import BuildRequest, build_cache
    from pipeline.command import build_config, dataset_at, known_dataset, resolve_device

    # Everything that can be refused is, before the benchmark is drawn.
    where = resolve_device(device)
    known_dataset(dataset)
    config = build_config(preset or dataset, set_ or [], teacher=teacher, weights=weights)
    found = dataset_at(dataset, data_root)
    store = out or Path("cache") / dataset
    request = BuildRequest(
        dataset=found,
        config=config,
        out=store,
        preset=preset or dataset,
        limit=limit,
        device=where,
        workers=workers,
    )
    report = build_cache(request)
    if report.already_complete:
        typer.echo(f"{store}: complete already, nothing to do")
        return
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
    typer.echo(f"{store}: complete ({times})")


@cache_app.command("info", epilog="Example:  ezsd cache info cache/shapes")
def cache_info(store: Annotated[Path, typer.Argument(help="A store.")]) -> None:
    """Say what a store holds, who made it how, and whether it is complete."""
    from pipeline.command import describe_store

    typer.echo(describe_store(store))


@app.command(epilog="Example:  ezsd train --cache cache/shapes --run runs/a")
def train(
    cache: Annotated[Path, typer.Option(help="A complete store.")],
    run: Annotated[Path | None, typer.Option(help="Run folder, resumed if it exists; runs/STORE by default.")] = None,
    preset: Preset = None,
    data_root: DataRoot = None,
    backbone_weights: Annotated[Path | None, typer.Option(help="ImageNet state, .safetensors or .pth.")] = None,
    device: Device = "auto",
    set_: Set = None,
) -> None:
    """Train the detector from base boxes and cached regions; under `torchrun`, on several GPUs."""
    from pipeline.command import resolve_device, train_config
    from pipeline.train import TrainRequest
    from pipeline.train import train as start

    folder = run or Path("runs") / cache.absolute().name
    request = TrainRequest(
        cache=cache,
        run=folder,
        config=train_config(cache, preset, set_ or []),
        data_root=data_root,
        backbone_weights=backbone_weights,
        device=resolve_device(device),
    )
    start(request)
    typer.echo(f"{folder}: trained; next: ezsd eval --run {folder}")


@app.command("eval", epilog="Example:  ezsd eval --run runs/a --crops")
def evaluate(
    run: RunFolder,
    crops: Annotated[bool, typer.Option("--crops", help="Also crop accuracy, raw and re-normalised.")] = False,
    data_root: DataRoot = None,
    device: Device = "auto",
) -> None:
    """Evaluate a run on the validation split: base, novel, all."""
    from pipeline.command import crop_table, resolve_device, score_table
    from pipeline.evaluate import evaluate_crops, evaluate_run, headline
    from pipeline.runs import Run

    opened, where = Run.open(run), resolve_device(device)
    result = evaluate_run(opened, data_root=data_root, device=where)
    typer.echo(score_table({str(run): headline(result)}))
    if crops:
        typer.echo(crop_table(evaluate_crops(opened, data_root=data_root, device=where)))


@app.command(epilog="Example:  ezsd detect photo.jpg --run runs/a --classes 'cat,red ball'")
def detect(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    run: RunFolder,
    classes: Annotated[str, typer.Option(help="Names to look for, comma-separated.")],
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Least score.")] = 0.3,
    out: Annotated[Path | None, typer.Option(help="Write the image with boxes there.")] = None,
    device: Device = "auto",
) -> None:
    """Find objects of any named classes in an image."""
    from pipeline.command import parse_classes, resolve_device
    from pipeline.detect import detect_image
    from pipeline.runs import Run

    names = parse_classes(classes)
    found = detect_image(image, Run.open(run), names, threshold=threshold, device=resolve_device(device), drawn=out)
    for one in found:
        box = " ".join(f"{v:.1f}" for v in one.box)
        typer.echo(f"{one.score:.3f}  {one.name}  {box}")
    if not found:
        typer.echo(f"nothing found with a score of {threshold} or more", err=True)


@app.command(epilog="Example:  ezsd report --run runs/a --compare runs/plain")
def report(
    run: RunFolder,
    compare: Annotated[list[Path] | None, typer.Option(help="Other runs to show beside it.")] = None,
    data_root: DataRoot = None,
) -> None:
    """Write one HTML page: results, curves, pictures."""
    from pipeline.report import write_report
    from pipeline.runs import Run

    others = [Run.open(folder) for folder in compare or []]
    typer.echo(str(write_report(Run.open(run), data_root=data_root, compare=others)))


@app.command(epilog="Example:  ezsd demo")
def demo(
    out: Annotated[Path, typer.Option(help="Everything lands below it.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of data and training; 0 is the dev seed.")] = 0,
    device: Device = "auto",
    set_: Set = None,
) -> None:
    """Run the whole of it on the embedded benchmark, in minutes."""
    from pipeline.command import resolve_device, score_table, seconds_table
    from pipeline.demo import run_demo

    result = run_demo(out, seed=seed, device=resolve_device(device), overrides=tuple(set_ or []))
    typer.echo(score_table(result.scores))
    typer.echo(seconds_table(result.seconds))
    typer.echo(f"report: {result.report}")


def main() -> None:
    """Run the command; wrong input is one line and exit code 2, anything else is a bug and shows itself."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ezsd").setLevel(logging.INFO)
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        if not _is_users(error):
            raise
        typer.echo(f"ezsd: {' '.join(str(error).split())}", err=True)
        raise SystemExit(2) from None


def _is_users(error: BaseException) -> bool:
    """Whether the error is one that our own code raised about its input."""
    from pipeline.command import USER_ERRORS

    return isinstance(error, USER_ERRORS)


if __name__ == "__main__":
    main()
