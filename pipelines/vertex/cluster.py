"""The cluster configuration of a compiled pipeline: machines, images and the environment of its steps."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from components import variables
from pipelines.vertex import accelerators
from pipelines.vertex.accelerators import Accelerator, Build
from pipelines.vertex.images import Images
from trainer.hardware import plugin_environment

LONGEST_HOURS = 168.0
"""The longest timeout of a custom job: 7 days, Vertex AI's default. Its documentation names no longer timeout."""
_LIBTPU = "/opt/sogclr/lib/python3.11/site-packages/libtpu/libtpu.so"
"""Path of the TPU library in the TPU image. The Dockerfile installs it there."""


@dataclass(frozen=True)
class Cluster:
    """Where and how a compiled pipeline runs. No field changes the results of a run."""

    images: Images
    accelerator: Accelerator | None = None
    """The machine of pretraining. None for plain containers, which run on any Kubeflow Pipelines cluster."""
    eval_accelerator: Accelerator = field(default_factory=lambda: accelerators.get("cpu"))
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of every step. The compiled YAML shows them, so none may be a secret."""
    beam_args: tuple[str, ...] = ()
    """Beam's own options; empty to convert in the step's own container."""
    timeout_hours: float = LONGEST_HOURS
    retries: int = 3
    """How often a step is retried after it failed or lost its machine."""
    spot: bool = False
    disk_gb: int = 200
    service_account: str = ""
    """The service account that all steps run as; empty for the account of the pipeline."""
    network: str = ""
    encryption_key: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    caching: bool = True

    @property
    def builds(self) -> tuple[Build, ...]:
        """Returns the builds of TensorFlow whose images this cluster uses."""
        used: list[Build] = ["cpu"]
        if self.accelerator:
            used += [self.eval_accelerator.build, self.accelerator.build]
        return tuple(dict.fromkeys(used))

    def accelerator_of(self, component: str) -> Accelerator | None:
        """Returns the machine of a component's custom job, or None for a component that runs in a plain container."""
        if self.accelerator is None:
            return None
        return {"pretrain": self.accelerator, "linear-eval": self.eval_accelerator}.get(component)

    def image_of(self, component: str) -> str:
        accelerator = self.accelerator_of(component)
        return self.images.reference(accelerator.build if accelerator else "cpu")

    def environment_of(self, component: str) -> dict[str, str]:
        environment = {**self.environment, variables.IMAGE: self.image_of(component)}
        if accelerator := self.accelerator_of(component):
            environment[variables.ACCELERATOR] = f"{accelerator.name} {accelerator.build} {accelerator.replicas}"
            if accelerator.build == "tpu":
                environment |= plugin_environment(_LIBTPU)
        return environment

    @property
    def mlflow(self) -> str:
        """Returns a description of the MLflow server that the steps record to."""
        uri, secret = self.environment.get("MLFLOW_TRACKING_URI", ""), self.environment.get(variables.SECRET, "")
        return (
            f"{uri}, {f'credentials from {secret}' if secret else 'without credentials'}" if uri else "nowhere yet: --mlflow-uri"
        )


def base_output_directory(pipeline_root: str) -> str:
    """Returns the folder that custom jobs write under. All jobs of a pipeline root share it, so later jobs find checkpoints."""
    return f"{pipeline_root.rstrip('/')}/custom-jobs"
