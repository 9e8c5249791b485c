"""What TensorFlow and the project's own code do on gs://, in a network whose hosts are Google's: `test_gs.py` runs it there.

Prints one JSON object. The code under test runs in a process of its own, which takes lines from here and answers with lines.
"""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager

from vertex.world import TRUST, world

BUCKET = "gs://bucket"


class Worker:
    """A process that evaluates one line after another."""

    def __init__(self):
        code = (
            "import sys, json\n"
            "import tensorflow as tf\n"
            "from components import lease, workspace\n"
            "from eval.export.encoder import export\n"
            "from trainer import checkpoint\n"
            "from trainer.shared import files\n"
            "for line in sys.stdin:\n"
            "    try:\n"
            "        answer = eval(line)\n"
            "    except Exception as error:\n"
            "        answer = f'{type(error).__name__}: {error}'\n"
            "    print(json.dumps(answer, default=str), flush=True)\n"
        )
        environ = {**os.environ, **TRUST, "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def do(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def main(pretrained):
    answers = {}
    with world() as one:
        google = one.google
        (google.storage.folder / "bucket").mkdir()
        objects = google.storage.folder / "bucket"
        worker = Worker()

        def names(folder):
            return sorted(str(path.relative_to(objects / folder)) for path in (objects / folder).rglob("*") if path.is_file())

        @contextmanager
        def asked(name):
            """Keeps the requests that were made meanwhile, without those of listing and of looking."""
            before = len(google.requests)
            yield
            made = [f"{method} {target.partition('?')[0]}" for method, target, _ in google.requests[before:]]
            answers[name] = [one for one in made if not one.startswith("GET")]

        def fail(kind, where, after):
            """Makes the request number `after` that matches `where` go wrong."""
            real, seen = google.fault, []

            def fault(method, target):
                if re.search(where, f"{method} {target}"):
                    seen.append(target)
                    if len(seen) == after:
                        return kind
                return real(method, target)

            google.fault = fault

        with asked("written"):
            worker.do(f"files.write_whole('{BUCKET}/whole/result.json', b'new')")
        answers["whole"] = names("whole")
        # A save whose deletion of the oldest is carried out, and answered by nobody.
        fail("lost", "DELETE .*checkpoint-00000001", 1)
        save = f"checkpoint.save('{BUCKET}/saved', checkpoint.Checkpoint(%d, {{}}, {{}}), keep=1)"
        answers["saved"] = [worker.do(save % step) for step in (1, 2)]
        answers["kept"] = names("saved")

        # The export fails where its third file is sent, in a way that TensorFlow does not try again.
        export = f"export('{pretrained}', '{BUCKET}/export').folder"
        fail(400, "POST .*uploadType=resumable", 3)
        answers["half"] = [worker.do(export), names("export")]
        for attempt in ("again", "replaced"):
            with asked(f"{attempt} requests"):
                answers[attempt] = [worker.do(export), names("export")]
        answers["loads"] = worker.do(f"sorted(tf.saved_model.load('{BUCKET}/export/saved_model').signatures)")

        # A folder that an earlier version finished, without a lease, is left alone.
        (objects / "work").mkdir()
        key = worker.do(f"workspace.claim('{BUCKET}/work', 'jobs/a', seed=0).folder")
        answers["claimed"] = key
        old = objects / key.removeprefix(f"{BUCKET}/").replace("work", "old")
        old.mkdir(parents=True)
        (old / "result.json").write_text("{}")
        answers["beside"] = worker.do(f"workspace.claim('{BUCKET}/old', 'jobs/a', seed=0).folder")
        worker.process.kill()
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1])
