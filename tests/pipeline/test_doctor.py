"""`ezsd doctor`: what is wrong with a machine, with its cure, and what is not."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from ezsd.kernels import backend
from ezsd.pipeline import doctor
from ezsd.pipeline.console.doctor_messages import finding_lines
from ezsd.pipeline.doctor import Finding, examine
from tests.commandkit import ezsd
from tests.pretend_gpu import pretend_gpu

ROOT = Path(__file__).resolve().parents[2]


def found(folder, subject):
    return [finding for finding in examine(folder) if finding.subject == subject]


def test_a_machine_without_faults_ends_with_0_and_one_with_a_fault_with_2(tmp_path):
    done = ezsd("doctor", "--folder", tmp_path / "cache", "--json")
    assert done.returncode == 0, done.stdout
    findings = [Finding(**one) for one in json.loads(done.stdout)]
    assert {finding.level for finding in findings} <= {"ok", "warning"}
    assert {"packages", "processor", "shared memory", "disk", "folder", "weights"} <= {one.subject for one in findings}
    assert not (tmp_path / "cache").exists()
    assert list(tmp_path.iterdir()) == []
    done = ezsd("doctor", "--folder", "/proc/cache")
    assert done.returncode == 2
    assert "problem  folder " in done.stdout
    assert "-> take another folder: --out DIR" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 problem, ")


def test_each_finding_is_a_line_with_its_cure_below_it():
    findings = [
        Finding("ok", "disk", "all"),
        Finding("problem", "packages", "old", "new"),
        Finding("problem", "x", "y"),
    ]
    assert finding_lines(findings) == [
        "ok       disk      all",
        "problem  packages  old",
        "                   -> new",
        "problem  x         y",
        "2 problems, 0 warnings",
    ]


def test_packages_that_are_missing_or_too_old_are_named_with_what_installs_them(tmp_path, monkeypatch):
    wanted = ["zarr>=99", "no-such-package>=1", "torch>=2", 'other>=1; extra == "test"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    zarr, absent = found(tmp_path, "packages")
    assert zarr.level == absent.level == "problem"
    assert zarr.text == f"zarr is {importlib.metadata.version('zarr')}, expected >=99"
    assert zarr.cure == "pip install 'zarr>=99'"
    assert absent.text == "no-such-package is missing, expected >=1"


def test_weights_are_found_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (absent,) = found(tmp_path, "weights")
    assert (absent.level, str(tmp_path) in absent.text) == ("warning", True)
    assert "give a file as --weights FILE" in absent.cure
    repository = absent.cure.split("downloads ")[1].split(";")[0]
    folder = tmp_path / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    weights = folder / "snapshots/abc/open_clip_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    (there,) = found(tmp_path, "weights")
    assert (there.level, there.cure) == ("ok", "")
    assert there.text.endswith(str(weights))


@pytest.mark.parametrize(("limit", "subject"), [("_LEAST_SHARED", "shared memory"), ("_LEAST_DISK", "disk")])
def test_little_room_is_a_warning(limit, subject, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, limit, 0)
    assert [finding.level for finding in found(tmp_path, subject)] == ["ok"]
    monkeypatch.setattr(doctor, limit, 2**80)
    (finding,) = found(tmp_path, subject)
    assert finding.level == "warning"
    assert finding.cure


def test_a_gpu_is_named_with_its_memory_and_a_first_kernel_is_run(tmp_path, monkeypatch):
    with pretend_gpu(), pytest.MonkeyPatch.context() as patch:
        (gpu,), (kernel,) = found(tmp_path, "cuda:0"), found(tmp_path, "Triton")
        assert (gpu.level, kernel.level) == ("ok", "ok")
        assert gpu.text == "pretend GPU, compute capability 9.0, 80.0 of 80.0 GiB free"
        assert kernel.text == "a first kernel ran on cuda:0"
        patch.setattr(doctor, "_LEAST_GPU", 2**80)
        patch.setattr(doctor.shutil, "which", lambda name: None)
        patch.delenv("CC", raising=False)
        patch.setattr(backend, "_tried_on", lambda index: "no compiler")
        by_subject = {finding.subject: finding for finding in examine(tmp_path)}
        assert "smaller batches" in by_subject["cuda:0"].cure
        assert by_subject["Triton"].text == "does not run on cuda:0: no compiler"
        assert by_subject["compiler"].cure == "install gcc, or set CC"

        def broken(index):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")

        patch.setattr(backend, "_tried_on", broken)
        (gpu,) = found(tmp_path, "cuda:0")
        assert (gpu.level, found(tmp_path, "Triton")) == ("problem", [])
        assert gpu.text == "does not work: CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize(
    ("driver", "cuda", "hidden", "level", "text"),
    [
        (None, "13.0", None, "warning", "none: everything works on the CPU, much slower"),
        ("echo no devices", "13.0", None, "warning", "none: everything works on the CPU, much slower"),
        ("echo GPU 0: x", "13.0", "", "warning", "hidden by CUDA_VISIBLE_DEVICES"),
        ("echo GPU 0: x", None, None, "problem", "is built for the CPU alone"),
        ("echo GPU 0: x", "13.0", None, "problem", "(CUDA 13.0) sees none"),
    ],
)
def test_a_gpu_that_is_not_seen_has_its_reason(driver, cuda, hidden, level, text, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    if driver is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{driver}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    (finding,) = found(tmp_path, "GPU")
    assert finding.level == level
    assert text in finding.text


def test_a_container_has_the_memory_that_it_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_CONTAINER_MEMORY", tmp_path / "memory.max")
    (tmp_path / "memory.max").write_text("max\n")
    (machine,) = found(tmp_path, "processor")
    (tmp_path / "memory.max").write_text(f"{2 * 2**30}\n")
    (container,) = found(tmp_path, "processor")
    assert " 2 GiB" not in machine.text
    assert " 2 GiB of memory" in container.text
    assert (container.level, "--workers 1" in container.cure) == ("warning", True)


@pytest.mark.parametrize("package", ["torch", "open_clip"])
def test_a_package_that_does_not_load_is_a_problem_and_no_traceback(package, tmp_path):
    (tmp_path / f"{package}.py").write_text("raise RuntimeError('operator torchvision::nms does not exist\\nmore')")
    done = subprocess.run(
        [sys.executable, "-m", "ezsd", "doctor"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == ""
    assert "a package does not load: operator torchvision::nms does not exist\n" in done.stdout
    assert "ok       processor" in done.stdout
    assert "ok       disk" in done.stdout or "warning  disk" in done.stdout
