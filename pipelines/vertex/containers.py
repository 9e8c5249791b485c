"""The start commands of a compiled pipeline's containers: KFP's command and Google's launcher of custom jobs, both adapted."""

from collections.abc import Sequence

_TRAP = """\
child= told=
trap 'told=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || :' TERM INT
"""
_WAIT = """\
child=$!
[ -z "$told" ] || kill -TERM "$child" 2>/dev/null || :
code=
while :; do
    told=
    wait "$child" && now=0 || now=$?
    [ "$now" = 127 ] && [ -n "$code" ] || code=$now
    [ -n "$told" ] || break
done
exit "$code"
"""

_LAUNCHER = "google_cloud_pipeline_components.container.v1.custom_job.launcher"
_LAUNCH = f"""\
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
import {_LAUNCHER} as launcher
from google.cloud.aiplatform_v1.types import JobState
from google_cloud_pipeline_components.container.v1.custom_job import remote_runner
from google_cloud_pipeline_components.container.v1.gcp_launcher import job_remote_runner

runner = job_remote_runner.JobRemoteRunner
of_earlier_attempt, create = runner.check_if_job_exists, runner.create_job

def unless_failed(self):
    name = of_earlier_attempt(self)
    if name and remote_runner.get_custom_job_with_client(self.job_client, name).state == JobState.JOB_STATE_FAILED:
        return None
    return name

def unless_told_to_end(self, *arguments):
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    name = create(self, *arguments)
    def cancel(*_):
        self.job_client.cancel_custom_job(name=name)
        sys.exit(143)
    signal.signal(signal.SIGTERM, cancel)
    if told:
        cancel()
    return name

runner.check_if_job_exists, runner.create_job = unless_failed, unless_told_to_end
launcher.main(sys.argv[1:])
"""


def with_init(command: Sequence[str]) -> list[str]:
    """Returns KFP's command with its shell as an init: it forwards SIGTERM to Python and exits with Python's status.

    The shell is PID 1 of the container. The kernel drops a SIGTERM to PID 1 if PID 1 has no handler for it. So Python as PID 1
    would ignore SIGTERM until it installs a handler, after seconds of imports or never; and KFP's shell forwards no signals. As
    a child, a step without a handler ends at once. SIGINT is forwarded as SIGTERM, because a shell's background child ignores
    SIGINT.

    `wait` returns early at each signal, with a status that is not the child's, so it is repeated until no signal interrupts it.
    It returns 127 if an earlier call has already returned the child's status.
    """
    start = "_KFP_RUNTIME=true python3 -m"
    assert sum(start in part for part in command) == 1, "KFP starts components in another way than 2.17 does"
    checked = '[ -z "$told" ] || exit 143\n'
    return [_TRAP + part.replace(start, checked + start).rstrip() + " &\n" + _WAIT if start in part else part for part in command]


def with_one_job_an_attempt(command: Sequence[str]) -> list[str]:
    """Returns the command of Google's launcher, changed so that a retry makes a new custom job and no job is left behind.

    The launcher writes the job's name to its output `gcp_resources`. An attempt that finds a name there waits for that job, so a
    restarted launcher finds its job again. But if that job has failed, the retry would fail at once for the same reason, without
    a new job. It is not documented whether Vertex AI keeps the output from one attempt to the next; the command works either way.

    Google's launcher handles SIGTERM only once it waits for its job. Before that, as PID 1, it would ignore the signal and
    create a job that nobody ends.

    The command runs in Google's image, which has the same version of the library as this compiler.
    """
    assert list(command) == ["python3", "-u", "-m", _LAUNCHER], "Google starts its launcher in another way than 2.22 does"
    return ["python3", "-u", "-c", _LAUNCH]
