"""The watched folder of policies: whatever is put there, the watcher goes on, and what works stays in service."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from policies.serving import watched_folder
from policies.serving.checkpoint import CARD, WEIGHTS, PolicyError, load_policy, save_policy
from policies.serving.store import PolicyStore, ServedModel
from policies.serving.watched_folder import PolicyFolder, watching
from server.runtime.metrics import Metrics
from tests.api.serving import Running, error_of, serving, until
from tests.policies.tiny import card, network
from tests.writers import row

ADMIN = {"Authorization": "Bearer admin"}
pytestmark = pytest.mark.timeout(60)


def write(folder: Path, seed: int = 0) -> Path:
    save_policy(network(seed), card(), folder)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "policies" / "good")
    return tmp_path / "policies"


@pytest.fixture
def watched(root: Path) -> PolicyFolder:
    made = PolicyFolder(PolicyStore(ServedModel("LLaDAModelLM", 12)), root, Metrics("m"))
    made.look()
    assert names(made) == ["good"]
    return made


def names(watched: PolicyFolder) -> list[str]:
    return [stored.name for stored in watched.policies.list()]


def numbers(watched: PolicyFolder) -> dict[str, float]:
    assert watched.metrics is not None
    samples = [sample for family in watched.metrics.registry.collect() for sample in family.samples]
    return {sample.name: sample.value for sample in samples if "polic" in sample.name}


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def in_its_place(*files: str) -> Callable[[Path], None]:
    """Pipes in the places of files."""

    def damage(folder: Path) -> None:
        for file in files:
            pipe(folder / file)

    return damage


def link_out(file: str | None) -> Callable[[Path], None]:
    """A link to the same thing outside of the watched folder, which works but for the rule."""

    def damage(folder: Path) -> None:
        outside = folder.parent.parent / "outside"
        shutil.copytree(folder, outside)
        if file is None:
            shutil.rmtree(folder)
            folder.symlink_to(outside)
        else:
            (folder / file).unlink()
            (folder / file).symlink_to(outside / file)

    return damage


def measure(rows: int, **changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / CARD).read_text())
        content["measured"] = [row(1).model_dump(mode="json") | changes] * rows
        (folder / CARD).write_text(json.dumps(content))

    return damage


def say(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / CARD).read_text())
        content["trained_on"] |= changes
        (folder / CARD).write_text(json.dumps(content))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipes": (in_its_place(CARD, WEIGHTS), "a named pipe, not a file"),
    "a pipe for weights": (in_its_place(WEIGHTS), "a named pipe, not a file"),
    "a device": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to("/dev/zero"), None)[-1], "is not inside"),
    "a folder": (lambda f: ((f / CARD).unlink(), (f / CARD).mkdir(), None)[-1], "Is a directory"),
    "a link out": (link_out(None), "is not inside"),
    "a card that is a link out": (link_out(CARD), "is not inside"),
    "weights that are a link out": (link_out(WEIGHTS), "is not inside"),
    "links in a circle": (lambda f: ((f / CARD).unlink(), (f / CARD).symlink_to(CARD), None)[-1], ": "),
    "a long name": (say(model="x" * 300_000), "trained_on.model: String should have at most"),
    "a long architecture": (say(architecture="x" * 300_000), "trained_on.architecture: String should have at most"),
    "a long task": (say(task=["x" * 300_000]), "trained_on.task.0: String should have at most"),
    "many lengths": (say(gen_lengths=[7] * 100_000), "trained_on.gen_lengths: Tuple should have at most"),
    "many blocks": (say(block_lengths=[7] * 100_000), "trained_on.block_lengths: Tuple should have at most"),
    "a length": (say(gen_lengths=[10**30]), "trained_on.gen_lengths.0: "),
    "a number that is none": (say(seconds=float("nan")), "trained_on.seconds: "),
    "long parameters": (measure(1, params={"x": "n" * 300_000}), "trained_on and measured have more than"),
    "many long rows": (measure(700, task="n" * 900), "trained_on and measured have more than"),
    "a number of many digits": (measure(1, count=10**4000), "measured.0.count: "),
    "a key": (say(**{"x" * 300_000: 1}), "Extra inputs"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_cannot_be_loaded_leaves_the_one_before_it(watched: PolicyFolder, root: Path, name: str) -> None:
    damage, said = DAMAGES[name]
    before = watched.policies.get("good")
    damage(root / "good")
    write(root / "other")
    with capture_logs() as logs:
        for _ in range(3):
            watched.look()
    (error,) = [each["error"] for each in logs if each["log_level"] == "warning"]
    assert said in error and len(error) <= 500
    assert watched.policies.get("good") is before and names(watched) == ["good", "other"]
    found = numbers(watched)
    assert found["dllm_policy_load_failures_total"] == 1 and found["dllm_policies_loaded"] == 2


@pytest.mark.parametrize("name", ["pipes", "a link out", "a card that is a link out", "a long name", "long parameters"])
def test_over_http_the_same_is_refused(tiny_model: Path, root: Path, name: str) -> None:
    damage, said = DAMAGES[name]
    with serving(tiny_model, policy_dir=str(root), admin_key="admin") as running:
        damage(root / "good")
        error = error_of(running.post("/v1/policies", {"name": "good"}, headers=ADMIN), 400)
        assert error["param"] == "path" and len(error["message"]) < 800
        assert said in error["message"]
        assert running.metrics()[("dllm_policies_loaded",)] == 0
        write(root / "fine")
        assert running.post("/v1/policies", {"name": "fine"}, headers=ADMIN).status_code == 200


def test_links_within_the_folder_are_followed(watched: PolicyFolder, root: Path) -> None:
    (root / "again").symlink_to("good")
    watched.look()
    assert names(watched) == ["again", "good"]
    with pytest.raises(PolicyError, match="is not inside"):
        load_policy(root / "again", within=root / "again" / "deeper")


def test_a_folder_that_vanishes_and_comes_back(watched: PolicyFolder, root: Path) -> None:
    before = watched.policies.get("good")
    seen = numbers(watched)["dllm_policy_folder_last_seen_timestamp_seconds"]
    root.rename(root.with_name("gone"))
    with capture_logs() as logs:
        for _ in range(3):
            watched.look()
    assert [each["event"] for each in logs] == ["cannot read the folder of policies"]
    assert watched.policies.get("good") is before
    assert numbers(watched)["dllm_policy_folder_last_seen_timestamp_seconds"] == seen
    root.with_name("gone").rename(root)
    watched.look()
    assert watched.policies.get("good") is before
    assert numbers(watched)["dllm_policy_folder_last_seen_timestamp_seconds"] > seen


def test_a_policy_that_is_half_there_is_waited_for(watched: PolicyFolder, root: Path) -> None:
    before = watched.policies.get("good")
    (root / "good" / WEIGHTS).rename(root / "good" / "away")
    shutil.copytree(root / "good", root / "new")
    with capture_logs() as logs:
        watched.look()
    assert logs == [] and watched.policies.get("good") is before and names(watched) == ["good"]
    (root / "good" / CARD).unlink()
    watched.look()
    assert names(watched) == []


def test_what_the_system_refuses_is_tried_again(
    watched: PolicyFolder, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as too many open files: nothing about the policy changes before it works again."""
    write(root / "late")
    whole = os.open

    def full(path: Any, *args: Any, **options: Any) -> int:
        if "late" in str(path):
            raise OSError(24, "Too many open files", str(path))
        return whole(path, *args, **options)

    with monkeypatch.context() as patched, capture_logs() as logs:
        patched.setattr(os, "open", full)
        for _ in range(3):
            watched.look()
    (said,) = logs
    assert "Too many open files" in said["error"]
    assert names(watched) == ["good"]
    watched.look()
    assert names(watched) == ["good", "late"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a bug"), RecursionError(), KeyError("x")])
def test_no_error_ends_a_look(
    watched: PolicyFolder, root: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root / "a"), write(root / "z")
    load = PolicyStore.load

    def failing(store: PolicyStore, name: str, *args: Any, **options: Any) -> Any:
        if name == "a":
            raise error
        return load(store, name, *args, **options)

    monkeypatch.setattr(PolicyStore, "load", failing)
    watched.look()
    assert names(watched) == ["good", "z"]
    monkeypatch.undo()
    watched.look()
    assert names(watched) == ["a", "good", "z"]


def test_of_too_many_folders_the_first_are_looked_at(
    watched: PolicyFolder, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_folder, "MOST", 2)
    for name in ("a", "z1", "z2"):
        write(root / name)
    with capture_logs() as logs:
        watched.look()
        watched.look()
    assert names(watched) == ["a", "good"]
    assert len([each for each in logs if each["log_level"] == "warning"]) == 1


def test_a_replaced_policy_of_the_same_size_and_time_is_loaded(watched: PolicyFolder, root: Path) -> None:
    before, stat = watched.policies.get("good"), (root / "good" / WEIGHTS).stat()
    card_stat = (root / "good" / CARD).stat()
    write(root / "good", seed=1)
    os.utime(root / "good" / WEIGHTS, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.utime(root / "good" / CARD, ns=(card_stat.st_atime_ns, card_stat.st_mtime_ns))
    watched.look()
    assert watched.policies.get("good") is not before


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(watched_folder, "SECONDS", 0.01)
    yield


def test_the_thread_outlives_a_pipe_and_loads_what_comes_later(root: Path, quick: None) -> None:
    policies = PolicyStore(ServedModel("LLaDAModelLM", 12))
    with watching(policies, str(root), Metrics("m")):
        (thread,) = [each for each in threading.enumerate() if each.name == "policy-folder"]
        shutil.copytree(root / "good", root / "bad")
        pipe(root / "bad" / CARD)
        time.sleep(0.1)
        assert thread.is_alive()
        write(root / "later")
        until(lambda: [stored.name for stored in policies.list()] == ["good", "later"])
    assert not thread.is_alive()


def test_a_look_that_takes_long_is_followed_by_a_long_pause() -> None:
    assert watched_folder.pause_after(0.001) == watched_folder.SECONDS
    assert watched_folder.pause_after(3.0) >= 30.0


def test_warnings_name_few_of_many_lengths(tmp_path: Path) -> None:
    trained = {"gen_lengths": tuple(range(1, 101)), "block_lengths": tuple(range(1, 101))}
    save_policy(network(), card(trained_on=trained), tmp_path / "p")
    stored = PolicyStore(ServedModel("LLaDAModelLM", 12)).load("p", tmp_path / "p")
    warnings = stored.warnings(ServedModel("LLaDAModelLM", 12), 300, 500)
    assert len(warnings) == 2 and all("and 92 more" in warning and len(warning) < 400 for warning in warnings)


def test_the_number_of_policies_is_in_the_metrics(tiny_model: Path, root: Path) -> None:
    def loaded(running: Running) -> float:
        return running.metrics()[("dllm_policies_loaded",)]

    with serving(tiny_model, policy_dir=str(root), admin_key="admin") as running:
        assert loaded(running) == 0
        assert running.post("/v1/policies", {"name": "good"}, headers=ADMIN).status_code == 200
        assert loaded(running) == 1
        error_of(running.post("/v1/policies", {"name": "none"}, headers=ADMIN), 400)
        assert running.metrics()[("dllm_policy_load_failures_total",)] == 1
        assert running.http.delete("/v1/policies/good", headers=ADMIN).status_code == 200
        assert loaded(running) == 0
