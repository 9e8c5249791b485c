"""A server of MLflow's that does not answer, or refuses: it is waited for, or the user is told what to do."""

import json
import threading

import pytest
from support.loopback import answering, skip_waits

from components import patience, tracking
from trainer.shared.errors import UserError

PASSWORD = "planted-password"


@pytest.mark.parametrize(
    ("status", "answers"),
    [(500, "answers HTTP 500"), (503, "answers HTTP 503"), (None, "does not answer")],
)
def test_a_server_that_is_waited_for_is_said_to_answer_what_it_answers(monkeypatch, capsys, status, answers):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    skip_waits(monkeypatch)
    with answering(status or 200) as server:
        url = server.url
        uri = (url if status else "http://127.0.0.1:9").replace("http://", f"http://someone:{PASSWORD}@")
        with pytest.raises(UserError, match=f"MLflow {answers}.*gave up after 60 s") as raised:
            tracking.open_store(uri, patience=60)
    said = capsys.readouterr().err
    assert said.startswith(
        f"MLflow {answers} at {url if status else 'http://127.0.0.1:9'}/api/2.0/mlflow/experiments/get-by-name"
    )
    assert said.endswith("; waiting for it\n" if status else " (connection refused); waiting for it\n")
    assert said.count("\n") == 1
    assert PASSWORD not in said + str(raised.value)


def test_a_server_that_comes_back_is_waited_for(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    skip_waits(monkeypatch)
    found: list[tracking.Store] = []
    with answering(503) as server:
        opening = threading.Thread(target=lambda: found.append(tracking.open_store(server.url, patience=1e9)))
        opening.start()
        for _ in range(3):
            server.asked.acquire()
        server.status, server.body = 200, json.dumps({"experiment": {"experiment_id": "7", "name": "sogclr"}})
        opening.join()
    assert [store.experiment_id for store in found] == ["7"]
    assert "waiting for it" in capsys.readouterr().err


def test_an_interrupt_ends_a_call_though_it_comes_while_a_lost_connection_is_handled():
    asked = []

    def call():
        asked.append(1)
        try:
            raise ConnectionResetError(104, "Connection reset by peer")
        except ConnectionResetError:
            raise KeyboardInterrupt from None

    with pytest.raises(KeyboardInterrupt):
        patience.patiently(call, 60)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        (
            "Invalid Host header - possible DNS rebinding attack detected",
            r"the server accepts no requests for the host HOST: start mlflow server with --allowed-hosts HOST$",
        ),
        (json.dumps({"error_code": "PERMISSION_DENIED", "message": "not yours"}), "not yours; set MLFLOW_TRACKING_USERNAME"),
    ],
)
def test_a_server_that_forbids_says_how_to_be_let_in(body, hint):
    with answering(403, body) as server:
        host = server.url.removeprefix("http://")
        for use in (tracking.open_store, tracking.describe_store):
            with pytest.raises(UserError, match=hint.replace("HOST", host)) as raised:
                use(f"http://someone:{PASSWORD}@{host}")
            assert "\n" not in str(raised.value)
            assert PASSWORD not in str(raised.value)
