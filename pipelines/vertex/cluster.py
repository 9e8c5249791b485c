"""Where and how a compiled pipeline runs: its machines, its images and the environment of its steps."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from components import variables
from pipelines.vertex import accelerators
from pipelines.vertex.accelerators import Accelerator, Build
from pipelines.vertex.images import Images
from trainer.hardware import plugin_environment

LONGEST_HOURS = 168.0
"""The longest timeout of a custom job: 7 days, Vertex AI's default. Its pages name no longer timeout."""
_LIBTPU = "/opt/sogclr/lib/python3.11/site-packages/libtpu/libtpu.so"
"""The TPU's library in the TPU image, where the Dockerfile installs it."""


@dataclass(frozen=True)
class Cluster:
    """Where and how a compiled pipeline runs. Its values change no result."""

    images: Images
    accelerator: Accelerator | None = None
    """The machine of pretraining. None for plain containers, which any Kubeflow Pipelines runs."""
    eval_accelerator: Accelerator = field(default_factory=lambda: accelerators.get("cpu"))
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of every step. They stand in the YAML, so none of them is a secret."""
    beam_args: tuple[str, ...] = ()
    """Beam's own options; none to convert in the step's own container."""
    timeout_hours: float = LONGEST_HOURS
    retries: int = 3
    """How often a step starts again after it failed or lost its machine."""
    spot: bool = False
    disk_gb: int = 200
    service_account: str = ""
    """The account that all steps run as; empty for the account of the pipeline."""
    network: str = ""
    encryption_key: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    caching: bool = True

    @property
    def builds(self) -> tuple[Build, ...]:
        """Returns the builds of TensorFlow whose images it needs."""
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
        """Returns in words where the steps record what they do."""
        uri, secret = self.environment.get("MLFLOW_TRACKING_URI", ""), self.environment.get(variables.SECRET, "")
        return (
            f"{uri}, {f'credentials from {secret}' if secret else 'without credentials'}" if uri else "nowhere yet: --mlflow-uri"
        )


def base_output_directory(pipeline_root: str) -> str:
    """Returns the folder that custom jobs write under: the same for every job of a root, so that a later one finds it."""
    return f"{pipeline_root.rstrip('/')}/custom-jobs"
