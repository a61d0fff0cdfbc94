"""A sampler that does not come back."""

import threading
import time
from typing import Any

import pytest

from samplers import Sampler, SamplerParams, Selection, Step
from server.engine import Engine, FinishReason, GenerationRequest, NotServingError
from server.engine import engine as engine_module
from server.engine import watch as watch_module
from server.engine.watch import LOOKS, PATIENCE, Watch
from server.runtime.metrics import Metrics
from tests.engine.backends import CheapBackend, Listener


class Blocks(Sampler):
    """Comes back when it is told to."""

    name = "blocks"
    told: threading.Event
    entered: threading.Event

    def select(self, step: Step) -> Selection:
        self.entered.set()
        self.told.wait(10)
        return Selection(step.candidate & False)


def test_the_engine_is_given_up_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Blocks()
    sampler.told, sampler.entered = threading.Event(), threading.Event()
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(engine_module.log, "error", lambda event, **fields: said.append({"event": event} | fields))
    monkeypatch.setattr(watch_module, "PATIENCE", 0.05)
    engine = Engine(CheapBackend(), Metrics("test"))
    engine.start()
    listener = Listener()
    request = GenerationRequest([1], 4, sampler, SamplerParams(), "blocks")
    engine.submit(request, listener)
    assert sampler.entered.wait(30)
    engine.look_after()
    assert engine.alive, "it has only begun"
    for _ in range(3000):
        engine.look_after()
        if not engine.alive:
            break
        time.sleep(0.01)
    assert not engine.alive and not engine.accepting
    assert str(engine.failure) == f"sampler blocks has not come back for {PATIENCE:.0f} s"
    (line,) = said
    assert line["event"] == "a sampler does not come back" and line["sampler"] == "blocks"
    assert "self.told.wait(10)" in line["stack"]
    with pytest.raises(NotServingError, match="not running"):
        engine.submit(request, Listener())
    engine.stop()
    assert not listener.ended, "it has not come back"
    sampler.told.set()
    assert listener.finish().reason is FinishReason.ERROR, "the thread ends as soon as it can"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(watch_module, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
    return now


def looks(watch: Watch, clock: list[float], seconds: float, times: int) -> bool:
    found = False
    for _ in range(times):
        clock[0] += seconds
        found = watch.look()
    return found


def test_time_in_which_nobody_looks_does_not_count(clock: list[float]) -> None:
    watch = Watch(threading.current_thread())
    watch.look()
    watch.begin()
    assert not looks(watch, clock, 10 * PATIENCE, 2), "a process that was stopped has waited for nobody"
    assert looks(watch, clock, LOOKS, int(PATIENCE / LOOKS) + 1)
    watch.end()
    assert not watch.look()


def test_steps_one_after_the_other_are_not_one_long_one(clock: list[float]) -> None:
    watch = Watch(threading.current_thread())
    for _ in range(5):
        watch.begin()
        assert not looks(watch, clock, LOOKS, int(0.5 * PATIENCE / LOOKS))
        watch.end()
