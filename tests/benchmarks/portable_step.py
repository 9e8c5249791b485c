"""The train step, or the evaluation's forward pass, as a program on another machine: how fast a GPU runs it.

    python tests/benchmarks/portable_step.py write --preset NAME [--set key=value ...] [--forward N] --output DIR    here
    PYTHON tests/benchmarks/portable_step.py run DIR ... [--repeat N]                                                there

`write` leaves the step of one replica with the whole batch, or with --forward the forward pass of N images, in DIR: the program
that `sogclr plan` compiles, and the shapes of what it takes. `run` needs an interpreter with JAX, and of this project the
sources alone; it runs each program on the first device that JAX has, a GPU or a CPU. The arguments are drawn, for speed does
not hang on their values: that the results are TensorFlow's is tested on real ones (`tests/test_lowering.py`).

    for preset in sogclr_imagenet_r50_b512 sogclr_cifar10_r50_b64; do
        python tests/benchmarks/portable_step.py write --preset $preset --set global_batch_size=128 --output steps/$preset
    done
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

PROJECT = Path(__file__).absolute().parents[2]
PROGRAM, ABOUT = "step.hlo", "step.json"
PEAKS = {"H200": 989.4e12, "H100 80GB HBM3": 989.4e12, "A100": 312e12}
"""FLOP/s in bfloat16 of dense matrices, as NVIDIA publishes them in November 2026; by a part of the device's name that no other
device has."""


def write(preset: str, overrides: list[str], output: Path, fuses: bool = True, forward: int = 0) -> None:
    """Leaves a preset's step in a folder, with the operations for a device whose compiler fuses (a TPU), or those for others.

    With `forward`, it is the forward pass of so many images.
    """
    from eval.measure.programs import lower_forward
    from pipelines.plan.estimate import assumptions
    from pipelines.vertex import accelerators
    from trainer.lowering import OneOfMany, lower_step
    from trainer.presets import resolve
    from trainer.state import create_train_state

    config = resolve(preset, overrides)
    sizes = assumptions(preset, accelerators.get("cpu"))
    if forward:
        program = lower_forward(config, forward)
    else:
        one = OneOfMany(1, fuses)
        program = lower_step(config, create_train_state(config, sizes.num_images, sizes.num_classes, one), one)
    output.mkdir(parents=True, exist_ok=True)
    (output / PROGRAM).write_bytes(program.hlo)
    about = {
        "preset": preset,
        "settings": overrides,
        "samples": forward or config.optimizer.global_batch_size,
        "forward": bool(forward),
        "precision": config.encoder.precision,
    }
    (output / ABOUT).write_text(json.dumps({**about, "fuses": fuses, "arguments": program.arguments}, indent=1))


def drawn(arguments: dict[str, tuple[list[int], str]]) -> list[np.ndarray]:
    """Returns an array for each argument: pixels, counts from 0 (image IDs), labels of 0, small positive numbers."""
    random = np.random.default_rng(0)
    arrays = []
    for name, (shape, kind) in arguments.items():
        if kind == "uint8":
            arrays.append(random.integers(0, 256, shape, np.uint8))
        elif kind.startswith("int"):
            arrays.append((np.arange(math.prod(shape)) * (name != "batch/label")).reshape(shape).astype(kind))
        else:
            arrays.append((random.random(shape, np.float32) / 10).astype(kind))
    return arrays


def product_rate(precision: str, size: int, repeat: int) -> float:
    """Returns the FLOP/s of a product of two square matrices on JAX's first device, the best of `repeat`."""
    import jax

    matrix = jax.random.normal(jax.random.key(0), (size, size), precision)
    product = jax.jit(lambda one: one @ one)
    product(matrix).block_until_ready()
    seconds = []
    for _ in range(repeat):
        begun = time.perf_counter()
        product(matrix).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)


def measure(folder: Path, repeat: int) -> dict[str, Any]:
    """Returns what a step took on JAX's first device, the best of `repeat`, beside a matrix product of the same precision."""
    sys.path.insert(0, str(PROJECT / "pipelines" / "plan"))
    import jax
    import program

    about = json.loads((folder / ABOUT).read_text())
    device = jax.devices()[0]
    # Before the step, for its 64-bit integers change JAX's types from there on.
    product = product_rate(about["precision"], 2048 if device.platform == "cpu" else 8192, repeat)
    _, seconds = program.run(program.read(folder / PROGRAM), drawn(about["arguments"]), steps=3, repeat=repeat)
    module = program.xla_client.XlaComputation((folder / PROGRAM).read_bytes()).get_hlo_module()
    # As XLA counts before it optimises: the same on every device. A GPU's client does not count.
    flops = program.xla_client._xla.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)["flops"]
    peak = next((rate for name, rate in PEAKS.items() if name in device.device_kind), None)
    return {
        **{name: about[name] for name in ("preset", "settings", "forward", "samples", "precision", "fuses")},
        "device": device.device_kind,
        "jax": jax.__version__,
        "step_seconds": seconds,
        "samples_per_second": about["samples"] / seconds,
        "flops": flops,
        "flops_per_second": flops / seconds,
        "product_flops_per_second": product,
        "share_of_product": flops / seconds / product,
        "share_of_bfloat16_peak": peak and flops / seconds / peak,
    }


def report(folder: Path, repeat: int) -> None:
    """Prints what `measure` finds: one line for a reader on stderr, and one line of JSON."""
    found = measure(folder, repeat)
    peak = found["share_of_bfloat16_peak"]
    print(
        f"{found['preset']} {' '.join(found['settings'])} on {found['device']}: {1e3 * found['step_seconds']:.1f} ms a step, "
        f"{found['samples_per_second']:,.0f} samples/s, {found['flops_per_second'] / 1e12:.2f} TFLOP/s, "
        f"{found['share_of_product']:.1%} of a matrix product's"
        + (f", {peak:.1%} of the device's peak in bfloat16" if peak else ""),
        file=sys.stderr,
    )
    print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("write")
    one.add_argument("--preset", required=True)
    one.add_argument("--set", nargs="+", default=[], metavar="key=value")
    one.add_argument("--output", type=Path, required=True)
    one.add_argument("--forward", type=int, default=0, metavar="N", help="the forward pass of N images in place of the step")
    one.add_argument("--for-gpu", action="store_true", help="with the operations that the trainer takes on a GPU, not on a TPU")
    one = commands.add_parser("run")
    one.add_argument("folders", type=Path, nargs="+", help="what write left")
    one.add_argument("--repeat", type=int, default=20)
    args = parser.parse_args()
    if args.command == "write":
        write(args.preset, args.set, args.output, fuses=not args.for_gpu, forward=args.forward)
        return
    for folder in args.folders:
        report(folder, args.repeat)


if __name__ == "__main__":
    main()
