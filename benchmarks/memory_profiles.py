"""The figures and pictures of docs/profile.md: `python benchmarks/memory_profiles.py`.

Writes the pictures to docs/images. Prints the reports, the difference between the simulation and
what torch.profiler sees of real steps on this CPU, and how long a profile takes in a fresh process.
"""

from __future__ import annotations

import datetime as dt
import io
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from memfit.backends import open_backend
from memfit.backends.traces import trace
from memfit.profiling import profile_device
from memfit.profiling.attribution import Attribution
from memfit.profiling.peak import peak_of
from memfit.profiling.replay import Replay, replay
from memfit.records import Peak, Precision, Role, StepOptions
from memfit.simulation.allocator.blocks import BlockOrder
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.simulation.tracing.trace import TraceOptions
from memfit.simulation.tracing.workspace import Kernels
from memfit.step.training_step import TrainingStep

IMAGES = Path(__file__).parent.parent / "docs" / "images"
BATCH_SIZE = 8
MODELS = ("test_vit.r160_in1k", "vit_tiny_patch16_224", "mixer_s32_224", "gmlp_ti16_224")
WALK = ("vit_base_patch16_384", "--batch-size", "128", "--gpu", "rtx4090")
PAGE_SIZE = (1200, 1500)


def main() -> None:
    """Print everything, or with `agreement` only how far the simulation is off."""
    torch.set_num_threads(1)
    IMAGES.mkdir(exist_ok=True)
    print(
        f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}, "
        f"{dt.datetime.now(tz=dt.timezone.utc).date()}\n"
    )
    if sys.argv[1:] != ["agreement"]:
        reports()
    agreement()


def reports() -> None:
    """Print the reports, and draw the pictures."""
    profiled(*WALK, "--plot", str(IMAGES / "vit_base_384.svg"))
    profiled(*WALK, "--grad-checkpointing")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "r.html"
        profiled(
            "resnet50", "--batch-size", "64", "--gpu", "rtx3090", "--gpu", "rtx4090",
            "--html", str(page), "--plot", str(IMAGES / "resnet50.svg"),
        )  # fmt: skip
        print(f"The page has {page.stat().st_size / 1e6:.1f} MB.\n")
        photograph(page, IMAGES / "profile-page.png")


def profiled(*arguments: str) -> None:
    """Run `memfit profile` in a fresh process, and print what it printed."""
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-m", "memfit", "profile", *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    seconds = time.perf_counter() - start
    shown = (Path(argument).name if "/" in argument else argument for argument in arguments)
    print(f"$ memfit profile {' '.join(shown)}")
    print(process.stdout + process.stderr)
    print(f"exit code {process.returncode}, {seconds:.1f} s in all\n")


def photograph(page: Path, path: Path) -> None:
    """Write what headless Chromium shows of a page, in 128 colours."""
    browser, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver_path is None:
        print("no Chromium: no picture of the page")
        return
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    options.add_argument("--window-size={},{}".format(*PAGE_SIZE))
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    try:
        driver.get(page.as_uri())
        while driver.execute_script("return document.documentElement.dataset.drawn") != "true":
            time.sleep(0.1)
        shot = driver.get_screenshot_as_png()
    finally:
        driver.quit()
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(128).save(path, optimize=True)


def agreement() -> None:
    """Print how far simulated peaks and roles are from torch.profiler's."""
    print(f"fp32, AdamW, batch size {BATCH_SIZE}: simulated against torch.profiler, less 1.")
    print("| model | measured peak, MiB | peak | parameters | optimizer state | activations |")
    print("|---|---|---|---|---|---|")
    for model in MODELS:
        step = TrainingStep(
            subject=model, options=StepOptions(precision=Precision.FP32, optimizer="adamw")
        )
        with open_backend("cpu") as backend:
            real = profile_device(step, BATCH_SIZE, backend, torch.device("cpu")).profile.peak
        simulated = _simulated(step)
        peak = simulated.allocated_bytes - simulated.bytes_of(Role.SLACK)
        roles = (Role.PARAMETERS, Role.OPTIMIZER_STATE, Role.ACTIVATIONS)
        ratios = [peak / real.total_bytes]
        ratios += [simulated.bytes_of(role) / real.bytes_of(role) for role in roles]
        cells = " | ".join(f"{ratio - 1:+.2%}" for ratio in ratios)
        print(f"| {model} | {real.total_bytes / 2**20:.1f} | {cells} |")


def _simulated(step: TrainingStep) -> Peak:
    """Return the peak of a step that was traced with the kernels of a CPU."""
    attribution = Attribution()
    options = TraceOptions(
        compute_capability=(8, 0),
        kernels=Kernels(compute_capability=(8, 0), allows_tf32=False, torch_release=(2, 8)),
        uses_foreach=False,
        cudnn_benchmark=False,
    )
    replayed = replay(
        trace(step, options, watcher=attribution).schedule,
        BATCH_SIZE,
        purpose=attribution.purpose,
        settings=AllocatorSettings(block_order=BlockOrder.ADDRESS),
    )
    assert isinstance(replayed, Replay)
    return peak_of(replayed.blocks, replayed.timeline)


if __name__ == "__main__":
    main()
