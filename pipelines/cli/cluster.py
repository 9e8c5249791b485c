"""The options of a cluster: machines and images, Dataflow, MLflow; and the cluster that they describe."""

import argparse
import os
from argparse import Namespace
from dataclasses import dataclass, replace

from components import variables
from pipelines.cli.formats import check_options, parse_labels
from pipelines.cli.options import add_eval_accelerator, add_limits
from pipelines.code import git_commit, uncommitted
from pipelines.vertex import accelerators
from pipelines.vertex.cluster import LONGEST_HOURS, Cluster
from pipelines.vertex.images import Images
from pipelines.vertex.jobs import Place
from trainer.shared.errors import UserError


def add_cluster(one: argparse.ArgumentParser, what: str, required: bool) -> None:
    group = one.add_argument_group("machines and images")
    group.add_argument("--accelerator", metavar="NAME", required=required, help=what)
    add_eval_accelerator(group)
    group.add_argument("--force-accelerator", action="store_true", help="use a machine that sogclr accelerators lists as refused")
    group.add_argument("--pipeline-root", default="", metavar="gs://...", required=required, help="folder of all that jobs write")
    group.add_argument(
        "--images",
        default="",
        metavar="REPOSITORY",
        help="where make images pushed to (default: REGION-docker.pkg.dev/PROJECT/sogclr)",
    )
    group.add_argument("--tag", default="", metavar="TAG", help="of the images (default: the code's commit)")
    group.add_argument("--spot", action="store_true", help="spot machines: cheaper, and taken away at times")
    add_limits(group)
    group.add_argument("--retries", type=int, default=3, metavar="N", help="attempts after the first, of each step (default: 3)")
    group.add_argument(
        "--service-account",
        default="",
        metavar="EMAIL",
        help="account that all steps run as (default: the project's default service account of Compute Engine)",
    )
    group.add_argument("--network", default="", metavar="NAME", help="VPC network that the steps are peered with")
    group.add_argument("--encryption-key", default="", metavar="NAME", help="Cloud KMS key of all that the job makes")
    group.add_argument("--label", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="label of job and machines")
    group.add_argument("--no-cache", action="store_true", help="run every step, whatever ran before")
    flow = one.add_argument_group("Dataflow, which runs build-tfrecords")
    flow.add_argument("--no-dataflow", action="store_true", help="convert in the step's own container instead")
    flow.add_argument("--dataflow-region", default="", metavar="R", help="(default: --region)")
    flow.add_argument("--dataflow-workers", type=int, default=16, metavar="N", help="at most (default: 16)")
    flow.add_argument("--dataflow-machine", default="n2-standard-4", metavar="TYPE", help="(default: n2-standard-4)")
    flow.add_argument(
        "--dataflow-arg", action="append", default=[], metavar="=--OPTION=VALUE", help="any other option of Beam or Dataflow"
    )
    mlflow = one.add_argument_group("MLflow, where the steps record what they do")
    mlflow.add_argument(
        "--mlflow-uri", default="", metavar="URL", help="server that the steps can reach (default: MLFLOW_TRACKING_URI)"
    )
    mlflow.add_argument(
        "--mlflow-secret",
        default="",
        metavar="NAME",
        help="projects/P/secrets/S/versions/V of Secret Manager: a token, or USER:PASSWORD",
    )
    mlflow.add_argument("--experiment", default="", metavar="NAME", help="(default: MLFLOW_EXPERIMENT_NAME, or sogclr)")


@dataclass(frozen=True)
class Dataflow:
    """What Dataflow runs build-tfrecords on."""

    region: str
    """Empty for the region of the job."""
    workers: int
    """At most."""
    machine: str
    more: tuple[str, ...]
    """Any other options of Beam or Dataflow."""


@dataclass(frozen=True)
class ClusterOptions:
    """A cluster, as far as it is known before the job has a place."""

    cluster: Cluster
    """Its images have no repository where none is named."""
    dataflow: Dataflow | None
    """None to convert in the step's own container."""

    def at(self, place: Place, pipeline_root: str) -> Cluster:
        """Returns the cluster of a job in `place` that writes to `pipeline_root`; both may be empty."""
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
    """Returns what the options say of machines and images. Raises UserError for what is not written as it must be."""
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
        raise UserError("sources differ from the commit, so its images lack something: commit, or name the images with --tag")
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
    flow = Dataflow(args.dataflow_region, args.dataflow_workers, args.dataflow_machine, tuple(args.dataflow_arg))
    return ClusterOptions(cluster, None if args.no_dataflow else flow)


def _check_machines(args: Namespace) -> None:
    """Raises UserError if a custom job cannot have the machine that an option names."""
    machines = {"--accelerator": args.accelerator, "--eval-accelerator": args.eval_accelerator} if args.accelerator else {}
    for option, name in machines.items():
        if name:
            accelerators.check_usable(accelerators.get(name), option, spot=args.spot, force=args.force_accelerator)


def _check_numbers(args: Namespace) -> None:
    for name, value in (("--timeout-hours", args.timeout_hours), ("--dataflow-workers", args.dataflow_workers)):
        if not value > 0:
            raise UserError(f"{name} {value:g} makes no sense: it must be above 0")
    if args.timeout_hours > LONGEST_HOURS:
        raise UserError(
            f"--timeout-hours {args.timeout_hours:g} is more than {LONGEST_HOURS:g}: Google documents no custom job of more "
            "than 7 days; a job that is submitted again goes on from the newest checkpoint"
        )
    if args.retries < 0 or args.disk_gb < 100:
        raise UserError("--retries must be 0 or more, --disk-gb at least 100")


def _mlflow_environment(args: Namespace) -> dict[str, str]:
    """Returns the variables that tell the steps where MLflow is: of the options, else of this environment."""
    uri = args.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    # A store in a file of this machine is none that the steps can reach.
    uri = uri if args.mlflow_uri or uri.startswith("http") else ""
    check_options({"--mlflow-uri": uri, "--mlflow-secret": args.mlflow_secret})
    environment = {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_EXPERIMENT_NAME": args.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", ""),
        variables.SECRET: args.mlflow_secret,
    }
    return {name: value for name, value in environment.items() if value}
