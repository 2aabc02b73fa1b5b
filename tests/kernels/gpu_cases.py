"""Run by `make gpu-check` on a machine with a GPU: the Triton operators against float64, in every dtype.

Real sizes are compared by the gates of benchmarks/kernel.py.
"""

import os

import pytest
import torch
from torch.testing import assert_close

from ezsd import kernels
from ezsd.kernels import Pooling
from tests.kernels.gates import errors, passes, placed, tolerance
from tests.kernels.kernel_problems import make_problem, run_align, run_embed, run_embed_cosine, run_loss

# cuBLAS is deterministic only with a workspace of its own; it reads this when it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POOLING = Pooling(spatial_scale=(1.0,), backend="triton")


@pytest.fixture(autouse=True, scope="session")
def _gpu():
    if not torch.cuda.is_available():
        pytest.exit("gpu_cases.py needs a GPU, and torch sees none", returncode=2)
    torch.set_float32_matmul_precision("highest")
    # Sums in 16 bits are none of the roundings that the gates allow for.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


@pytest.fixture(autouse=True)
def _outputs_begin_as_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(problem, dtype):
    return placed(problem, dtype, "cuda")


def check(run, name, problem, dtype, **options):
    found = errors(run, name, problem, dtype, device="cuda", **options)
    assert passes(found, dtype), (
        f"relative errors {', '.join(f'{error:.1e}' for error in found)}; {tolerance(dtype):.1e} allowed"
    )


def require_free(gib):
    """Skip a test on a card that has less memory to give."""
    # What earlier tests left in torch's cache is free too.
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.1f} are free")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regions", [0, 1, 7, 1000])
@pytest.mark.parametrize(("bins", "channels", "dim"), [(1, 63, 512), (5, 256, 63), (7, 63, 63), (7, 256, 512)])
@pytest.mark.parametrize("levels", [1, 4])
def test_loss_equals_float64(dtype, regions, bins, channels, dim, levels):
    problem = make_problem(regions=regions, bins=bins, channels=channels, dim=dim, levels=levels)
    check(run_loss, "roi_align_cosine", problem, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_other_operators_equal_float64(dtype):
    problem = make_problem(regions=100, channels=63, levels=4)
    check(run_align, "roi_align", problem, dtype)
    check(run_embed, "roi_embed", problem, dtype)
    check(run_loss, "roi_align_cosine", make_problem(regions=100, bins=1, head=False), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_detectors_own_operator_equals_float64(dtype):
    check(run_embed_cosine, "roi_embed_cosine", make_problem(regions=100, channels=63, levels=4), dtype, targets=40)


def test_the_mask_heads_pooling_equals_float64():
    problem = make_problem(regions=100, bins=14, channels=256, levels=4, head=False)
    check(run_align, "roi_align", problem, torch.bfloat16)


def test_l1_equals_float64():
    # Only in float32: rounding to 16 bits turns signs of differences near zero, and each turn counts fully.
    check(run_loss, "roi_align_cosine", make_problem(regions=100, levels=4), torch.float32, metric="l1")


def test_twenty_thousand_boxes():
    problem = make_problem(regions=20_000, bins=1, channels=8, levels=4)
    check(run_loss, "roi_align_cosine", problem, torch.bfloat16)
    check(run_align, "roi_align", problem, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_runs_are_bit_equal(dtype):
    problem = on_gpu(make_problem(regions=1000, channels=256, dim=512, levels=4), dtype)
    first = run_loss(kernels.roi_align_cosine, problem, backend="triton")
    for _ in range(9):
        assert_close(run_loss(kernels.roi_align_cosine, problem, backend="triton"), first, rtol=0, atol=0)


def test_maps_beyond_two_to_the_31_elements():
    require_free(15)
    images, channels, size = 9, 256, 1024
    whole = torch.zeros(images, channels, size, size, dtype=torch.bfloat16, device="cuda")
    whole = whole.contiguous(memory_format=torch.channels_last)
    whole[-1] = torch.randn(channels, size, size, device="cuda")
    boxes = torch.rand(50, 4, device="cuda") * 500
    boxes[:, 2:] += boxes[:, :2]
    pooled, gradient = align_one(whole, boxes, images - 1)
    alone, gradient_alone = align_one(whole[-1:], boxes, 0)
    assert_close(pooled, alone, rtol=0, atol=0)
    assert_close(gradient[-1:], gradient_alone, rtol=0, atol=0)
    assert gradient[:-1].count_nonzero() == 0


def align_one(feature, boxes, image):
    feature = feature.detach().requires_grad_()
    image_index = torch.full((len(boxes),), image, device="cuda")
    pooled = kernels.roi_align(feature, boxes, image_index, POOLING)
    pooled.backward(torch.ones_like(pooled))
    return pooled.detach(), feature.grad


def test_pooled_boxes_beyond_two_to_the_31_elements():
    require_free(6)
    feature = torch.randn(1, 256, 16, 16, dtype=torch.bfloat16, device="cuda")
    boxes = torch.rand(172_000, 4, device="cuda") * 8
    boxes[:, 2:] += boxes[:, :2]
    image_index = torch.zeros(len(boxes), dtype=torch.int64, device="cuda")
    pooled = kernels.roi_align(feature, boxes, image_index, POOLING)
    assert pooled.numel() > 2**31
    alone = kernels.roi_align(feature, boxes[-9:], image_index[-9:], POOLING)
    assert_close(pooled[-9:], alone, rtol=0, atol=0)


def test_nothing_waits_for_the_device():
    problem = on_gpu(make_problem(regions=100, levels=4), torch.bfloat16)
    run_loss(kernels.roi_align_cosine, problem, backend="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_loss(kernels.roi_align_cosine, problem, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_image_that_does_not_exist_is_nan():
    problem = on_gpu(make_problem(regions=3, bins=1), torch.bfloat16)
    problem.image_index[1:] = torch.tensor([2, -1])
    pooled = run_align(kernels.roi_align, problem, backend="triton")[0]
    assert pooled[0].isfinite().all()
    assert pooled[1:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_box_of_nan_is_nan_and_adds_to_no_map(dtype):
    problem = on_gpu(make_problem(regions=3, bins=1), dtype)
    problem.boxes[1] = torch.nan
    pooled, gradient = run_align(kernels.roi_align, problem, backend="triton")
    assert pooled[1].isnan().all()
    assert pooled[[0, 2]].isfinite().all()
    assert gradient.isfinite().all()
    loss, *_ = run_loss(kernels.roi_align_cosine, problem, backend="triton")
    assert loss.isnan()


def test_compiled_and_plain_agree():
    problem = on_gpu(make_problem(regions=100, levels=4), torch.bfloat16)
    expected = run_loss(kernels.roi_align_cosine, problem, backend="triton")
    compiled = torch.compile(kernels.roi_align_cosine, fullgraph=True)
    assert_close(run_loss(compiled, problem, backend="triton"), expected)


def test_autocast_casts_the_products_operands():
    problem = on_gpu(make_problem(regions=100, levels=4), torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = run_loss(kernels.roi_align_cosine, problem, backend="triton")
    narrow = on_gpu(problem, torch.bfloat16)
    expected = run_loss(kernels.roi_align_cosine, narrow, backend="triton")
    assert_close(found, [value.float() for value in expected])
