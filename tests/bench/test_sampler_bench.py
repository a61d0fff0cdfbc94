"""The benchmark of the loop gives every figure that it says; no time is asserted."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from server.bench.machine import machine
from server.bench.results import write_results
from server.bench.sampler import MIX, measure_sampler


def test_there_is_a_figure_for_each_sampler_number_of_rows_and_block_length(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    figures = list(measure_sampler(("topk", "mix"), rows=(1, len(MIX)), block_lengths=(4, 8), gen_length=8, steps=2))
    assert torch.get_num_threads() == threads
    file = tmp_path / "results.json"
    write_results(file, machine(), figures)
    written = json.loads(file.read_text())["results"]
    assert written == [asdict(figure) for figure in figures]
    assert all(each["name"] == "sampler_step_ms" and each["value"] > 0 for each in written)
    assert [each["detail"] for each in written] == [
        {"sampler": sampler, "rows": rows, "gen_length": 8, "block_length": block}
        for sampler in ("topk", "mix")
        for block in (4, 8)
        for rows in (1, len(MIX))
    ]
