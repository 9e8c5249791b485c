"""The script that makes a project ready: it prints what it would do, does that and no more, and can be run again."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from vertex import rehearse

SCRIPT = Path(__file__).parents[1] / "docs" / "vertex-setup.sh"
DOCS = SCRIPT.with_name("vertex.md")
OPTIONS = [
    "--project",
    "my-project",
    "--region",
    "europe-west4",
    "--bucket",
    "b",
    "--user",
    "me@example.com",
    "--raw-bucket",
    "r",
]


@pytest.fixture
def script(tmp_path):
    """Runs the script with a gcloud that only writes down how it was called; nothing is there unless `there`."""
    called = tmp_path / "called"
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f'#!/bin/bash\nprintf "%q " gcloud "$@" >>{called}; echo >>{called}\n[[ $* != *describe* || -n $THERE ]]\n')
    gcloud.chmod(0o755)

    def run(*options, there=False):
        called.write_text("")
        environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "THERE": "yes" if there else ""}
        done = subprocess.run([SCRIPT, *options], env=environ, capture_output=True, text=True)
        return done, [shlex.split(line) for line in called.read_text().splitlines()]

    return run


def commands(text):
    return [shlex.split(line) for line in text.splitlines() if line.startswith("gcloud")]


@pytest.mark.parametrize("more", [[], ["--delete"]])
def test_it_prints_and_does_nothing_unless_told_to(script, more):
    done, called = script(*OPTIONS, *more)
    assert (done.returncode, called) == (0, [])
    assert "# nothing was done: --apply does it" in done.stdout
    planned = commands(done.stdout)
    done, called = script(*OPTIONS, *more, "--apply")
    assert done.returncode == 0
    assert [one for one in called if "describe" not in one] == planned


def test_run_again_it_makes_nothing_twice(script):
    _, called = script(*OPTIONS, "--apply", there=True)
    assert not any("create" in one for one in called)


def test_what_is_missing_is_one_line(script):
    for options, named in (
        (OPTIONS[2:], "--project is missing"),
        ([*OPTIONS, "--aply"], "no option --aply"),
        (["--user"], "value"),
    ):
        done, called = script(*options)
        assert (done.returncode, called, done.stdout) == (2, [], "")
        assert re.fullmatch(rf"error: .*{named}.*\n", done.stderr)


def test_no_role_is_wider_than_it_must_be_and_the_docs_list_each(script):
    done, _ = script(*OPTIONS)
    roles = set(re.findall(r"--role=(roles/\S+)", done.stdout))
    assert not roles & {"roles/owner", "roles/editor", "roles/storage.admin", "roles/aiplatform.admin"}
    documented = set(re.findall(r"roles/[\w.]+", DOCS.read_text()))
    assert roles <= documented


def roles_of(planned, who, where):
    """Returns the roles that the commands give to, or take from, `who` on `where`."""
    given = [one for one in planned if where in one and any(word.startswith("--member=") and who in word for word in one)]
    return {word.removeprefix("--role=") for one in given for word in one if word.startswith("--role=")}


@pytest.mark.parametrize("who", ["sogclr-steps@", "me@example.com"])
def test_reading_raw_archives_may_ask_for_their_bucket_too(script, who):
    """Cloud Storage's client asks for the metadata of a bucket when it reads an object."""
    planned = commands(script(*OPTIONS)[0].stdout)
    assert roles_of(planned, who, "gs://r") == {"roles/storage.objectViewer", "roles/storage.legacyBucketReader"}


@pytest.mark.parametrize("who", ["sogclr-steps@", "me@example.com"])
def test_calls_may_use_the_quota_of_the_project(script, who):
    assert "roles/serviceusage.serviceUsageConsumer" in roles_of(commands(script(*OPTIONS)[0].stdout), who, "my-project")


def test_who_submits_may_cancel_a_job_s_dataflow_job(script):
    assert "roles/dataflow.developer" in roles_of(commands(script(*OPTIONS)[0].stdout), "me@example.com", "my-project")


def test_deleting_takes_every_role_on_the_project_from_the_steps(script):
    given, taken = (commands(script(*OPTIONS, *more)[0].stdout) for more in ([], ["--delete"]))
    assert roles_of(taken, "sogclr-steps@", "projects") == roles_of(given, "sogclr-steps@", "projects")


def test_the_mlflow_server_of_the_docs_answers_at_the_address_that_the_docs_submit_with():
    """Bound to another host than loopback, MLflow answers 403 Invalid Host header to names that it was not told."""
    from mlflow.cli import cli as mlflow_cli
    from mlflow.server.security_utils import is_allowed_host_header

    text = DOCS.read_text().replace("\\\n", " ").replace("$MLFLOW", "MLFLOW")
    variables, words = re.search(r"^    ((?:\w+=\S+ +)*)mlflow server (.*)$", text, re.MULTILINE).groups()
    options = mlflow_cli.commands["server"].make_context("server", shlex.split(words)).params
    uri = urlsplit(re.search(r"--mlflow-uri (\S+) --mlflow-secret", text)[1])
    assert is_allowed_host_header((options["allowed_hosts"] or "localhost").split(","), uri.netloc)
    assert (uri.scheme, options["port"]) == ("https", 443)
    assert "--ssl-certfile" in options["uvicorn_opts"]
    assert options["app_name"] == "basic-auth"
    assert {one.partition("=")[0] for one in variables.split()} == {
        "MLFLOW_FLASK_SERVER_SECRET_KEY",
        "MLFLOW_AUTH_CONFIG_PATH",
    }


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud itself says whether it takes a command")
def test_gcloud_takes_every_command(script, tmp_path):
    planned = commands(script(*OPTIONS)[0].stdout) + commands(script(*OPTIONS, "--delete")[0].stdout)
    quiet = {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1"}
    kinds = {tuple(word.partition("=")[0] for word in one if "@" not in word and "://" not in word): one for one in planned}
    for one in kinds.values():
        # Parsed, and not carried out.
        lint = ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={shlex.join(one)}"]
        done = subprocess.run(lint, env={**os.environ, **quiet}, capture_output=True, text=True)
        (said,) = json.loads(done.stdout)
        assert said["success"], said["error_message"]


def test_every_command_of_the_page_is_rehearsed_or_marked_as_not_tried():
    page = DOCS.read_text()
    blocks = ["".join(line[4:] for line in block.splitlines(True)) for block in re.findall(r"(?:^    .*\n)+", page, re.MULTILINE)]
    commands = [one for block in blocks for one in re.findall(r"(?:.*\\\n)*.*\n", block) if re.match(r"\w+[= /]|\./", one)]
    assert len(commands) > 20
    rehearsed = rehearse.commands() + next(block for block in blocks if "mlflow server" in block)
    untried = [one for one in commands if "# not tried" not in one and one not in rehearsed and "--(Dataflow)-->" not in one]
    assert untried == []


def test_ci_rehearses_the_page_and_every_trouble():
    script = (SCRIPT.parents[1] / ".ci" / "run").read_text()
    assert re.search(r"^make rehearse TROUBLE=all ", script, re.MULTILINE)
