"""The options for machines, images, Dataflow and MLflow, and the cluster configuration made from them."""

import argparse
import os
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, replace

from components import variables
from pipelines.cli.formats import check_options, parse_labels
from pipelines.cli.options import add_eval_accelerator, add_limits
from pipelines.code import git_commit, uncommitted
from pipelines.vertex import accelerators
from pipelines.vertex.cluster import LONGEST_HOURS, Cluster
from pipelines.vertex.images import Images
from pipelines.vertex.jobs import Place
from trainer.shared.data import DataSettings
from trainer.shared.errors import UserError
from trainer.shared.settings import fields_of


def add_cluster(one: argparse.ArgumentParser, what: str, required: bool) -> None:
    group = one.add_argument_group("machines and images")
    group.add_argument("--accelerator", metavar="NAME", required=required, help=what)
    add_eval_accelerator(group)
    group.add_argument("--force-accelerator", action="store_true", help="use a machine that sogclr accelerators lists as refused")
    group.add_argument("--pipeline-root", default="", metavar="gs://...", required=required, help="folder for all files of jobs")
    group.add_argument(
        "--images",
        default="",
        metavar="REPOSITORY",
        help="repository that make images pushed to (default: REGION-docker.pkg.dev/PROJECT/sogclr)",
    )
    group.add_argument("--tag", default="", metavar="TAG", help="tag of the images (default: the commit of the code)")
    group.add_argument("--spot", action="store_true", help="use spot machines, which cost less but can be preempted")
    add_limits(group)
    group.add_argument("--retries", type=int, default=3, metavar="N", help="retries of each step (default: 3)")
    group.add_argument(
        "--service-account",
        default="",
        metavar="EMAIL",
        help="account that all steps run as (default: the project's default service account of Compute Engine)",
    )
    group.add_argument("--network", default="", metavar="NAME", help="VPC network that the steps are peered with")
    group.add_argument("--encryption-key", default="", metavar="NAME", help="Cloud KMS key that encrypts what the job writes")
    group.add_argument("--label", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="label of job and machines")
    group.add_argument("--no-cache", action="store_true", help="run every step; reuse none from the cache")
    flow = one.add_argument_group("Dataflow, which runs build-tfrecords")
    flow.add_argument("--no-dataflow", action="store_true", help="convert in the step's own container instead")
    flow.add_argument("--dataflow-region", default="", metavar="R", help="region of the Dataflow job (default: --region)")
    flow.add_argument("--dataflow-workers", type=int, default=16, metavar="N", help="highest number of workers (default: 16)")
    flow.add_argument(
        "--dataflow-machine", default="n2-standard-4", metavar="TYPE", help="machine type of workers (default: n2-standard-4)"
    )
    flow.add_argument(
        "--dataflow-arg", action="append", default=[], metavar="=--OPTION=VALUE", help="any other option of Beam or Dataflow"
    )
    mlflow = one.add_argument_group("MLflow, which records the steps")
    mlflow.add_argument(
        "--mlflow-uri", default="", metavar="URL", help="server that the steps can reach (default: MLFLOW_TRACKING_URI)"
    )
    mlflow.add_argument(
        "--mlflow-secret",
        default="",
        metavar="NAME",
        help="Secret Manager's projects/P/secrets/S/versions/V with a token or USER:PASSWORD",
    )
    mlflow.add_argument(
        "--experiment", default="", metavar="NAME", help="experiment in MLflow (default: MLFLOW_EXPERIMENT_NAME, or sogclr)"
    )


@dataclass(frozen=True)
class Dataflow:
    """The Dataflow settings of build-tfrecords."""

    region: str
    """Region of the Dataflow job; empty for the region of the pipeline job."""
    workers: int
    """Highest number of workers."""
    machine: str
    more: tuple[str, ...]
    """Other options of Beam or Dataflow."""


@dataclass(frozen=True)
class ClusterOptions:
    """The cluster options, before the place of the job is known."""

    cluster: Cluster
    """The cluster. Its images have no repository if the user names none."""
    dataflow: Dataflow | None
    """Dataflow settings, or None to convert in the step's own container."""

    def at(self, place: Place, pipeline_root: str) -> Cluster:
        """Returns the cluster for a job in `place` that writes to `pipeline_root`. Both may be empty."""
        known = bool(place.project and place.region)
        images = self.cluster.images
        if known and not images.repository:
            images = replace(images, repository=f"{place.region}-docker.pkg.dev/{place.project}/sogclr")
        environment = {**self.cluster.environment, **({variables.JOB_FOLDER: place.folder} if known else {})}
        flow = self.dataflow if self.cluster.accelerator and known and pipeline_root else None
        beam_args = _beam_args(flow, self.cluster, images, place, pipeline_root) if flow else ()
        return replace(self.cluster, images=images, environment=environment, beam_args=beam_args)


def _beam_args(flow: Dataflow, cluster: Cluster, images: Images, place: Place, pipeline_root: str) -> tuple[str, ...]:
    """Returns Beam's options for Dataflow."""
    root = f"{pipeline_root.rstrip('/')}/dataflow"
    return (
        "--runner=DataflowRunner",
        f"--project={place.project}",
        f"--region={flow.region or place.region}",
        f"--temp_location={root}/temp",
        f"--staging_location={root}/staging",
        f"--sdk_container_image={images.reference('cpu')}",
        "--sdk_location=container",
        f"--max_num_workers={flow.workers}",
        f"--worker_machine_type={flow.machine}",
        *([f"--service_account_email={cluster.service_account}"] if cluster.service_account else []),
        *([f"--dataflow_kms_key={cluster.encryption_key}"] if cluster.encryption_key else []),
        *(f"--labels={key}={value}" for key, value in cluster.labels.items()),
        *flow.more,
    )


def read_cluster(args: Namespace) -> ClusterOptions:
    """Returns the cluster options. Raises UserError for an invalid value."""
    _check_machines(args)
    _check_numbers(args)
    environment = _mlflow_environment(args)
    check_options(
        {
            "--service-account": args.service_account,
            "--network": args.network,
            "--encryption-key": args.encryption_key,
        }
    )
    if args.accelerator and not args.tag and uncommitted():
        raise UserError("the sources have uncommitted changes, which no image has: commit them, or name the images with --tag")
    cluster = Cluster(
        images=Images(args.images.rstrip("/"), args.tag or git_commit()[:12]),
        accelerator=accelerators.get(args.accelerator) if args.accelerator else None,
        eval_accelerator=accelerators.get(args.eval_accelerator or args.accelerator or "cpu"),
        environment=environment,
        timeout_hours=args.timeout_hours,
        retries=args.retries,
        spot=args.spot,
        disk_gb=args.disk_gb,
        service_account=args.service_account,
        network=args.network,
        encryption_key=args.encryption_key,
        labels=parse_labels(args.label),
        caching=not args.no_cache,
    )
    _check_beam(args.dataflow_arg)
    flow = Dataflow(args.dataflow_region, args.dataflow_workers, args.dataflow_machine, tuple(args.dataflow_arg))
    return ClusterOptions(cluster, None if args.no_dataflow else flow)


def _check_beam(arguments: Iterable[str]) -> None:
    """Raises UserError for a setting of the conversion among Beam's options, where it could contradict the setting itself."""
    known = {one.name: one.key for one in fields_of(DataSettings)}
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0].replace("-", "_")
        if name in known:
            raise UserError(f"--dataflow-arg={argument} is not Beam's: say --set {known[name]}=VALUE")


def _check_machines(args: Namespace) -> None:
    """Raises UserError if a custom job cannot use a machine that an option names."""
    machines = {"--accelerator": args.accelerator, "--eval-accelerator": args.eval_accelerator} if args.accelerator else {}
    for option, name in machines.items():
        if name:
            accelerators.check_usable(accelerators.get(name), option, spot=args.spot, force=args.force_accelerator)


def _check_numbers(args: Namespace) -> None:
    for name, value in (("--timeout-hours", args.timeout_hours), ("--dataflow-workers", args.dataflow_workers)):
        if not value > 0:
            raise UserError(f"{name} {value:g} is not valid: it must be above 0")
    if args.timeout_hours > LONGEST_HOURS:
        raise UserError(
            f"--timeout-hours {args.timeout_hours:g} is more than {LONGEST_HOURS:g}: Google documents no custom job of more "
            "than 7 days; a job that is submitted again resumes from the newest checkpoint"
        )
    if args.retries < 0 or args.disk_gb < 100:
        raise UserError("--retries must be 0 or more, --disk-gb at least 100")


def _mlflow_environment(args: Namespace) -> dict[str, str]:
    """Returns the environment variables for MLflow in the steps, from the options or else from this process's environment."""
    uri = args.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    # The steps cannot reach a store in a file on this machine.
    uri = uri if args.mlflow_uri or uri.startswith("http") else ""
    check_options({"--mlflow-uri": uri, "--mlflow-secret": args.mlflow_secret})
    environment = {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_EXPERIMENT_NAME": args.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", ""),
        variables.SECRET: args.mlflow_secret,
    }
    return {name: value for name, value in environment.items() if value}
