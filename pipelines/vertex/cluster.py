"""Where and how a compiled pipeline runs: its machines, its images and the environment of its steps."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from components import variables
from pipelines.vertex import accelerators
from pipelines.vertex.accelerators import Accelerator, Build
from pipelines.vertex.images import Images
from trainer.hardware import plugin_environment

LONGEST_HOURS = 168.0
"""The longest timeout of a custom job. 7 days is Vertex AI's default, and its pages name no longer one."""
_LIBTPU = "/opt/sogclr/lib/python3.11/site-packages/libtpu/libtpu.so"
"""In the TPU image, as the Dockerfile installs it."""


@dataclass(frozen=True)
class Cluster:
    """Where and how a compiled pipeline runs. Nothing of it changes a result."""

    images: Images
    accelerator: Accelerator | None = None
    """What pretraining runs on; None for plain containers, as any Kubeflow Pipelines runs them."""
    eval_accelerator: Accelerator = field(default_factory=lambda: accelerators.get("cpu"))
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of every step. No secrets: it is in the YAML."""
    beam_args: tuple[str, ...] = ()
    timeout_hours: float = LONGEST_HOURS
    retries: int = 3
    """How often a step that fails, or whose machine is lost, is started again."""
    spot: bool = False
    disk_gb: int = 200
    service_account: str = ""
    """Of all steps; empty for the account that the pipeline runs as."""
    network: str = ""
    encryption_key: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    caching: bool = True

    @property
    def builds(self) -> tuple[Build, ...]:
        """Returns which images it needs."""
        used: list[Build] = ["cpu"]
        if self.accelerator:
            used += [self.eval_accelerator.build, self.accelerator.build]
        return tuple(dict.fromkeys(used))

    def accelerator_of(self, component: str) -> Accelerator | None:
        """Returns what a component has a custom job on, or None for one that is a plain container."""
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
