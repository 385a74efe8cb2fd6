"""Captions as a fixed number of token ids."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from tokenizers_vq.files import check_format_version, read_json, shortened, write_text_atomically

PAD, NULL, END = "[PAD]", "[NULL]", "[END]"
SPECIAL = (PAD, NULL, END)
LONGEST = 1 << 12  # tokens of a caption, at most

log = logging.getLogger(__name__)


class TextTokenizer:
    """Byte-level BPE, so that any prompt can be encoded, cut or padded to one fixed length.

    The null condition is a token of its own, repeated: its embedding is a row of the model's table and is trained
    like any other.

    Args:
        bpe: a trained tokenizer that knows the special tokens.
        length: T, tokens of every encoded caption.

    Raises:
        ValueError: if a special token is missing from ``bpe``, its ids are not 0, 1, 2, ..., it cuts captions itself, is no
            BPE, has dropout or a regular expression, or ``length`` is less than 1 or more than ``LONGEST``.
    """

    def __init__(self, bpe: Tokenizer, length: int = 32) -> None:
        if not 1 <= length <= LONGEST:
            raise ValueError(f"length is {length}, expected at least 1 and at most {LONGEST}")
        if bpe.truncation is not None:
            raise ValueError(f"truncation is {bpe.truncation}, expected none: length says it")
        _check_parts(json.loads(bpe.to_str()))
        known = bpe.get_vocab()
        missing = [token for token in SPECIAL if token not in known]
        if missing:
            raise ValueError(f"the BPE vocabulary lacks the special tokens {missing}")
        # an embedding has a row for each id
        if sorted(known.values()) != list(range(len(known))):
            raise ValueError(
                f"the BPE vocabulary has {len(known)} tokens with ids up to {max(known.values())}, "
                "expected the ids 0, 1, 2, ..., each once"
            )
        self.bpe = bpe
        bpe.encode_special_tokens = True  # special tokens typed by a user are text, not commands
        self.length = length
        self._pad, self._null, self._end = (known[token] for token in SPECIAL)

    @classmethod
    def train(
        cls, captions: Iterable[str], vocabulary: int = 2048, length: int = 32
    ) -> TextTokenizer:
        """Learn a vocabulary from captions.

        Raises:
            ValueError: if ``vocabulary`` is too small to hold all bytes and the special tokens.
        """
        least = 256 + len(SPECIAL)
        if vocabulary < least:
            raise ValueError(f"vocabulary is {vocabulary}, expected at least {least}")
        # a fresh object each time: training one twice changes its vocabulary but keeps the old merges in a cache
        bpe = Tokenizer(models.BPE())
        bpe.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(captions, trainer)
        return cls(bpe, length)

    @property
    def vocabulary(self) -> int:
        """Number of token ids, special ones included."""
        return self.bpe.get_vocab_size()

    @property
    def null_condition(self) -> Tensor:
        """The null condition, ids (T,)."""
        return torch.full((self.length,), self._null)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions -> ids (B, T), int64. Captions that are too long are cut, and one warning says so.

        Raises:
            TypeError: if ``captions`` is a single string, or an entry is none.
        """
        if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
            raise TypeError(f"captions is {captions!r}, expected a list of strings")
        ids = torch.full((len(captions), self.length), self._pad)
        cut: list[tuple[str, str]] = []
        for row, encoding in enumerate(self.bpe.encode_batch(list(captions))):
            tokens = encoding.ids
            if len(tokens) > self.length:
                cut.append((captions[row], self.bpe.decode(tokens[self.length :])))
            tokens = [*tokens, self._end][: self.length]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        if cut:
            log.warning(
                "%d of %d captions are longer than %d tokens and were cut; of the first, %r, "
                "this is not seen: %r",
                len(cut),
                len(captions),
                self.length,
                *cut[0],
            )
        return ids

    def decode(self, ids: Tensor) -> list[str]:
        """Ids (B, T) -> captions, without padding."""
        return [text.strip() for text in self.bpe.decode_batch(ids.tolist())]

    def save(self, file: Path | str) -> None:
        """Write everything into one JSON file; the length is kept as the padding rule."""
        copy = Tokenizer.from_str(self.bpe.to_str())
        copy.enable_padding(length=self.length, pad_id=self._pad, pad_token=PAD)
        write_text_atomically(copy.to_str(pretty=True), Path(file))

    @classmethod
    def load(cls, file: Path | str) -> TextTokenizer:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds something else, or another release wrote it.
        """
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"no text tokenizer at {file}")
        try:
            values = read_json(file)
            # the format is that of the library tokenizers; a release that changes ours will say so
            check_format_version(values)
            values.pop("format_version", None)
            _check_parts(values)
            bpe = Tokenizer.from_str(json.dumps(values))
        except OSError:
            raise
        except Exception as error:  # the library raises plain Exception for anything unreadable
            raise ValueError(f"{file} is no tokenizer file: {shortened(error)}") from error
        length = (bpe.padding or {}).get("length")
        if not length:
            raise ValueError(f"{file} states no fixed length")
        bpe.no_padding()
        try:
            return cls(bpe, length)
        except ValueError as error:
            raise ValueError(f"{file}: {shortened(error)}") from error


def _check_parts(values: Mapping[str, Any]) -> None:
    """Refuse what the library would take, and run into later; a regular expression can take for ever on some texts.

    Args:
        values: what the library's JSON of a tokenizer holds.

    Raises:
        ValueError: names what.
    """
    model = values.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ValueError("model is no BPE")
    if model.get("dropout"):
        raise ValueError(f"model: dropout is {model['dropout']!r}, expected none: it would draw")
    for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        parts = [values.get(name)]
        while parts:
            part = parts.pop()
            if isinstance(part, dict) and "Regex" in part:
                raise ValueError(
                    f"{name} holds the regular expression {part['Regex']!r:.200}, expected none"
                )
            if isinstance(part, dict | list):
                parts += part.values() if isinstance(part, dict) else part
