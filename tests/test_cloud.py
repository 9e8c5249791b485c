"""What holds on Cloud Storage, where TensorFlow's and Beam's own clients meet a loopback server: each in a process of its own."""

import subprocess
import sys

import pytest
from vertex.container import possible
from vertex.scenarios import SCENARIOS


@pytest.mark.thorough
@pytest.mark.parametrize("name", SCENARIOS)
def test_on_cloud_storage(name):
    if reason := possible():
        pytest.skip(reason)
    command = [sys.executable, "-m", "vertex.world", sys.executable, "-m", "vertex.scenarios", name]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": "tests"}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-5000:]}"
