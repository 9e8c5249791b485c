"""Compiles or runs a program with XLA. Needs an interpreter with JAX, and none of this project's packages:

    python program.py compile PROGRAM.hlo --topology v5e:2x4 [--chip-config megacore] [--quick] [--listing FILE]
    python program.py run PROGRAM.hlo --arguments ARGUMENTS.npz --results FILE.npz [--steps N] [--repeat N]

Both read a serialized HloModuleProto. `compile` needs no TPU: libtpu's compiler runs on any machine. It prints the memory, FLOPs
and bytes of the compiled program as one JSON object. `run` executes the program `--steps` times on JAX's first device, a CPU or a
GPU. Each execution starts from the state that the previous one returned. `run` writes the results of the last execution, and
prints for each result which argument it updates.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Only libtpu's compiler is used, so it must not look for a TPU, other hosts or a metadata server.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
from jax._src import compiler
from jax._src.interpreters import mlir
from jax._src.lib import xla_client
from jax._src.lib.mlir import ir
from jax.experimental import topologies


def read(path: Path) -> str:
    """Returns the program in a file, a serialized HloModuleProto, as StableHLO text."""
    return text_of(path.read_bytes())


def text_of(serialized: bytes) -> str:
    """Returns the program of a serialized HloModuleProto as StableHLO text."""
    computation = xla_client.XlaComputation(serialized)
    text = xla_client._xla.mlir.xla_computation_to_mlir_module(computation)
    # The importer lacks mhlo.copy, which keeps a value apart from others. An optimization barrier does the same.
    return re.sub(r"\bmhlo\.copy\b", "stablehlo.optimization_barrier", text if isinstance(text, str) else text.decode())


def aliases(text: str) -> dict[int, int]:
    """Returns for each result that updates an argument, by number, the number of that argument."""
    pairs = re.findall(r"parameter_number = (\d+) : i64\}, output_index = array<i64: (\d+)>", text)
    return {int(result): int(argument) for argument, result in pairs}


def compile_for(text: str, topology: str, chip_config: str, quick: bool) -> tuple[Any, float]:
    """Returns the executable of a program for one device of a TPU slice, and the seconds of compilation.

    `quick` optimises little, only to see whether the program compiles.
    """
    more = {"chip_config_name": chip_config} if chip_config else {}
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices[0]
    options = compiler.get_compile_options(
        num_replicas=1, num_partitions=1, device_assignment=np.array([[device.id]]), backend=device.client
    )
    if quick:
        options.executable_build_options.exec_time_optimization_effort = -1.0
        options.executable_build_options.memory_fitting_effort = -1.0
        options.executable_build_options.optimization_level = 1
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        begun = time.perf_counter()
        executable = device.client.compile(module, xla_client.DeviceList((device,)), options)
    return executable, time.perf_counter() - begun


def needs(executable: Any) -> dict[str, float]:
    """Returns the needs of a compiled program: bytes of memory by purpose, and FLOPs and bytes accessed in one execution."""
    memory = executable.get_compiled_memory_stats()
    cost = executable.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return {
        "arguments_bytes": memory.argument_size_in_bytes,
        "results_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
    }


def loaded(text: str) -> tuple[Callable[[list[Any]], list[Any]], dict[int, int]]:
    """Compiles a program for JAX's first device. Returns a function from arguments to results there, and `aliases(text)`.

    The function takes over the arguments that a result updates. JAX has 64-bit integers from here on.
    """
    jax.config.update("jax_enable_x64", True)  # otherwise JAX turns int64 into int32
    device = jax.devices()[0]
    options = compiler.get_compile_options(num_replicas=1, num_partitions=1, backend=device.client)
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        executable = device.client.compile_and_load(module, xla_client.DeviceList((device,)), options)
    return lambda arguments: list(executable.execute(arguments)), aliases(text)


def run(text: str, arguments: list[np.ndarray], steps: int, repeat: int) -> tuple[list[np.ndarray], float]:
    """Returns the results of the last of `steps` executions, and the fastest time of `repeat` more in seconds, 0 without any."""
    execute, next_of = loaded(text)
    held = [jax.device_put(value) for value in arguments]

    def once() -> list[Any]:
        results = execute(held)
        for result, argument in next_of.items():
            held[argument] = results[result]
        jax.block_until_ready(results)
        return results

    results: list[Any] = []
    for _ in range(steps):
        results = once()
    kept = [np.asarray(one) for one in results]
    seconds = []
    for _ in range(repeat):
        begun = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - begun)
    return kept, min(seconds, default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("compile")
    one.add_argument("program", type=Path)
    one.add_argument("--topology", required=True)
    one.add_argument("--chip-config", default="")
    one.add_argument("--quick", action="store_true", help="optimise little, only to see whether the program compiles")
    one.add_argument("--listing", type=Path, help="file to write the compiled program to, with its buffers and fusions")
    one = commands.add_parser("run")
    one.add_argument("program", type=Path)
    one.add_argument("--arguments", type=Path, required=True, help="an .npz of arrays in the order of the program's arguments")
    one.add_argument("--results", type=Path, help="an .npz to write the last execution's results to, as arr_0, arr_1, ...")
    one.add_argument("--steps", type=int, default=1)
    one.add_argument("--repeat", type=int, default=0, help="number of further executions, which are timed")
    args = parser.parse_args()
    text = read(args.program)
    if args.command == "compile":
        try:
            if found := re.search(r"tensor<\?|stablehlo\.bounds", text):
                raise ValueError(f"a shape is known only at run time: {text[found.start() - 120 : found.end() + 40]}")
            executable, seconds = compile_for(text, args.topology, args.chip_config, args.quick)
        except Exception as error:
            print(" ".join(str(error).split())[:2000], file=sys.stderr)
            sys.exit(1)
        if args.listing:
            args.listing.write_text(executable.hlo_modules()[0].to_string())
        print(json.dumps({"compiler": f"libtpu {version('libtpu')}", "compile_seconds": seconds, **needs(executable)}))
        return
    with np.load(args.arguments) as stored:
        arguments = [stored[name] for name in stored.files]
    results, seconds = run(text, arguments, args.steps, args.repeat)
    if args.results:
        np.savez(args.results, *results)
    device = jax.devices()[0]
    said = {"platform": device.platform, "device": device.device_kind, "step_seconds": seconds, "next_of": aliases(text)}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
