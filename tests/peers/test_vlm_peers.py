"""methods/vlm.py against pycocoevalcap (coco-caption): CIDEr-D on COCO captions."""

import csv
import gzip

import pytest

from methods import vlm as M


@pytest.fixture(scope="module")
def captions(shared):
    """300 pictures of COCO with four references, the fifth caption is scored; plain words, as after tokenisation."""
    rows = list(
        csv.DictReader(gzip.decompress((shared / "coco_captions_val2017/captions.csv.gz").read_bytes()).decode().splitlines())
    )
    by_picture = {}
    for r in rows:
        by_picture.setdefault(r["image_id"], []).append(
            " ".join("".join(c if c.isalnum() else " " for c in r["caption"].lower()).split())
        )
    some = [c[:5] for c in by_picture.values() if len(c) >= 5][:300]
    return [c[0] for c in some], [c[1:] for c in some]


def test_cider(captions):
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.cider.cider import Cider

    given, references = captions
    gts, res = {i: r for i, r in enumerate(references)}, {i: [g] for i, g in enumerate(given)}
    assert M.cider_d(given, references) == pytest.approx(Cider().compute_score(gts, res)[0], rel=1e-6)
