"""`unmask serve` from start to end, as a process."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from server.runtime.version import VERSION
from tests.e2e.processes import ROOT, Process, served, unmask

LONG = {"prompt": "Tom has", "max_tokens": 200, "block_length": 1, "n": 2, "stream": True}


def test_sigterm_lets_what_runs_finish_and_takes_nothing_new(tiny_model: Path) -> None:
    # One after the other, so that they outlast what happens meanwhile, however busy the machine is.
    with served("--model", str(tiny_model), "--max-batch", "1") as process:
        with process.http.stream("POST", "/v1/completions", json=LONG | {"n": 6}) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.popen.send_signal(signal.SIGTERM)
            while process.status("/ready") == 200:
                time.sleep(0.01)
            refused = process.post(max_tokens=1)
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert process.status("/health") == 200
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        reasons = [json.loads(event[6:])["choices"][0]["finish_reason"] for event in events[:-1]]
        assert len([reason for reason in reasons if reason]) == 6
        assert process.popen.wait(timeout=30) == 0
        assert process.popen.stdout is not None and process.popen.stdout.read() == ""


def _in_the_midst(process: Process) -> socket.socket:
    """A connection whose stream has begun."""
    body = json.dumps(LONG).encode()
    connection = socket.create_connection(("127.0.0.1", int(process.url.rpartition(":")[2])))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    while b"data: " not in connection.recv(65536):
        pass
    return connection


def test_a_second_signal_ends_it_at_once(tiny_model: Path) -> None:
    with served("--model", str(tiny_model)) as process, _in_the_midst(process):
        process.popen.send_signal(signal.SIGTERM)
        while process.status("/ready") == 200:
            time.sleep(0.01)
        process.popen.send_signal(signal.SIGINT)
        assert process.popen.wait(timeout=30) == 1


def test_time_for_draining_is_limited(tiny_model: Path) -> None:
    with served("--model", str(tiny_model), "--drain-timeout", "0.1") as process, _in_the_midst(process) as connection:
        process.popen.send_signal(signal.SIGTERM)
        rest = b"".join(iter(lambda: connection.recv(65536), b""))
        assert b'"code":"not_serving"' in rest
        assert process.popen.wait(timeout=30) == 1


def test_settings_come_from_file_environment_and_flags(tiny_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "unmask.toml"
    config.write_text(f'model = "{tiny_model}"\nserved_name = "from-file"\nsampler = "random"\nmax_model_len = 64\n')
    with served("--sampler", "topk", UNMASK_CONFIG=str(config), UNMASK_SERVED_NAME="from-environment") as process:
        answer = process.post(max_tokens=4).json()
        assert answer["model"] == "from-environment"
        assert answer["unmask"]["sampler"] == "topk"
        assert process.post(max_tokens=64).status_code == 400
        port = process.url.rpartition(":")[2]
        health = unmask("health", UNMASK_PORT=port)
        assert (health.returncode, health.stdout) == (0, "ok\n")


def test_the_command_ends_with_2_or_1(tmp_path: Path) -> None:
    wrong = unmask("serve", "--no-such-flag")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--no-such-flag" in wrong.stderr and "Traceback" not in wrong.stderr
    failed = unmask("serve", "--model", str(tmp_path), "--port", "0")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.count("\n") == 1 and str(tmp_path) in failed.stderr


def test_version() -> None:
    done = unmask("version")
    assert done.returncode == 0 and done.stderr == ""
    assert f"unmask {VERSION}" in done.stdout.splitlines()
    assert "torch 2." in done.stdout and "device " in done.stdout


def test_another_package_of_our_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "samplers").mkdir()
    (tmp_path / "samplers" / "__init__.py").write_text("")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from server.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and str(tmp_path / "samplers") in done.stderr
