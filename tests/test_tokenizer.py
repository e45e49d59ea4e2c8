"""common/tokenizer.py: golden ids, round trips, training. Ids of whole caption files are compared in tests/peers/."""

import gzip

import pytest
import torch

from common.tokenizer import Tokenizer, pieces
from tests.helpers import clip_merges

GOLDEN = {
    "hello world": [3306, 1002], "hello   world\n": [3306, 1002], "a photo of a cat": [320, 1125, 539, 320, 2368],
    "A Photo of a DOG.": [320, 1125, 539, 320, 1929, 269], "it's 2024!": [585, 568, 273, 271, 273, 275, 256],
    "don't": [847, 713], "I'LL GO": [328, 1342, 861], "12345": [272, 273, 274, 275, 276], "x_y": [343, 318, 344],
    "na\u00efve caf\u00e9": [1097, 35689, 563, 15304], "\u65e5\u672c\u8a9e": [39121, 44353, 34002, 508],
    "\U0001f642": [14860], "&amp; x": [261, 343], "test tokenization": [1628, 32634, 10847], "": [],
    "<|startoftext|>": [49406], "&amp;amp;": [261], "!": [256], "it\u2019s": [585, 568], "\uff43\uff41\uff54": [2368],
}  # fmt: skip


@pytest.fixture(scope="module")
def clip(shared):
    return Tokenizer.from_clip(shared / "clip" / "bpe_simple_vocab_16e6.txt.gz")


@pytest.fixture(scope="module")
def small():
    texts = ["a red circle on a dark background", "a blue square to the left of a red star", "two large stars"] * 3
    return Tokenizer.train(texts, 600)


def test_golden_ids(clip):
    assert len(clip) == 49408
    for text, ids in GOLDEN.items():
        assert clip.encode(text) == ids, text
    assert clip.ids["cat</w>"] == 2368 and clip.ids["!"] == 0 and clip.ids["a"] == 64


def test_hugging_face_folder_gives_the_same_ids(clip, tmp_path):
    clip.save(tmp_path / "merges.txt")
    other = Tokenizer.from_clip(tmp_path)
    assert other.ids == clip.ids
    assert other.encode("a photo of a platypus, isn't it?") == clip.encode("a photo of a platypus, isn't it?")


def test_padding_truncation_and_shape(clip):
    ids = clip(["a cat", "word " * 200, ""])
    assert ids.shape == (3, 77) and ids.dtype == torch.long
    assert ids[0].tolist()[:5] == [49406, 320, 2368, 49407, 0]
    assert ids[1, -1] == 49407 and (ids[1] == 49407).sum() == 1  # truncation keeps the end
    assert ids[2].tolist()[:3] == [49406, 49407, 0]
    assert clip("a cat", 8).shape == (1, 8)


@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        "\u00fcber \U0001f469\u200d\U0001f680 42\u00bd",
        "x" * 300,
        "it 's a b",
        "\u0645\u0631\u062d\u0628\u0627",
        "\u200b",
    ],
)
def test_round_trip(small, text):
    """Any text comes back up to blanks between pieces, also from a vocabulary that never saw it."""
    assert small.decode(small.encode(text)).replace(" ", "") == text.replace(" ", "").lower()
    assert small.encode(small.decode(small.encode(text))) == small.encode(text)


def test_training_merges_frequent_words_and_round_trips_through_a_file(small, tmp_path):
    assert len(small.encode("red")) == 1 and len(small.encode("circle")) == 1
    small.save(tmp_path / "m.txt")
    again = Tokenizer.load(tmp_path / "m.txt")
    assert again.merges == small.merges and again.encode("a red zebra!") == small.encode("a red zebra!")
    assert small.end == max(small.ids.values())  # pooling finds the largest id


def test_special_tokens_can_be_switched_off(clip):
    safe = Tokenizer(clip.merges, special=False)
    assert clip.encode("a <|endoftext|> b").count(clip.end) == 1
    assert safe.end not in safe.encode("a <|endoftext|> b") and safe.start not in safe.encode("<|startoftext|>")


def test_pieces_follow_unicode_categories():
    assert pieces("a1b") == ["a", "1", "b"]
    assert pieces("x\u00b2") == ["x", "\u00b2"]  # a superscript is a number, not a letter
    assert pieces("he's!?") == ["he", "'s", "!?"]
    assert pieces("2024") == list("2024")


def test_bad_files(tmp_path):
    (tmp_path / "a.txt").write_text("#version\na b c\n")
    (tmp_path / "b.txt.gz").write_bytes(b"not gzip")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "d.txt").write_text("#version\na b\n")
    with pytest.raises(ValueError, match="line 2"):
        Tokenizer.load(tmp_path / "a.txt")
    for name in ("b.txt.gz", "c.txt"):
        with pytest.raises(ValueError, match="merges file"):
            Tokenizer.load(tmp_path / name)
    with pytest.raises(ValueError, match="1 merges"):
        Tokenizer.from_clip(tmp_path / "d.txt")
    with pytest.raises(ValueError, match="vocab_size"):
        Tokenizer.train(["a"], 10)


def test_only_the_first_48894_lines_of_the_long_file_count(shared):
    path = shared / "clip" / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.open(path, "rt", encoding="utf-8").read().split("\n")
    assert len(lines) > 200_000 and len(Tokenizer.from_clip(path).merges) == 48894


# By hand ---------------------------------------------------------------------------------------------------------------


def test_ids_of_bytes_and_the_order_of_merges():
    plain = Tokenizer([])
    assert [plain.encode(t) for t in ("!", "a", "!a", "\u00ad")] == [
        [256],
        [320],
        [256, 320],
        [126, 511],
    ]  # the last: bytes C2 AD
    merges = [("b", "c"), ("a", "b"), ("a", "bc"), ("x", "y</w>")]
    tok = Tokenizer(merges)
    assert tok.encode("abcd") == [514, 64 + 3 + 256] and tok.encode("abcxy") == [514, 515]  # b c first, although a b is known
    assert tok.encode("abd") == [513, 64 + 3 + 256] and tok.encode("abab") == [513, 64, 65 + 256]
    assert (
        tok.encode("abcdabcdabcda") != tok.encode("abcdabcdabcd") == Tokenizer(merges).encode("abcdabcdabcd")
    )  # remembered whole
    assert (tok.start, tok.end, len(tok)) == (516, 517, 518)


def test_cleaning_by_hand():
    clean = Tokenizer([]).clean
    assert clean("  A\tRed\n&amp;amp; dog ") == "a red & dog" and clean("&amp;lt;b&gt;") == "<b>"
    assert clean("< &amp;amp; x") == "< & x"  # twice
    assert clean("\u2018a\u2019 \u201ab\u201b \u201cc\u201d \ufb01sh \uff21\u3000b") == "'a' 'b' \"c\" fish a b"
    assert clean("cafe\u0301") == clean("caf\u00e9") == "caf\u00e9"


def test_a_long_text_keeps_its_beginning_and_its_end_token():
    tok = Tokenizer([])
    ids = tok(["abcdef", "a", "abc"], 5)
    assert ids.tolist() == [[512, 64, 65, 66, 513], [512, 320, 513, 0, 0], [512, 64, 65, 66 + 256, 513]]
    assert tok.decode([512, 320, 513, 321]) == "a" and tok.decode([320, 321]) == "a b"


def test_training_counts_words_and_breaks_ties_in_order():
    assert Tokenizer.train(["ab ab ab cd", "cd ef"], 600).merges == [("a", "b</w>"), ("c", "d</w>")]  # no pair of "ef" twice
    assert Tokenizer.train(["zy zy ab ab"], 515).merges == [("a", "b</w>")]  # of equal ones the first; then it is full
    assert Tokenizer.train(["i've i've"], 600).merges == [("'", "v"), ("'v", "e</w>")]
    assert Tokenizer.train(["aaa aaa"], 600).merges == [("a", "a"), ("aa", "a</w>")]


def test_merges_behind_clips_last_one_are_not_read(tmp_path):
    clip_merges(tmp_path / "m.txt")
    with open(tmp_path / "m.txt", "a") as f:
        f.write("zz zz\nqq q\n")
    assert len(Tokenizer.from_clip(tmp_path / "m.txt")) == 49408
