"""WordNet's data.* files to the synonym table of the text edits: one line a word, word<TAB>synonym,synonym,...

python data_prep/wordnet.py --dict /usr/share/wordnet --out data/synonyms.tsv        (Debian: package wordnet-base)

A synonym shares a synset with the word, in any part of speech; only lower-case letters and spaces, as in EDA.
WordNet 3.0, Princeton University: free for any use with its copyright notice.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from common import cli


@dataclass(frozen=True)
class Config:
    dict: str  # folder with data.noun, data.verb, data.adj, data.adv
    out: str  # file to write


def synsets(text: str, path: str):
    """Yields the words of each synset. A line: offset, file, type, word count (hex), then word and sense id in turn."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("  "):  # the licence
            continue
        fields = line.split(" ")
        try:
            count = int(fields[3], 16)
            words = fields[4 : 4 + 2 * count : 2]
            if len(words) != count:
                raise ValueError("too few words")
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path}: line {number} is not a synset ({error})") from error
        yield [re.sub(r"\((a|p|ip)\)$", "", w).replace("_", " ").replace("-", " ") for w in words]  # "galore(ip)"


def run(cfg: Config) -> int:
    table: dict[str, set[str]] = {}
    for kind in ("noun", "verb", "adj", "adv"):
        path = Path(cfg.dict, f"data.{kind}")
        if not path.exists():
            raise ValueError(f"{path} does not exist; --dict must hold WordNet's data.noun, data.verb, data.adj, data.adv")
        for words in synsets(path.read_text("utf-8", "replace"), str(path)):
            words = sorted({w.lower() for w in words if re.fullmatch(r"[A-Za-z ]+", w)})
            for w in words if len(words) > 1 else []:
                if " " not in w:  # captions are edited word by word
                    table.setdefault(w, set()).update(v for v in words if v != w)
    lines = [f"{w}\t{','.join(sorted(table[w]))}\n" for w in sorted(table)]
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    tmp = f"{cfg.out}.tmp"
    Path(tmp).write_text("".join(lines), "utf-8")
    os.replace(tmp, cfg.out)
    print(f"{cfg.out}: {len(table)} words, {sum(map(len, table.values()))} synonyms")
    print("licence: WordNet 3.0 licence, Princeton University; keep its copyright notice")
    return len(table)


if __name__ == "__main__":
    cli.main(run, Config)
