from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qmemtune.config.model import ModelConfig
from qmemtune.errors import UserError
from qmemtune.models.loading import load_tokenizer


def with_tokens(source: Path, folder: Path, **tokens: str | None) -> ModelConfig:
    """A copy of a model's tokenizer with other special tokens."""
    shutil.copytree(source, folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.update(tokens)
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return ModelConfig(path=str(folder))


def test_own_pad_token_stays(tiny_llama_dir: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_llama_dir)))
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.chat_template


def test_a_mark_at_the_beginning_of_a_template_is_no_part_of_it(tiny_llama_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8-sig")
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_llama_dir), chat_template=str(file)))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"pad_token": None}, "<|pad|>"),  # kept by the vocabulary
        ({"pad_token": "<|im_end|>"}, "<|pad|>"),  # the same as the end token
    ],
)
def test_pad_token_differs_from_the_end_token(
    tiny_llama_dir: Path, tmp_path: Path, tokens: dict[str, str | None], expected: str
) -> None:
    tokenizer = load_tokenizer(with_tokens(tiny_llama_dir, tmp_path / "m", **tokens))
    assert tokenizer.pad_token == expected
    assert len(tokenizer) == len(load_tokenizer(ModelConfig(path=str(tiny_llama_dir))))


@pytest.mark.parametrize(("unknown", "expected"), [("<|endoftext|>", "<|endoftext|>"), (None, "<|im_end|>")])
def test_pad_token_falls_back(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unknown: str | None, expected: str
) -> None:
    monkeypatch.setattr("qmemtune.models.loading.PAD_TOKENS", ())
    config = with_tokens(tiny_llama_dir, tmp_path / "m", pad_token=None, unk_token=unknown)
    assert load_tokenizer(config).pad_token == expected


def test_no_token_to_pad_with(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmemtune.models.loading.PAD_TOKENS", ())
    with pytest.raises(UserError, match="no pad, unknown or end token"):
        load_tokenizer(with_tokens(tiny_llama_dir, tmp_path / "m", pad_token=None, unk_token=None, eos_token=None))


def test_tokenizer_from_elsewhere_and_without_template(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with_tokens(tiny_llama_dir, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").unlink()
    (tmp_path / "m" / "model.safetensors").unlink()
    tokenizer = load_tokenizer(ModelConfig(path="nobody/offline", tokenizer=str(tmp_path / "m")))
    assert tokenizer.chat_template is None


def test_folder_without_tokenizer(tiny_llama_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path / "m")
    for file in (tmp_path / "m").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="no usable tokenizer") as caught:
        load_tokenizer(ModelConfig(path=str(tmp_path / "m")))
    assert "model.tokenizer=" in (caught.value.findings[0].fix or "")


def test_chat_template_file(tiny_llama_dir: Path, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_llama_dir), chat_template=str(template)))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "[x]"
    template.write_text("{% for m in %}")
    with pytest.raises(UserError, match="not a Jinja template"):
        load_tokenizer(ModelConfig(path=str(tiny_llama_dir), chat_template=str(template)))
    with pytest.raises(UserError, match="cannot read"):
        load_tokenizer(ModelConfig(path=str(tiny_llama_dir), chat_template=str(tmp_path / "none.jinja")))
