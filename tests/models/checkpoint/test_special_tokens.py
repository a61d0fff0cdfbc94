"""End tokens and the mask token, by configuration files and tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from server.backends.loading import load_model
from tests.backends.test_loading import edit_json
from tests.decoders import FAST_DLLM, SDAR, SDAR_MOE, write_decoder
from tests.models.checkpoint.folders import FAMILIES, Write, drop, line_of
from tests.tiny import tiny_tokenizer, write_tiny_model
from tests.tiny_gemma import write_tiny_gemma
from tests.tiny_moe import llada2_config, llada_moe_config, write_model


@pytest.mark.parametrize("name", FAMILIES)
def test_ends_may_be_in_generation_config_only(tmp_path: Path, name: str) -> None:
    folder = FAMILIES[name](tmp_path / "m")
    drop(folder / "config.json", "eos_token_id", "pad_token_id")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    before = load_model(str(folder)).backend.info.end_ids
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_model(str(folder)).backend.info.end_ids == before | {9} and 7 in before


@pytest.mark.parametrize("name", FAMILIES)
def test_ends_of_both_files_count(tmp_path: Path, name: str) -> None:
    folder = FAMILIES[name](tmp_path / "m")
    edit_json(folder / "config.json", eos_token_id=[7, 8])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert load_model(str(folder)).backend.info.end_ids >= {7, 8, 9}


def test_diffusion_gemmas_ends_may_be_at_the_top(tmp_path: Path) -> None:
    folder = write_tiny_gemma(tmp_path / "m")
    edit_json(folder / "config.json", eos_token_id=[1, 6, 50])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 51]}))
    assert load_model(str(folder)).backend.info.end_ids == {1, 6, 50, 51}
    edit_json(folder / "config.json", eos_token_id=[1, 10**6])
    assert "eos_token_id = 1000000 is outside the vocabulary" in line_of(folder)


def test_the_tokenizers_end_counts_where_no_file_names_one(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    drop(folder / "config.json", "eos_token_id", "pad_token_id")
    assert load_model(str(folder)).backend.info.end_ids == {1}
    drop(folder / "tokenizer_config.json", "eos_token")
    assert load_model(str(folder)).backend.info.end_ids == frozenset()


def with_tokens(folder: Path, *tokens: str) -> list[int]:
    """Add tokens to a folder's tokenizer and rows to its model; their ids."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(list(tokens))
    size = tokenizer.get_vocab_size()
    write_tiny_model(folder, vocab_size=size, embedding_size=size)
    tokenizer.save(str(folder / "tokenizer.json"))
    drop(folder / "config.json", "mask_token_id")
    return [tokenizer.token_to_id(token) for token in tokens]


def mask_of(folder: Path) -> int | None:
    return load_model(str(folder), device="cpu").backend.info.mask_id


def test_a_family_without_a_mask_token_does_not_mind_one_that_is_written_down(tmp_path: Path) -> None:
    """Gemma's tokenizers have one; transformers' class leaves the entry alone."""
    folder = write_tiny_gemma(tmp_path / "m")
    edit_json(folder / "config.json", mask_token_id=4)
    assert mask_of(folder) is None


def test_a_mask_token_among_the_models_own_is_declared_too(tmp_path: Path) -> None:
    """As transformers 5 writes names that not every model has."""
    folder = tmp_path / "m"
    hole, _ = with_tokens(folder, "<hole>", "<|mdm_mask|>")
    drop(folder / "tokenizer_config.json", "mask_token")
    edit_json(folder / "tokenizer_config.json", extra_special_tokens={"mask_token": "<hole>"})
    assert mask_of(folder) == hole


def test_a_null_in_one_file_leaves_the_other_its_word(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    hole, _ = with_tokens(folder, "<hole>", "<|mdm_mask|>")
    edit_json(folder / "tokenizer_config.json", mask_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"mask_token": "<hole>"}))
    assert mask_of(folder) == hole


@pytest.mark.parametrize("spelt", ["<hole>", {"content": "<hole>", "special": True}])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_tokenizers_mask_token_counts_where_the_configuration_names_none(
    tmp_path: Path, file: str, spelt: Any
) -> None:
    folder = tmp_path / "m"
    hole, _ = with_tokens(folder, "<hole>", "<|mdm_mask|>")
    drop(folder / "tokenizer_config.json", "mask_token")
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {"mask_token": spelt}))
    assert mask_of(folder) == hole


def test_generation_config_may_name_the_mask(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    hole, other = with_tokens(folder, "<hole>", "<|mdm_mask|>")
    (folder / "generation_config.json").write_text(json.dumps({"mask_token_id": hole, "eos_token_id": 1}))
    edit_json(folder / "tokenizer_config.json", mask_token="<|mdm_mask|>")
    assert mask_of(folder) == hole, "a number that a program reads counts more than a token's name"
    edit_json(folder / "config.json", mask_token_id=other)
    assert mask_of(folder) == other


def test_a_tokenizer_that_contradicts_the_configuration_is_told_of(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    hole, _ = with_tokens(folder, "<hole>", "<|mdm_mask|>")
    edit_json(folder / "config.json", mask_token_id=hole)
    edit_json(folder / "tokenizer_config.json", mask_token="<hole>")
    with capture_logs() as said:
        assert mask_of(folder) == hole
    assert said == []
    edit_json(folder / "tokenizer_config.json", mask_token="<|mdm_mask|>")
    with capture_logs() as said:
        assert mask_of(folder) == hole
    assert ["the tokenizer declares another one" in each["event"] for each in said] == [True]


@pytest.mark.parametrize(
    ("write", "token"),
    [
        (lambda path: write_tiny_model(path), "<|mdm_mask|>"),
        (lambda path: write_model(path, llada2_config()), "<|mask|>"),
        (lambda path: write_model(path, llada_moe_config()), "<|mask|>"),
        (lambda path: write_decoder(path, SDAR), "<|MASK|>"),
        (lambda path: write_decoder(path, SDAR), "<MASK>"),
        (lambda path: write_decoder(path, SDAR_MOE), "<|MASK|>"),
        (lambda path: write_decoder(path, FAST_DLLM), "|<MASK>|"),
    ],
)
def test_the_familys_own_mask_token_is_known_by_its_name(tmp_path: Path, write: Write, token: str) -> None:
    """Here it has another id than the published one."""
    folder = write(tmp_path / "m")
    drop(folder / "config.json", "mask_token_id")
    drop(folder / "tokenizer_config.json", "mask_token")
    content = (folder / "tokenizer.json").read_text()
    known = json.loads(content)["added_tokens"][0]["content"]
    (folder / "tokenizer.json").write_text(content.replace(json.dumps(known), json.dumps(token)))
    assert mask_of(folder) == 0


def test_the_published_id_counts_only_where_the_tokenizer_has_a_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.models.families import registry

    folder = tmp_path / "m"
    masked, plain, word = with_tokens(folder, "[MASK]", "<blank>", "unmasked")
    drop(folder / "tokenizer_config.json", "mask_token")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace("<|mdm_mask|>", "<gone>"))
    family = registry.ARCHITECTURES["LLaDAModelLM"]
    for published, found in ((masked, masked), (plain, None), (word, None), (126336, None)):
        changed = type(family)(**(vars(family) | {"mask_token_id": published}))
        monkeypatch.setitem(registry.ARCHITECTURES, "LLaDAModelLM", changed)
        if found is not None:
            assert mask_of(folder) == found
        else:
            assert line_of(folder).endswith(
                "config.json: mask_token_id is not given, and the tokenizer neither declares a mask_token nor has "
                "<|mdm_mask|>"
            )


def test_a_declared_mask_outside_the_models_vocabulary(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"mask_token_id": 126336}))
    drop(folder / "config.json", "mask_token_id")
    assert "mask_token_id = 126336 is outside the vocabulary" in line_of(folder)
