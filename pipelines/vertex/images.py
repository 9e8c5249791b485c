"""The container images of a pipeline: their names, and their digests in a registry.

`make images` builds them: `sogclr-cpu`, `sogclr-gpu` and `sogclr-tpu`, each tagged with the commit of the code in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pipelines.vertex.accelerators import Build
from trainer.shared.errors import UserError

_MANIFESTS = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
_SECONDS = 20


@dataclass(frozen=True)
class Images:
    """One image for each build of TensorFlow, all of the same code."""

    repository: str
    """For example REGION-docker.pkg.dev/PROJECT/REPOSITORY; empty for images on this machine."""
    tag: str
    digests: Mapping[Build, str] = field(default_factory=dict)
    """Known digests, by build."""

    def __post_init__(self) -> None:
        if not self.tag:
            raise UserError("the commit of the code is not known: name the images' tag with --tag")
        if self.tag == "latest":
            raise UserError("--tag latest can mean another image tomorrow: name a commit, as make images does")

    def name(self, build: Build) -> str:
        return f"{self.repository}/sogclr-{build}".removeprefix("/")

    def reference(self, build: Build) -> str:
        """Returns the reference of an image: by digest if that is known, else by tag."""
        digest = self.digests.get(build)
        return f"{self.name(build)}@{digest}" if digest else f"{self.name(build)}:{self.tag}"

    def resolved(self, token: str, builds: tuple[Build, ...]) -> "Images":
        """Returns these images with the registry's digests of `builds`. Raises UserError if the registry lacks one of them."""
        return replace(self, digests={build: _digest(self.name(build), self.tag, token) for build in builds})


def _digest(name: str, tag: str, token: str) -> str:
    import requests

    host, _, path = name.partition("/")
    # Like other registry clients: no TLS for a registry on this machine.
    scheme = "http" if host.split(":")[0] in ("localhost", "127.0.0.1") else "https"
    try:
        answer = requests.head(
            f"{scheme}://{host}/v2/{path}/manifests/{tag}",
            headers={"Accept": _MANIFESTS, **({"Authorization": f"Bearer {token}"} if token else {})},
            timeout=_SECONDS,
        )
    except requests.RequestException as error:
        raise UserError(f"the registry {host} cannot be reached: {type(error).__name__}") from error
    if answer.status_code == 404:
        raise UserError(f"there is no image {name}:{tag}; make images push=yes IMAGES={name.rpartition('/')[0]} makes it")
    if answer.status_code in (401, 403):
        raise UserError(f"{name} is not readable: these credentials need roles/artifactregistry.reader on its repository")
    if not answer.ok or "Docker-Content-Digest" not in answer.headers:
        raise UserError(f"the registry {host} answers {answer.status_code} for {name}:{tag}: try again later")
    return answer.headers["Docker-Content-Digest"]
