"""Sentence embeddings of a sentence-transformers folder, loaded through transformers and computed once a text."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qmemtune.errors import UserError

MAX_TOKENS = 256
"""Longest instruction, in tokens, if the folder does not say."""
MODULES = "modules.json"
SETTINGS = "sentence_bert_config.json"
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
HASHED = (".json", ".txt", ".model", ".safetensors", ".bin")
NOT_HASHED = ("config_sentence_transformers.json",)
"""Holds the versions of the packages that wrote the folder."""


class SentenceEncoder:
    """Pooled and normalised sentence embeddings.

    Each text is encoded by itself, in float32, so that its embedding depends on nothing else. The model is loaded at
    the first text that the cache does not have.

    Args:
        folder: a sentence-transformers folder.
        digest: of the folder's content (:func:`folder_digest`); names the cache.
        device: where to compute.
        cache: folder for the cache of embeddings, one file an encoder; None keeps none.
    """

    def __init__(self, folder: Path, digest: str, device: torch.device, cache: Path | None = None) -> None:
        self.folder, self.device = folder, device
        self.dim = embedding_dim(folder)
        self.pooling = pooling_of(folder)
        self._cache = None if cache is None else EmbeddingCache(cache / f"{digest}.sqlite")
        self._loaded: tuple[Any, Any] | None = None

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm embeddings, (len(texts), E), float32."""
        known = {} if self._cache is None else self._cache.get(texts)
        new = {text: self._encode(text) for text in dict.fromkeys(texts) if text not in known}
        if new and self._cache is not None:
            self._cache.put(new)
        return torch.stack([known[text] if text in known else new[text] for text in texts]).to(self.device)

    @torch.no_grad()
    def _encode(self, text: str) -> Tensor:
        tokenizer, model = self._load()
        batch = tokenizer([text], truncation=True, max_length=max_tokens(self.folder), return_tensors="pt")
        with torch.autocast(self.device.type, enabled=False):
            hidden = model(**batch.to(self.device)).last_hidden_state[0].float()
        pooled = hidden.mean(dim=0) if self.pooling == "mean" else hidden[0]
        return F.normalize(pooled, dim=-1).cpu()

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoModel, AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
                model = AutoModel.from_pretrained(
                    self.folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
                )
            except (OSError, ValueError) as error:
                raise not_an_encoder(self.folder, str(error).splitlines()[0]) from error
            self._loaded = tokenizer, model.to(self.device).eval().requires_grad_(False)
        return self._loaded


class EmbeddingCache:
    """Embeddings by the digest of their text, in one SQLite file that several processes may use.

    It only saves work: a file that cannot be read or written is passed over.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def get(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The embeddings that are there, float32 vectors on the CPU."""
        found = {}
        try:
            with closing(self._open()) as database:
                for text in texts:
                    row = database.execute("SELECT vector FROM embeddings WHERE text = ?", (_key(text),)).fetchone()
                    if row is not None:
                        found[text] = torch.frombuffer(bytearray(row[0]), dtype=torch.float32)
        except (OSError, sqlite3.Error):
            return {}
        return found

    def put(self, embeddings: dict[str, Tensor]) -> None:
        """Keep embeddings."""
        rows = [(_key(text), vector.float().numpy().tobytes()) for text, vector in embeddings.items()]
        try:
            with closing(self._open()) as database, database:
                database.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?)", rows)
        except (OSError, sqlite3.Error):
            return

    def _open(self) -> sqlite3.Connection:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self.file, timeout=10)
        database.execute("CREATE TABLE IF NOT EXISTS embeddings (text BLOB PRIMARY KEY, vector BLOB NOT NULL)")
        return database


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def is_encoder(folder: Path) -> bool:
    """Whether a folder looks like one with a model."""
    return (folder / "config.json").is_file()


def folder_digest(folder: Path) -> str:
    """Digest of what decides an encoder's embeddings: names and bytes of weights, tokenizer and settings."""
    files = [f for f in folder.iterdir() if f.is_file() and f.suffix in HASHED and f.name not in NOT_HASHED]
    if any(f.suffix == ".safetensors" for f in files):
        files = [f for f in files if f.suffix != ".bin"]
    files += folder.glob("*_Pooling/config.json")
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]


def embedding_dim(folder: Path) -> int:
    """Width E of a folder's embeddings.

    Raises:
        UserError: the folder holds no encoder, or one that is more than a transformer with mean or first-token pooling.
    """
    from transformers import AutoConfig

    if not is_encoder(folder):
        raise not_an_encoder(folder, "there is no config.json in it" if folder.is_dir() else "there is no such folder")
    pooling_of(folder)
    try:
        return int(AutoConfig.from_pretrained(folder, trust_remote_code=False).hidden_size)
    except (OSError, ValueError, AttributeError) as error:
        raise not_an_encoder(folder, str(error).splitlines()[0]) from error


def pooling_of(folder: Path) -> str:
    """``mean`` or ``cls``: how a folder makes one vector of its tokens'; ``mean`` where it does not say.

    Raises:
        UserError: it has other modules, or pools in another way.
    """
    modules = _json(folder / MODULES, [])
    strange = [m["type"].rpartition(".")[2] for m in modules if m["type"].rpartition(".")[2] not in KNOWN_MODULES]
    if strange:
        raise not_an_encoder(folder, f"its module {strange[0]} is not supported")
    pooling = next((m for m in modules if m["type"].endswith("Pooling")), None)
    if pooling is None:
        return "mean"
    settings = _json(folder / pooling["path"] / "config.json", {})
    if "pooling_mode" in settings:
        chosen = [settings["pooling_mode"]] if isinstance(settings["pooling_mode"], str) else settings["pooling_mode"]
    else:
        chosen = [POOLINGS.get(k, k) for k, on in settings.items() if k.startswith("pooling_mode_") and on is True]
    if len(chosen) != 1 or chosen[0] not in POOLINGS.values():
        raise not_an_encoder(folder, f"its pooling ({', '.join(chosen) or 'none'}) is neither mean nor first token")
    return str(chosen[0])


def max_tokens(folder: Path) -> int:
    """Longest text of an encoder, in tokens."""
    return int(_json(folder / SETTINGS, {}).get("max_seq_length") or MAX_TOKENS)


def not_an_encoder(folder: Path, reason: str) -> UserError:
    """The error of a folder that cannot be used."""
    return UserError(
        f"no sentence encoder can be loaded: {reason}",
        where=f"adapter.prior_encoder={folder}",
        fix="give a sentence-transformers folder (config.json, tokenizer and weights), or 'base'",
    )


def _json(file: Path, default: Any) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else default
    except ValueError as error:
        raise not_an_encoder(file.parent, f"{file.name} is not JSON") from error
