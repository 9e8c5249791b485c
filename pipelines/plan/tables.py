"""Tables of an estimate for people. A row has a title, a figure and its source."""

from pipelines.plan.estimate import Estimate
from pipelines.plan.evaluation import EvaluationEstimate, ProtocolEstimate, time_and_price


def pretraining(estimate: Estimate) -> list[tuple[str, str, str]]:
    """Returns the table of pretraining."""
    rows: list[tuple[str, str, str]] = []

    def row(title: str, text: str, name: str) -> None:
        rows.append((title, text, estimate.sources[name]))

    v = estimate.values
    row(
        "steps",
        f"{v['steps']:,} of {v['batch_per_replica']} images a replica, {v['epochs']} epochs of {v['num_images']:,}",
        "steps",
    )
    row("checkpoint", f"{v['checkpoint_bytes'] / 1e6:,.0f} MB", "checkpoint_bytes")
    row("exchanged a step", f"{v['collectives_bytes'] / 1e6:,.1f} MB in {v['collectives']} collectives", "collectives_bytes")
    if "fits" in v:
        row(
            "memory a device",
            f"{v['used_bytes'] / 1e9:.1f} of {v['memory_bytes'] / 1e9:.1f} GB: {'fits' if v['fits'] else 'does NOT fit'}",
            "fits",
        )
        row("largest batch", f"{v['largest_batch']:,}, or more where the compiler saves temporaries", "largest_batch")
    if "step_seconds" not in v:
        return rows
    row("  arguments", f"{v['arguments_bytes'] / 1e6:,.0f} MB", "arguments_bytes")
    row("  temporaries", f"{v['temp_bytes'] / 1e6:,.0f} MB, {v['temp_bytes_per_sample'] / 1e6:.1f} a sample", "temp_bytes")
    row(
        "memory traffic",
        f"{v['bytes_accessed'] / 1e9:.1f} GB a step, {v['bytes_per_sample'] / 1e6:.0f} MB a sample",
        "bytes_accessed",
    )
    row("FLOPs", f"{v['flops'] / 1e12:.2f} T a step, {v['flops_per_sample'] / 1e9:.1f} G a sample", "flops")
    for name in ("compute", "memory", "interconnect", "input"):
        row(f"time, {name}", f"{1e3 * v[f'{name}_seconds']:.1f} ms", f"{name}_seconds")
    row("step", f"{1e3 * v['step_seconds']:.1f} ms at best, bound by {v['bound_by']}", "step_seconds")
    row("samples", f"{v['samples_per_second']:,.0f} a second", "samples_per_second")
    starved = ": it would starve" if v["input_starved"] else ""
    needed = f"{v['host_images_per_second_needed']:,.0f} images/s a host"
    row("host", f"{needed}, {v['host_cores_needed']} of its {v['host_cores']} virtual CPUs{starved}", "host_cores_needed")
    row("whole run", f"{v['total_hours']:,.1f} hours", "total_hours")
    row("price", f"${v['price']:,.0f} at ${v['dollars_per_device_hour']:.2f} a device and hour", "price")
    return rows


def evaluation(estimate: EvaluationEstimate) -> list[tuple[str, str, str]]:
    """Returns the table of the evaluation."""
    v, s = estimate.values, estimate.sources
    rows: list[tuple[str, str, str]] = [
        (
            name,
            f"{_images(one)}{time_and_price(estimate.accelerator, one.hours, one.price)}, bound by {one.bound_by}",
            s["protocols"],
        )
        for name, one in estimate.protocols.items()
    ]
    rows.append(("whole evaluation", time_and_price(estimate.accelerator, v["total_hours"], v["price"]), s["total_hours"]))
    rows.append(
        (
            "forward pass",
            f"{v['forward_flops'] / 1e9:.1f} G FLOPs, {v['forward_bytes'] / 1e6:.0f} MB an image; {v['images_at_once']} at once",
            s["forward_flops"],
        )
    )
    host = "not known" if v["host_memory_bytes"] is None else f"{v['host_memory_bytes'] / 1e9:,.0f}"
    rows.append(("memory of a host", f"{v['memory_bytes'] / 1e9:.1f} of {host} GB", s["memory_bytes"]))
    rows.append(("disk", f"{v['disk_bytes'] / 1e9:.1f} of {v['disk_limit_bytes'] / 1e9:,.0f} GB", s["disk_bytes"]))
    rows.append(
        (
            "input",
            f"{v['images_per_second_a_core']:,.0f} images/s a virtual CPU, {v['host_cores']} of them in a host",
            s["images_per_second_a_core"],
        )
    )
    return rows


def _images(one: ProtocolEstimate) -> str:
    forward = f"{one.forward_images:,} forward, " if one.forward_images else ""
    return forward + (f"{one.trained_images:,} trained, " if one.trained_images else "")
