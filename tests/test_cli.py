"""The command line: what it refuses, how fast it answers, what it writes without running anything."""

import argparse
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from support.processes import started

from components import tracking
from components.lineage import COMPONENTS, Artifact, Lineage, Step, components_of
from pipelines import cli, code
from pipelines.cache import drop_unusable
from pipelines.cli import executing, looking, store
from pipelines.cli.parser import make_parser
from trainer.presets import PRESETS
from trainer.shared.progress import parse_line

REPOSITORY = Path(__file__).parents[1]


def commands_of(parser):
    """Returns the parsers of all commands, by name."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


COMMANDS = commands_of(make_parser())


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty current folder, and no MLflow of the outside."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys; from pipelines.cli import main\n"
        f"try: main({[*command, '--help']})\n"
        "except SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    helped = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert helped.stdout.startswith(f"usage: {' '.join(['sogclr', *command])}")
    assert not set(helped.stderr.split()) & {
        "tensorflow",
        "keras",
        "apache_beam",
        "kfp",
        "mlflow",
        "matplotlib",
        "numpy",
    }


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("run --preset dmo", "did you mean demo?"),
        ("run --preset demo --set epoch=3", "did you mean epochs?"),
        ("run --preset demo --set epochs=3 gamma=x", "gamma=x"),
        ("run --preset demo --set epochs=3 --set gamma=2", "gamma=2"),
        ("run --preset demo --raw nowhere", "nowhere"),
        ("run --preset demo --root file/runs", "file/runs"),
        ("run --preset sogclr_imagenet_r50_b512", "--raw"),
        ("rerun pretrain --run 12345678", "holds no runs"),
        ("ui", "holds no runs"),
        ("compile --preset dmo --output p.yaml", "did you mean demo?"),
        ("compile --preset demo --output nowhere/p.yaml", "nowhere/p.yaml"),
        ("compile --preset demo --output p.yaml --set epochs=0", "epochs=0"),
    ],
)
def test_what_the_user_can_mend_is_one_line_with_exit_code_2(arguments, named, here, capsys):
    (here / "file").touch()
    assert cli.main(arguments.split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = (line for line in said.err.splitlines() if not parse_line(line))
    assert line.startswith("error: ")
    assert named in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", "COMMAND; sogclr --help says how"),
        ("sbumit", "'submit'"),
        ("submit --preset demo", "--project, --region, --raw, --accelerator, --pipeline-root; sogclr submit --help says how"),
        ("run --preset demo --rot x", "--rot x; sogclr --help says how"),
        ("submit --retries many", "--retries: invalid int value: 'many'"),
    ],
)
def test_a_line_that_is_no_command_is_one_line_with_exit_code_2(arguments, named, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments.split())
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", said.err)
    assert named in said.err


# ---- Help


def listed_by(action):
    """Returns what the help lists of an action: a line of its own, or one for each command."""
    if not isinstance(action, argparse._SubParsersAction):
        return [action]
    assert [one.dest for one in action._choices_actions] == list(action.choices), "a command without a line in the help"
    return action._choices_actions


def faults_of_help(parser):
    """Yields what is wrong with the help of a parser: a text that is missing, a line that a terminal of 80 columns breaks."""
    if not parser.description:
        yield f"{parser.prog} has no description"
    for action in parser._actions:
        for one in listed_by(action):
            name = "/".join(one.option_strings) or one.dest
            if not (one.help or "").strip():
                yield f"{parser.prog} {name} has no help"
            elif one.help == argparse.SUPPRESS:
                yield f"{parser.prog} {name} is hidden"
    for line in parser.format_help().splitlines():
        if len(line) > 80:
            yield f"{parser.prog} has a line of {len(line)} columns: {line}"


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_explains_itself_and_its_options_within_a_terminal(command, terminal, capsys):
    parser = COMMANDS[command] if command else make_parser()
    assert list(faults_of_help(parser)) == []
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == parser.format_help()


def without_help(parser):
    parser.add_argument("--silent")


def with_empty_help(parser):
    parser.add_argument("--empty", help=" ")


def with_a_hidden_option(parser):
    parser.add_argument("--hidden", help=argparse.SUPPRESS)


def without_a_description(parser):
    parser.description = ""


def with_a_long_line(parser):
    parser.epilog = "sogclr " + "x" * 80


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (without_help, "sogclr run --silent has no help"),
        (with_empty_help, "sogclr run --empty has no help"),
        (with_a_hidden_option, "sogclr run --hidden is hidden"),
        (without_a_description, "sogclr run has no description"),
        (with_a_long_line, "sogclr run has a line of 87 columns: sogclr xxx"),
    ],
)
def test_a_help_with_a_fault_is_refused(spoil, fault, terminal):
    parser = commands_of(make_parser())["run"]
    spoil(parser)
    (found,) = faults_of_help(parser)
    assert found.startswith(fault)


# ---- What goes wrong


def test_debug_shows_the_traceback():
    with pytest.raises(Exception, match="did you mean demo"):
        cli.main(["run", "--preset", "dmo", "--debug"])


def test_a_run_that_is_refused_leaves_nothing(here):
    cli.main(["run", "--preset", "demo", "--set", "epochs=0"])
    assert list(here.iterdir()) == []


def test_what_fails_otherwise_is_one_line_with_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(looking, "PRESETS", None)
    assert cli.main(["presets"]) == 1
    assert re.fullmatch(r"error: AttributeError: [^\n]+\n", capsys.readouterr().err)


# ---- presets


def test_presets_come_with_published_results_and_sources(capsys):
    cli.main(["presets", "--json"])
    described = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in described] == list(PRESETS)
    assert all(one["published"] and one["source"] for one in described)
    cli.main(["presets"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(PRESETS)


@pytest.mark.parametrize("command", ["presets", "accelerators"])
def test_a_reader_who_has_enough_ends_a_command_quietly(command):
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", command], cwd=REPOSITORY, stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_presets_are_a_table_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    cli.main(["presets"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert "published" in head
    assert any("sogclr_imagenet_r50_b512" in row and "69.5" in row for row in rows)


# ---- compile


def compiled(*arguments):
    assert cli.main(["compile", "--preset", "demo", "--output", "p.yaml", *arguments]) == 0
    spec = yaml.safe_load(Path("p.yaml").read_text())
    return spec, json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())


def steps_of(proto):
    return proto.components["comp-exit-handler-1"].dag.tasks


def test_the_compiled_pipeline_parses_into_the_real_proto():
    _, proto = compiled("--set", "epochs=3", "linear_eval.seed=2")
    inputs = proto.root.input_definitions.parameters
    defaults = {
        name: json_format.MessageToDict(one.default_value) for name, one in inputs.items() if one.HasField("default_value")
    }
    assert defaults["preset"] == "demo"
    assert defaults["overrides"] == ["epochs=3"]
    assert defaults["linear_eval_overrides"] == ["linear_eval.seed=2"]
    assert set(inputs) - set(defaults) == {"raw"}
    tasks = steps_of(proto)
    steps = components_of("pretrain")
    assert set(tasks) == {*steps, "record-lineage"}
    assert {name for name, task in tasks.items() if task.caching_options.enable_cache} == set(steps)
    for name in steps:
        assert tasks[name].inputs.parameters["code_version"].runtime_value.constant.string_value == code.step_version(name)


def test_however_a_compiled_pipeline_ends_its_mlflow_run_is_closed():
    _, proto = compiled()
    assert set(proto.root.dag.tasks) == {"exit-handler-1", "end-pipeline"}
    end = proto.root.dag.tasks["end-pipeline"]
    assert end.inputs.parameters["status"].task_final_status.producer_task == "exit-handler-1"
    assert end.trigger_policy.strategy == end.trigger_policy.ALL_UPSTREAM_TASKS_COMPLETED


def test_pretraining_does_not_depend_on_the_settings_of_the_linear_eval():
    _, proto = compiled()
    inputs = steps_of(proto)["pretrain"].inputs.parameters
    assert "linear_eval_overrides" not in {one.component_input_parameter for one in inputs.values()}


def test_images_and_raw_data_can_be_given_when_compiling():
    spec, proto = compiled("--raw", "gs://bucket/raw", "--images", "registry/mine", "--tag", "abc")
    assert {one["container"]["image"] for one in spec["deploymentSpec"]["executors"].values()} == {"registry/mine/sogclr-cpu:abc"}
    assert proto.root.input_definitions.parameters["raw"].default_value.string_value == "gs://bucket/raw"


def test_a_compiled_pipeline_knows_nothing_of_this_machine(here):
    compiled()
    text = (here / "p.yaml").read_text()
    assert str(REPOSITORY) not in text
    assert str(here) not in text
    assert [path.name for path in here.iterdir()] == ["p.yaml"]


def test_no_secret_of_the_environment_is_in_a_compiled_pipeline(here, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", f"planted-{name}")
    for machines in ((), ("--accelerator", "v5e-8", "--tag", "abc")):
        compiled(*machines)
        text = (here / "p.yaml").read_text()
        assert "https://mlflow.example" in text
        assert "planted" not in text
    (here / "p.yaml").unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:planted@mlflow.example")
    assert cli.main(["compile", "--preset", "demo", "--output", "p.yaml"]) == 2
    assert "planted" not in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_the_code_version_changes_with_names_and_bytes_of_the_sources(tmp_path):
    source = tmp_path / "trainer" / "losses.py"
    source.parent.mkdir()
    source.write_text("a = 1\n")
    versions = [code.code_version(tmp_path)]
    source.write_text("a = 2\n")
    versions.append(code.code_version(tmp_path))
    source.with_name("page.html.jinja").write_text("<p>")
    versions.append(code.code_version(tmp_path))
    source.rename(source.with_name("loss.py"))
    versions.append(code.code_version(tmp_path))
    (source.parent / "notes.txt").write_text("not code")
    assert len(set(versions)) == 4
    assert code.code_version(tmp_path) == versions[-1]


def test_a_step_s_version_is_of_the_sources_that_it_imports(tmp_path):
    for package in ("trainer", "eval", "beam_jobs", "components", "pipelines"):
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))

    def changed_by(file):
        before = {name: code.step_version(name, tmp_path) for name in COMPONENTS}
        with (tmp_path / file).open("a") as source:
            source.write("\n")
        return {name for name in COMPONENTS if code.step_version(name, tmp_path) != before[name]}

    assert changed_by("eval/measure/linear_eval.py") == {"linear-eval"}
    assert changed_by("eval/measure/protocols/official.py") == {"linear-eval"}
    assert changed_by("trainer/losses/nt_xent.py") >= {"pretrain"}
    assert changed_by("trainer/losses/nt_xent.py").isdisjoint({"build-tfrecords"})
    assert changed_by("beam_jobs/layouts/archives.py") == {"build-tfrecords"}
    assert changed_by("trainer/shared/records.py") == changed_by("components/tracking/store.py") == set(COMPONENTS)
    assert changed_by("pipelines/cli/running.py") == changed_by("trainer/task.py") == set()


# ---- where MLflow is


def test_mlflow_is_under_the_root_unless_the_environment_says_otherwise(here, monkeypatch):
    assert store.mlflow_names(here)["MLFLOW_TRACKING_URI"] == f"sqlite:///{here}/mlflow.db"
    opened = store.open_store(here)
    assert opened.client.get_experiment(opened.experiment_id).artifact_location == str(here / "artifacts")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here}/other.db")
    store.open_store(here / "root")
    assert sorted(path.name for path in here.iterdir()) == ["mlflow.db", "other.db"]


def test_the_cache_forgets_what_mlflow_does_not_know(here):
    opened = tracking.open_store(f"sqlite:///{here}/mlflow.db", artifacts=str(here))
    known = opened.client.create_run(opened.experiment_id).info.run_id
    opened.client.log_dict(known, {}, "step.json")
    (here / "cache").mkdir()
    (here / "x").touch()
    for name, run_id in {"kept": known, "lost": "0" * 32}.items():
        (here / "cache" / f"{name}.json").write_text(json.dumps({"dataset": {"uri": "x", "metadata": {"run_id": run_id}}}))
    assert list(drop_unusable(here, partial(tracking.why_lost, opened))) == [
        "lost drops out of the cache: run 00000000 is not in MLflow any more"
    ]
    assert [path.name for path in here.glob("cache/*.json")] == ["kept.json"]


@pytest.mark.thorough
def test_the_ui_serves_the_root_on_this_machine_only_until_it_is_interrupted(here):
    tracking.open_store(f"sqlite:///{here}/mlflow.db", artifacts=str(here / "artifacts"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipelines.cli", "ui", "--root", str(here), "--port", str(port)]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with started(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ui:
        assert f"http://127.0.0.1:{port}/" in ui.stdout.readline()
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/ajax-api/2.0/mlflow/experiments/get-by-name?experiment_name=sogclr")
        assert json.load(connection.getresponse())["experiment"]["artifact_location"] == str(here / "artifacts")
        assert cli.main(["ui", "--root", str(here), "--port", str(port)]) == 2
        ui.send_signal(signal.SIGINT)
        assert ui.wait() == 0
        assert ui.stderr.read().splitlines() == ["[ui] loading MLflow ...", "[ui] starting the server ..."]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_the_ui_of_a_server_is_the_server_s(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    assert cli.main(["ui"]) == 2
    assert "open http://mlflow.example" in capsys.readouterr().err


@pytest.mark.parametrize("controlled", [True, False])
def test_a_run_s_summary_shows_the_control_if_there_was_one(controlled, tmp_path):
    accuracies = {"top_1_accuracy": 0.686, "top_5_accuracy": 0.956}
    if controlled:
        accuracies |= {"untrained_top_1_accuracy": 0.537, "untrained_top_5_accuracy": 0.863}
    metrics = Artifact("system.Metrics", "metrics", accuracies)
    step = Step("linear-eval", "1" * 32, "0" * 32, "FINISHED", 1.0, {}, {"metrics": metrics}, {})
    said = "\n".join(executing.summary(Lineage("0" * 32, "run", (step,)), "lineage.png", tmp_path))
    assert re.search(r"top-1 +68\.6%" + (r" +53\.7%" if controlled else "$"), said, re.M)
    assert ("untrained" in said) == controlled


@pytest.mark.parametrize(
    ("command", "package", "says"),
    [
        (["ui"], "mlflow", "[ui] loading MLflow ..."),
        (["compare", "0123456789"], "mlflow", "[compare] loading MLflow ..."),
        (["clean", "--dry-run"], "mlflow", "[clean] loading MLflow ..."),
        (["rerun", "build-tfrecords", "--run", "0123456789"], "mlflow", "[rerun] loading MLflow ..."),
        (["plan", "--preset", "demo", "--accelerator", "v5e-8"], "tensorflow", "[plan] loading TensorFlow ..."),
    ],
)
def test_a_command_says_what_it_loads_before_it_does(command, package, says, tmp_path):
    (tmp_path / "mlflow.db").touch()
    code = f"import sys; sys.modules[{package!r}] = None; from pipelines.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--root", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    said = done.stderr.splitlines()
    assert said[0] == says
    assert f"No module named '{package}." in said[-1]
