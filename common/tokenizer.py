"""Byte-level BPE, id for id CLIP's tokenizer; also trains a small vocabulary of its own.

Text is cleaned (HTML unescaped twice, white space collapsed, lower case), cut into pieces (letter runs, single digits,
runs of other signs, English contractions), each piece becomes UTF-8 bytes shown as characters, the last one marked
`</w>`; then the known pair of lowest rank is merged until none is left. Since no piece crosses white space, whole
blank-separated chunks are cached: a caption costs one dictionary look-up a word.

Ids: 0-255 bytes, 256-511 the same at a word's end, then one id a merge, start of text, end of text (always the largest).

Upstream runs ftfy first. Of what it mends, typographic quotes, ligatures and full-width forms are done here; wrongly
decoded text is not.
"""

from __future__ import annotations

import gzip
import html
import os
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import torch

START, END = "<|startoftext|>", "<|endoftext|>"
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
# What ftfy does to clean text: curly quotes, the fi and ffi ligatures, full-width ASCII and the ideographic space
TYPOGRAPHY = {
    **dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
    **{c: unicodedata.normalize("NFKC", chr(c)) for c in [*range(0xFB00, 0xFB07), *range(0xFF01, 0xFF5F), 0x3000]},
}
CLIP_MERGES = 49152 - 256 - 2  # how many lines of OpenAI's longer file count


def _unescape(text: str) -> str:
    try:
        return html.unescape(html.unescape(text))
    except ValueError:  # "&#" and thousands of digits
        return text


def _byte_symbols() -> list[tuple[int, str]]:
    """(byte, printable character that stands for it) of all 256 bytes, in CLIP's id order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in set(plain)]
    return [(b, chr(b)) for b in plain] + [(b, chr(256 + i)) for i, b in enumerate(rest)]


def _kind(c: str) -> str:
    """L letter, N number, O other: by Unicode category, not by isalpha (superscripts are numbers here)."""
    k = unicodedata.category(c)[0]
    return k if k in "LN" else "O"


def pieces(chunk: str, special: bool = True) -> list[str]:
    """Cuts a chunk without white space, leftmost rule first: special tokens, contractions, then runs of one kind."""
    out, i = [], 0
    while i < len(chunk):
        heads = ((START, END) if special else ()) + CONTRACTIONS
        word = next((h for h in heads if chunk.startswith(h, i)), None)
        if word is None:
            kind, j = _kind(chunk[i]), i + 1
            while kind != "N" and j < len(chunk) and _kind(chunk[j]) == kind:
                j += 1
            word = chunk[i:j]
        out.append(word)
        i += len(word)
    return out


class Tokenizer:
    """merges: pairs of symbols, in rank order. special: whether text may spell the start and end tokens (upstream: yes;
    switch it off for untrusted text, an injected end token moves CLIP's pooling position)."""

    def __init__(self, merges: list[tuple[str, str]], special: bool = True):
        table = _byte_symbols()
        self.byte_to_symbol = dict(table)
        symbols = [c for _, c in table]
        vocab = symbols + [c + "</w>" for c in symbols] + [a + b for a, b in merges] + [START, END]
        self.merges, self.special = list(merges), special
        self.ids = {symbol: i for i, symbol in enumerate(vocab)}
        self.symbols = vocab
        self.symbol_to_byte = {c: b for b, c in table}
        self.ranks = {pair: i for i, pair in enumerate(self.merges)}
        self.start, self.end = len(vocab) - 2, len(vocab) - 1
        self.cache: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.symbols)

    # Files: one merge a line after a header line, which is both OpenAI's and Hugging Face's form ---------------------

    @classmethod
    def load(cls, path, limit: int | None = None) -> Tokenizer:
        """Merges file (.txt or .txt.gz), or a folder with merges.txt (and vocab.json, which it implies)."""
        path = Path(path)
        path = path / "merges.txt" if path.is_dir() else path
        try:
            data = gzip.open(path, "rt", encoding="utf-8").read() if path.suffix == ".gz" else path.read_text("utf-8")
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is not a merges file in UTF-8 text, plain or gzip ({error})") from error
        pairs = [tuple(line.split(" ")) for line in data.splitlines()[1:] if line.strip()][:limit]
        known = {c for _, c in _byte_symbols()}
        bad = next(
            (i for i, p in enumerate(pairs) if len(p) != 2 or not known.issuperset("".join(p).replace("</w>", ""))), None
        )
        if bad is not None or not pairs:
            raise ValueError(f"{path}: line {(bad or 0) + 2} is not a pair of symbols; expected CLIP's merges file")
        return cls(pairs)

    @classmethod
    def from_clip(cls, path) -> Tokenizer:
        """bpe_simple_vocab_16e6.txt.gz, or a Hugging Face folder with vocab.json and merges.txt: 49,408 ids."""
        tok = cls.load(path, limit=CLIP_MERGES)
        if len(tok.merges) != CLIP_MERGES:
            raise ValueError(f"{path} holds {len(tok.merges)} merges, CLIP's vocabulary has {CLIP_MERGES}")
        return tok

    def save(self, path) -> None:
        tmp = f"{path}.tmp"
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        Path(tmp).write_text("\n".join(lines) + "\n", "utf-8")
        os.replace(tmp, path)

    @classmethod
    def train(cls, texts, vocab_size: int) -> Tokenizer:
        """Merges the most frequent pair until the vocabulary is full or no pair occurs twice (ties: first in order)."""
        tok = cls([])
        if vocab_size < len(tok):
            raise ValueError(f"vocab_size {vocab_size} is below the {len(tok)} ids that bytes and special tokens need")
        counts = Counter(p for text in texts for chunk in tok.clean(text).split() for p in pieces(chunk))
        words = [(tok._spell(word), n) for word, n in counts.items() if word not in (START, END)]
        merges = []
        while len(tok) + len(merges) < vocab_size:
            pairs: Counter = Counter()
            for symbols, n in words:
                for pair in zip(symbols, symbols[1:]):
                    pairs[pair] += n
            best = min(pairs, key=lambda p: (-pairs[p], p), default=None)
            if best is None or pairs[best] < 2:
                break
            merges.append(best)
            words = [(_merge(symbols, best), n) for symbols, n in words]
        return cls(merges)

    # Text -> ids -> text --------------------------------------------------------------------------------------------

    def clean(self, text: str) -> str:
        if "&" in text and "<" not in text:  # ftfy does so first, and CLIP once more
            text = _unescape(text)
        text = text if text.isascii() else unicodedata.normalize("NFC", text.translate(TYPOGRAPHY))
        text = _unescape(text) if "&" in text else text
        return " ".join(text.split()).lower()

    def _spell(self, word: str) -> list[str]:
        symbols = [self.byte_to_symbol[b] for b in word.encode("utf-8", "replace")]
        return symbols[:-1] + [symbols[-1] + "</w>"]

    def _chunk(self, chunk: str) -> list[int]:
        out = []
        for word in pieces(chunk, self.special):
            if self.special and word in (START, END):
                out.append(self.ids[word])
                continue
            symbols = self._spell(word)
            while len(symbols) > 1:
                pair = min(zip(symbols, symbols[1:]), key=lambda p: self.ranks.get(p, 1 << 30))
                if pair not in self.ranks:
                    break
                symbols = _merge(symbols, pair)
            out += [self.ids[s] for s in symbols]
        if len(self.cache) > 1 << 20:  # web text has endless words; memory has not
            self.cache.clear()
        self.cache[chunk] = out
        return out

    def encode(self, text: str) -> list[int]:
        """Ids without start and end."""
        cache, out = self.cache, []
        for chunk in self.clean(text).split():
            ids = cache.get(chunk)
            out += self._chunk(chunk) if ids is None else ids
        return out

    def decode(self, ids) -> str:
        """Cleaned text; start, end and what follows the end are dropped."""
        ids = [int(i) for i in ids]
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        text = "".join(self.symbols[i] for i in ids if i != self.start)
        data = bytearray()
        for part in text.split("</w>"):
            data += bytes(self.symbol_to_byte[c] for c in part) + b" "
        return data.decode("utf-8", "replace").strip()

    def __call__(self, texts: str | list[str], context_length: int = 77) -> torch.Tensor:
        """(B, context_length) int64: start, ids, end, padded with 0; too long texts keep their beginning and the end token.
        Id 0 is a real token ("!"): find a text's length by its end token, not by zeros."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = []
        for text in texts:
            ids = [self.start, *self.encode(text)[: context_length - 2], self.end]
            rows.append(ids + [0] * (context_length - len(ids)))
        return torch.tensor(rows, dtype=torch.long).view(len(texts), context_length)


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """All occurrences of the pair, left to right."""
    out, i = [], 0
    while i < len(symbols):
        if i + 1 < len(symbols) and symbols[i] == pair[0] and symbols[i + 1] == pair[1]:
            out.append(pair[0] + pair[1])
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out
