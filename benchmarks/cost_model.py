"""Time of the stages on a GPU: products, memory, link, host. Arithmetic on what is counted, measured or assumed.

Two ends: "hidden", where cores work beside the GPU and nothing waits, and "in turn", where one core and the GPU wait
for each other.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 4
"""Bytes of what is counted."""
PIXEL_BYTES = 1
"""Of each of a pixel's colours on the link."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Published figures of a GPU."""

    tflops: float
    """Dense products in bf16, TFLOP/s."""
    memory: float
    """TB/s."""
    link: float
    """From the host, GB/s."""


GPUS = {"H200": Gpu(989, 4.8, 64), "A100": Gpu(312, 2.0, 32), "RTX 4090": Gpu(165, 1.0, 32)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """What no count gives."""

    utilisation: float = 0.4
    """Of the published products."""
    memory: float = 0.7
    """Of the published memory rate."""
    activation_bytes: int = 2
    trained_passes: int = 5
    """How often an activation that is kept is read or written, forward and backward."""
    looked_passes: int = 2
    """The same without a backward pass."""
    parameter_passes: int = 9
    """How often a parameter, its gradient or its momentum are, in a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the CPU does, and whether the GPU waits for it. Milliseconds are of one core."""

    cores: int
    hidden: bool
    tuned_crop_ms: float
    """Of a crop of re-normalisation: decoding, cropping, batching."""
    image_ms: float
    """Of an image of stage one."""
    crop_ms: float
    """Of each of its crops."""
    pair_us: float
    """Of each pair of its boxes, in suppression."""
    read_ms: float
    """Of a training image, by reading processes."""
    readers: int
    waits: int
    """Of a training step of 16 images."""
    wait_ms: float
    """Idle time of the GPU at each."""
    link: float
    """Of the published rate."""

    def beside(self, gpu_ms: float, host_ms: float) -> float:
        """Milliseconds of both."""
        return max(gpu_ms, host_ms / self.cores) if self.hidden else gpu_ms + host_ms


HIDDEN = Host(
    cores=8,
    hidden=True,
    tuned_crop_ms=1.0,
    image_ms=5.0,
    crop_ms=0.002,
    pair_us=0.0,
    read_ms=7.0,
    readers=8,
    waits=2,
    wait_ms=0.1,
    link=0.5,
)
IN_TURN = Host(
    cores=1,
    hidden=False,
    tuned_crop_ms=1.85,
    image_ms=14.0,
    crop_ms=0.025,
    pair_us=0.0003,
    read_ms=8.7,
    readers=4,
    waits=2,
    wait_ms=0.2,
    link=0.1,
)
ENDS = (HIDDEN, IN_TURN)


def gpu_ms(gpu: Gpu, assumed: Assumed, *, gflop: float, kept_gb: float, passes: int) -> float:
    """Milliseconds of products, and of reading and writing activations, which are counted in float32."""
    products = gflop / (gpu.tflops * assumed.utilisation)
    moved = kept_gb * assumed.activation_bytes / FLOAT * passes
    return products + moved / (gpu.memory * assumed.memory)


def tuning_ms(gpu: Gpu, assumed: Assumed, host: Host, *, crops: int, gflop: float, kept_gb: float, side: int) -> float:
    """Milliseconds of a step of re-normalisation of so many crops."""
    there = gpu_ms(gpu, assumed, gflop=gflop, kept_gb=kept_gb, passes=assumed.trained_passes)
    return host.beside(there + link_ms(gpu, host, crops * side**2), crops * host.tuned_crop_ms)


def looking_ms(gpu: Gpu, assumed: Assumed, host: Host, *, crops: float, gflop: float, kept_gb: float) -> float:
    """Milliseconds of an image of stage one of so many crops; gflop and kept_gb of one."""
    there = gpu_ms(gpu, assumed, gflop=crops * gflop, kept_gb=crops * kept_gb, passes=assumed.looked_passes)
    here = host.image_ms + crops * host.crop_ms + crops**2 * host.pair_us / 1e3
    return host.beside(there, here)


def training_ms(
    gpu: Gpu, assumed: Assumed, host: Host, *, images: int, gflop: float, kept_gb: float, trained: float, pixels: int
) -> float:
    """Milliseconds of a training step; gflop and kept_gb of an image, `trained` parameters."""
    there = gpu_ms(gpu, assumed, gflop=images * gflop, kept_gb=images * kept_gb, passes=assumed.trained_passes)
    optimiser = trained * FLOAT * assumed.parameter_passes / 1e9 / (gpu.memory * assumed.memory)
    busy = there + optimiser
    apart = link_ms(gpu, host, images * pixels)
    busy = max(busy, apart) if host.hidden else busy + apart
    busy += host.waits * images / 16 * host.wait_ms
    # Processes of their own read in either case.
    return max(busy, images * host.read_ms / host.readers)


def link_ms(gpu: Gpu, host: Host, pixels: int) -> float:
    """Milliseconds in which pixels of three colours reach the GPU."""
    return 3 * pixels * PIXEL_BYTES / (gpu.link * host.link * 1e6)


def assumptions(assumed: Assumed) -> list[list[str]]:
    """Rows of a table: what, "hidden", "in turn", and where it is from."""
    here, there = ENDS
    return [
        ["", "hidden", "in turn", "from"],
        ["share of the published products (bf16)", *2 * [f"{assumed.utilisation}"], "assumed"],
        ["share of the published memory rate", *2 * [f"{assumed.memory}"], "assumed"],
        [
            "reads and writes of an activation, trained; looked at",
            *2 * [f"{assumed.trained_passes}; {assumed.looked_passes}"],
            "assumed",
        ],
        [
            "share of the published link (H200 64 GB/s, others 32)",
            f"{here.link}",
            f"{there.link}",
            "assumed, pinned and pageable",
        ],
        [
            "bytes of a pixel's colour on the link",
            *2 * [f"{PIXEL_BYTES}"],
            "as bytes",
        ],
        ["cores beside the GPU", f"{here.cores}", "none: each waits for the other", "assumed"],
        [
            "CPU ms of a crop of re-normalisation",
            f"{here.tuned_crop_ms}",
            f"{there.tuned_crop_ms}",
            "assumed",
        ],
        [
            "CPU ms of an image of stage one",
            f"{here.image_ms}",
            f"{there.image_ms}",
            "assumed: reading alone; with choice and scores",
        ],
        [
            "CPU ms of a crop of stage one",
            f"{here.crop_ms}",
            f"{there.crop_ms}",
            "assumed: one kernel for all; with launches",
        ],
        [
            "CPU us of a pair of boxes in suppression",
            f"{here.pair_us:g}",
            f"{there.pair_us:g}",
            "assumed, on the GPU; results/suppression.jsonl, hills",
        ],
        [
            "CPU ms of reading a training image, and readers",
            f"{here.read_ms}, {here.readers}",
            f"{there.read_ms}, {there.readers}",
            "assumed",
        ],
        [
            "waits of a training step of 16 images, idle ms of each",
            f"{here.waits}, {here.wait_ms}",
            f"{there.waits}, {there.wait_ms}",
            "counted on a pretend GPU; idle time assumed",
        ],
    ]
