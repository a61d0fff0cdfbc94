import shutil
from pathlib import Path

import pytest
from PIL import Image

from policies.evaluation.card import place
from policies.evaluation.measure import Measurement
from policies.evaluation.plot import pareto_front
from policies.evaluation.report import markdown
from policies.evaluation.results import Results, add_row
from policies.evaluation.wilson import wilson
from server.backends.loading import load_model
from server.commands.options import model_under_test
from tests.commands.application import read_json, refused, right
from tests.installed import SAMPLER, Installed

ROW_KEYS = {
    *("task", "sampler", "params", "block_length", "gen_length", "count", "correct", "accuracy", "accuracy_low"),
    *("accuracy_high", "tokens", "forwards", "tpf", "seconds"),
}
QUICK = ("--task", "sort", "--sampler", "topk:k=8", "--sampler", "oracle", "--count", 3, "--gen-length", 8)


def row(sampler: str, accuracy: float, tpf: float, **changes: object) -> Measurement:
    correct = round(100 * accuracy)
    low, high = wilson(correct, 100)
    values: dict[str, object] = {
        **{"task": "sort", "sampler": sampler, "params": {}, "block_length": None, "gen_length": 16, "count": 100},
        **{"seed": 0, "fill_after_end": True, "correct": correct, "accuracy": accuracy, "accuracy_low": low},
        **{"accuracy_high": high, "tokens": round(1000 * tpf), "forwards": 1000, "tpf": tpf, "seconds": 1.0},
    }
    return Measurement.model_validate(values | changes)


def test_rows_are_what_programs_read(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    options = ("--block-length", 4, "--block-length", "full", "--json", file)
    result = right("evaluate", "--model", tiny_model, *QUICK, "--task", "reverse", *options)
    found = read_json(file)
    assert found["model"] == "tiny"
    rows = found["rows"]
    assert [(r["block_length"], r["task"], r["sampler"]) for r in rows] == [
        (block, task, sampler) for block in (4, None) for task in ("sort", "reverse") for sampler in ("topk", "oracle")
    ]
    for r in rows:
        assert set(r) >= ROW_KEYS
        assert (r["count"], r["gen_length"]) == (3, 8)
        assert r["params"] == ({"k": 8} if r["sampler"] == "topk" else {})
        assert 0 <= r["accuracy_low"] <= r["accuracy"] == r["correct"] / 3 <= r["accuracy_high"] <= 1
        assert r["tpf"] == r["tokens"] / r["forwards"]
        assert f"{r['tpf']:.2f}" in result.stdout
    assert "topk k=8 (all at once)" in result.stdout


def test_modifiers_follow_their_sampler(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    specs = ("--sampler", "topk:k=8", "--sampler", "topk:k=8+guidance:scale=1.5,negative_prompt=Sort these+spacing")
    common = ("evaluate", "--model", tiny_model, "--task", "sort", "--count", 2, "--gen-length", 8, "--json", file)
    shown = right(*common, *specs).stdout
    plain, around = read_json(file)["rows"]
    assert "modifiers" not in plain
    assert around["modifiers"] == [
        {"name": "guidance", "params": {"scale": 1.5, "negative_prompt": "Sort these"}},
        {"name": "spacing", "params": {"min_gap_start": 8, "min_gap": 2}},
    ]
    assert around["sampler"] == "topk" and "guidance scale=1.5" in " ".join(shown.split())
    assert plain["forwards"] == 2 and around["forwards"] % 2 == 0 and around["forwards"] > 4
    right(*common, *specs)
    assert read_json(file)["rows"] == [plain, around], "both were there already"
    for spec, why in (
        ("topk+best", "unknown modifier 'best'"),
        ("topk+guidance", "guidance: scale: Field required"),
        ("topk+spacing+spacing", "spacing is there twice"),
        ("credit+credit", "so does sampler credit"),
    ):
        assert why in refused(2, *common, "--sampler", spec)


def test_a_trial_that_cannot_be_run_is_found_before_the_first_is(tiny_model: Path, tmp_path: Path) -> None:
    """Problems, lengths, policies and parameters of all of them, not those of one after hours of others."""
    (tmp_path / "own.jsonl").write_text('{"prompt": "Say 1", "answer": "1"}\n')
    rows = tmp_path / "rows.json"
    first = ("evaluate", "--model", tiny_model, "--json", rows, "--task", "sort", "--count", 2)
    for later, said in (
        (("--task", f"file:heldout={tmp_path / 'own.jsonl'}", "--gen-length", 8), "has 1 heldout problems, not 2"),
        (("--task", "chain", "--gen-length", 230), "more than the model's 256"),
        (("--sampler", "topk", "--sampler", "policy:policy=none"), "no policy 'none' is loaded"),
    ):
        assert said in refused(2, *first, *later)
        assert not rows.exists()


@pytest.mark.parametrize("flag", ["--json", "--plot", "--markdown"])
def test_a_file_that_cannot_be_written_is_found_first(tmp_path: Path, flag: str) -> None:
    for path, said in (
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "file", "is not a folder"),
        ("/proc/unmask-file", "/proc cannot be written to"),
        ("/proc/version", "/proc/version: "),
    ):
        assert said in refused(2, "evaluate", "--model", tmp_path / "none", flag, path)
    for bench in ("engine", "http"):
        assert "is a folder" in refused(2, "bench", bench, "--json", tmp_path)


def test_a_second_run_measures_only_what_is_missing(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    common = ("evaluate", "--model", tiny_model, *QUICK, "--json", file)
    right(*common)
    first = read_json(file)["rows"]
    again = right(*common, "--sampler", "topk:k=2")
    rows = read_json(file)["rows"]
    assert rows[:2] == first, "seconds included: nothing was measured twice"
    assert [r["params"] for r in rows[2:]] == [{"k": 2}]
    assert "oracle" in again.stdout, "the table shows what was asked for, old and new"
    right(*common, "--no-fill-after-end", "--seed", 1)
    assert [(r["seed"], r["fill_after_end"]) for r in read_json(file)["rows"][3:]] == [(1, False)] * 2


def test_two_runs_may_fill_one_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    ours, theirs = (Results(model="m", digest="d", dtype="float32") for _ in range(2))
    rows = [row("topk", 0.5, 1.0, params={"k": k}) for k in (1, 2, 3)]
    for results, measured in zip((ours, theirs, ours), rows, strict=True):
        add_row(file, results, measured)
    assert Results.model_validate_json(file.read_bytes()).rows == ours.rows == rows
    assert theirs.rows == rows[:2]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_rows_before_a_failure_are_kept(tiny_model: Path, tmp_path: Path, installed: Installed) -> None:
    file = tmp_path / "rows.json"
    installed.sampler(f"{SAMPLER}    def select(self, step):\n        raise ZeroDivisionError('by design')\n")
    samplers = ("--sampler", "topk:k=64", "--sampler", "left_to_right")
    said = refused(1, "evaluate", "--model", tiny_model, "--task", "sort", *samplers, "--count", 2, "--json", file)
    assert "sampler left_to_right failed: ZeroDivisionError" in said
    assert [r["sampler"] for r in read_json(file)["rows"]] == ["topk"]


def test_another_model_or_number_type_does_not_mix_in(tiny_model: Path, ending_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    right("evaluate", "--model", tiny_model, *QUICK, "--dtype", "float32", "--json", file)
    content = file.read_bytes()
    assert "measures other model files" in refused(1, "evaluate", "--model", ending_model, *QUICK, "--json", file)
    other_type = ("--dtype", "bfloat16", "--json", file)
    assert "measured in float32, not bfloat16" in refused(1, "evaluate", "--model", tiny_model, *QUICK, *other_type)
    assert file.read_bytes() == content
    file.write_text('{"rows": 3}')
    assert "not a file of unmask evaluate" in refused(1, "evaluate", "--model", tiny_model, *QUICK, "--json", file)


@pytest.mark.parametrize(
    ("flag", "value", "why"),
    [
        ("--task", "riddles", "unknown task 'riddles'"),
        ("--sampler", "best", "unknown sampler 'best'"),
        ("--sampler", "topk:k=0", "k: Input should be greater than or equal to 1"),
        ("--block-length", "half", "neither a number of positions nor 'full'"),
        ("--count", "0", "greater than or equal to 1"),
        ("--plot", "/nowhere/plot.png", "/nowhere is not a folder"),
        ("--card", "/nowhere", "/nowhere/README.md: No such file"),
    ],
)
def test_wrong_use_names_the_flag_before_any_work(tiny_model: Path, flag: str, value: str, why: str) -> None:
    said = refused(2, "evaluate", "--model", tiny_model, flag, value)
    assert flag in said
    assert why in said


def test_plot_markdown_and_card(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "README.md").write_text(f"# Card\n\n{place('Not measured yet.')}\n\nThe end.\n")
    outputs = ("--plot", tmp_path / "plot.png", "--markdown", tmp_path / "table.md", "--card", model)
    right("evaluate", "--model", model, *QUICK, "--block-length", 4, "--block-length", 0, *outputs)
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"
        picture.load()
        assert min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10, "something is drawn"
    table = (tmp_path / "table.md").read_text()
    assert table.count("| topk k=8") == table.count("| oracle") == 2
    assert "**Blocks of 4; 3 held-out problems a task (seed 0)**" in table
    assert "**Full diffusion; 3 held-out problems a task (seed 0)**" in table
    card = (model / "README.md").read_text()
    assert card == f"# Card\n\n{place(table)}\n\nThe end.\n"
    (model / "README.md").write_text("# Card without a place\n")
    assert "has no lines" in refused(2, "evaluate", "--model", model, *QUICK, "--card", model)


def test_markdown_cells() -> None:
    rows = [
        row("topk", 0.96, 1.0, params={"k": 1}),
        row("threshold", 0.9, 4.256, params={"threshold": 0.9}),
        row("topk", 0.5, 8.0, task="chain", gen_length=64, params={"k": 16}),
        row("topk", 0.25, 9.0, params={"k": 16}),
    ]
    assert markdown(rows).splitlines()[2:] == [
        "**Full diffusion; 100 held-out problems a task (seed 0)**",
        "",
        "| sampler | sort (16) | chain (64) |",
        "|---|---|---|",
        "| topk k=1 | 96.0 [90.2-98.4] / 1.00 |  |",
        "| threshold 0.9 | 90.0 [82.6-94.5] / 4.26 |  |",
        "| topk k=16 | 25.0 [17.5-34.3] / 9.00 | 50.0 [40.4-59.6] / 8.00 |",
    ]


def test_the_front_holds_what_nothing_beats() -> None:
    slow, middle, fast = row("topk", 0.99, 1.0), row("threshold", 0.95, 4.0), row("random", 0.5, 8.0)
    beaten = [row("random", 0.94, 3.0), row("topk", 0.95, 2.0), row("random", 0.4, 8.0)]
    assert pareto_front([beaten[0], fast, slow, *beaten[1:], middle]) == [slow, middle, fast]


def test_a_chat_goes_through_the_template_and_is_a_row_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    common = ("evaluate", "--model", tiny_model, *QUICK, "--json", file)
    right(*common)
    right(*common, "--chat")
    rows = read_json(file)["rows"]
    assert [row["chat"] for row in rows] == [False, False, True, True]
    loaded = load_model(str(tiny_model), device="cpu", dtype="float32")
    plain, chat = model_under_test(loaded), model_under_test(loaded, chat=True)
    assert chat.encode_prompt("Tom has") == plain.encode_prompt("user: Tom has\nassistant:")
    assert chat.encode("Tom has") == plain.encode("Tom has")
