"""Estimates of a job's memory and time before it is sent. They compile nothing; `sogclr plan` does."""

import os
from collections.abc import Collection

from pipelines.cli.options import Experiment
from pipelines.cli.store import absolute
from pipelines.code import program_version
from pipelines.plan.estimate import Estimate, assumptions, cached_estimate
from pipelines.plan.evaluation import EvaluationEstimate, Limits, make_evaluation_estimate
from pipelines.vertex.accelerators import Accelerator
from pipelines.vertex.cluster import Cluster
from pipelines.vertex.preflight import Finding


def pretraining(experiment: Experiment, accelerator: Accelerator, root: str) -> Estimate | None:
    """Returns the estimate of pretraining from an earlier `sogclr plan` with the same root, or None if there was none."""
    version = program_version("trainer/lowering.py")
    return cached_estimate(experiment.preset, experiment.config, accelerator, cache=absolute(root) / "plans", version=version)


def evaluation(
    experiment: Experiment, cluster: Cluster, region: str, root: str, option: str = "--eval-accelerator"
) -> EvaluationEstimate:
    """Returns the estimate of the evaluation. `option` is the command-line option that selects its machine."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # Protocols may import TensorFlow, which logs much at start.
    machine = cluster.eval_accelerator
    return make_evaluation_estimate(
        experiment.config,
        machine,
        assumptions(experiment.preset, machine, data=experiment.config.data),
        Limits(cluster.disk_gb, cluster.timeout_hours, option, region),
        python=None,
        cache=absolute(root) / "plans",
        version=program_version("eval/measure/programs.py"),
    )


def memory_findings(experiment: Experiment, cluster: Cluster, root: str, skip: Collection[str]) -> list[Finding]:
    """Returns a finding on whether the training step fits into the TPU. Empty for other machines, or if the check is skipped."""
    accelerator = cluster.accelerator
    if accelerator is None or accelerator.build != "tpu" or "memory" in skip:
        return []
    estimate = pretraining(experiment, accelerator, root)
    if estimate is None:
        text = f"whether the step fits into {accelerator.name} is not known; sogclr plan with the same preset and settings says"
        return [Finding("memory", True, text, looked=False)]
    return [Finding("memory", estimate.values["fits"], estimate.memory)]


def evaluation_finding(
    experiment: Experiment, cluster: Cluster, region: str, root: str, option: str = "--eval-accelerator"
) -> Finding:
    """Returns a finding on whether the evaluation can end on its machine, which `option` selects."""
    estimate = evaluation(experiment, cluster, region, root, option)
    return Finding("evaluation", not estimate.problems, "; ".join(estimate.problems) or estimate.summary)
