"""Templates that compute for ever, fill the memory or write without end: one line, soon, and nobody else notices."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.models.files import ModelError
from server.models.text import chat_template, template_worker
from server.models.text.chat_template import ChatTemplate, ChatTemplateError
from server.models.text.template_process import ANSWER, TEXT
from server.models.text.template_worker import PROCESSES, TemplateLimitError, TemplateWorkers, template_workers

TIME, MEMORY, TEXT_LENGTH, SOURCE = "processor time", "memory", "characters", "compiled"
BOMBS = {
    "repeated": ("{{ 'a' * 10 ** 10 }}", MEMORY),
    "percent": ("{{ '%1000000000d' % 1 }}", MEMORY),
    "json": ("{{ [1] | tojson(indent=10 ** 9) }}", MEMORY),
    "doubled": ("{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}", MEMORY),
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TIME),
    "power": ("{{ 9 ** (9 ** 9) > 1 }}", TIME),
    "500 MB": ("{% for i in range(500) %}{{ 'a' * 10 ** 6 }}{% endfor %}", TEXT_LENGTH),
    "nested brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", SOURCE),
    "nested ifs": ("{% if 1 %}" * 300 + "{% endif %}" * 300, SOURCE),
    "nested loops": ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, SOURCE),
    "long": ("x" * 1_000_001, "longer than"),
}
ECHO = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(autouse=True)
def _little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_worker, "SECONDS", 0.2)


@pytest.fixture
def workers() -> Iterator[TemplateWorkers]:
    """Some of the test's own."""
    found = TemplateWorkers()
    yield found
    found.end()


def user(content: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(("source", "limit"), BOMBS.values(), ids=BOMBS)
def test_a_template_that_explodes_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, limit: str
) -> None:
    if limit is not TIME:
        monkeypatch.setattr(template_worker, "SECONDS", 60)
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(ModelError) as caught:
        ChatTemplate.load(tmp_path, {})
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'chat_template.jinja'}: chat template: ") and "\n" not in message
    assert limit in message
    assert len(template_workers().pids) <= PROCESSES


@pytest.mark.parametrize("name", ["repeated", "loops", "500 MB"])
def test_one_that_explodes_for_some_messages_refuses_these(name: str) -> None:
    source, limit = BOMBS[name]
    template = ChatTemplate("{% if messages[0].content == 'bomb' %}" + source + "{% endif %}" + ECHO)
    with pytest.raises(ChatTemplateError, match=limit):
        template.render(user("bomb"))
    assert template.render(user("hello")) == "hello"


@pytest.mark.parametrize("source", ["{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 'a' * 10 ** 30 }}"])
def test_what_python_itself_refuses_is_an_error_of_the_template(source: str) -> None:
    template = ChatTemplate(source)
    with pytest.raises(ChatTemplateError, match=r"recursion|fit"):
        template.render(user("hello"))


def test_many_slow_probes_take_too_long_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "PROBING_SECONDS", -1)
    with pytest.raises(TemplateLimitError, match="short chats"):
        ChatTemplate(ECHO)


def test_long_chats_may_take_more(workers: TemplateWorkers) -> None:
    content = "hello \U0001f600 \u6f22" * 200_000
    assert workers.render(ECHO * 2, {"messages": user(content)}) == content * 2


def test_what_took_too_much_memory_is_not_used_again(workers: TemplateWorkers) -> None:
    with pytest.raises(TemplateLimitError, match=MEMORY):
        workers.render(BOMBS["repeated"][0], {})
    assert workers.pids == []


def test_half_of_a_pair_is_no_character(workers: TemplateWorkers) -> None:
    assert workers.render("{{ '\\ud800' }}\u6f22", {}) == "\ufffd\u6f22"


def test_a_long_error_is_cut(workers: TemplateWorkers) -> None:
    with pytest.raises(ValueError, match=r"^x+$") as caught:
        workers.render("{{ raise_exception('x' * 10 ** 6) }}", {})
    assert len(str(caught.value)) == 1000


def test_a_bad_one_does_not_hold_up_others(workers: TemplateWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_worker, "SECONDS", 60)

    def loop() -> None:
        with pytest.raises(TemplateLimitError, match="ends the process"):
            workers.render(BOMBS["loops"][0], {})

    slow = threading.Thread(target=loop)
    slow.start()
    while not workers.pids:
        time.sleep(0.01)
    (computing,) = workers.pids
    assert workers.render("a", {}) == "a"
    assert slow.is_alive()
    while slow.is_alive():  # once more after the first time
        for pid in workers.pids:
            os.kill(pid, signal.SIGKILL)
        slow.join(0.1)
    assert computing not in workers.pids


def test_processes_stay_as_long_as_they_answer(workers: TemplateWorkers) -> None:
    assert workers.render("a", {}) == "a"
    (first,) = workers.pids
    assert os.getsid(first) == first, "a terminal's Ctrl-C is not for it"
    for _ in range(5):
        workers.render("a", {})
    assert workers.pids == [first]
    both = [workers._acquire(), workers._acquire()]
    for process in both:
        workers._release(process)
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert workers.render("a", {}) == "a", "another one"
    assert len(workers.pids) == 1 and workers.pids[0] not in (first, *(process.pid for process in both))


def test_one_that_is_killed_when_it_is_asked_is_replaced(
    workers: TemplateWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert workers.render("a", {}) == "a"
    (first,) = workers.pids
    os.kill(first, signal.SIGKILL)
    monkeypatch.setattr(template_worker._Process, "alive", True)  # as it looks until the system has ended it
    assert workers.render("a", {}) == "a"
    assert workers.pids != [first]


@pytest.mark.timeout(30)
def test_a_process_that_does_not_get_on_is_given_up(workers: TemplateWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers.render("a", {}) == "a"
    (pid,) = workers.pids
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(template_worker, "PATIENCE", 0.2)
    with pytest.raises(TemplateLimitError, match=r"0\.2 s"):
        workers.render("a", {})
    assert workers.pids == [] and not Path(f"/proc/{pid}").exists()


def test_an_answer_without_end_is_not_read(workers: TemplateWorkers) -> None:
    assert workers.render("a", {}) == "a"
    process = workers._acquire()
    ours, theirs = socket.socketpair()
    process._connection.close()
    process._connection = ours
    theirs.sendall(ANSWER.pack(TEXT, 1 << 40))
    with theirs, pytest.raises(TemplateLimitError, match="too long"):
        process.call((1, 1, 1), b"")
    workers._discard(process)


def test_it_has_no_keys_and_ends_with_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import time; from server.models.text.template_worker import template_workers as workers\n"
        "workers().render('a', {}); print(workers().pids[0], flush=True); time.sleep(60)"
    )
    monkeypatch.setenv("UNMASK_API_KEY", "secret")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
        server.kill()
    deadline = time.monotonic() + 30
    while _runs(pid):
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    """Whether there is such a process, but for one that ended and that nobody has asked about."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
