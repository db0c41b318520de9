"Mask arithmetic against the slow and obvious way."
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pycocotools import mask as coco

from rea2seg.masks import areas, box_nms, boxes_xyxy, check_masks, from_rle, pairwise_iou, stability_score, to_rle

@st.composite
def some_masks(draw, n=None, least=1):
    "bool[N,H,W] of any density, empty and full ones included."
    N, H, W = n if n is not None else draw(st.integers(0, 5)), draw(st.integers(least, 9)), draw(st.integers(least, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return torch.from_numpy(rng.random((N, H, W)) < draw(st.sampled_from([0, .1, .5, .9, 1])))

def runs(mask):
    "Run lengths down the columns, background first."
    flat, out, value = mask.T.reshape(-1).tolist(), [0], False
    for v in flat:
        if v != value: out.append(0); value = v
        out[-1] += 1
    return out

@given(some_masks(n=1))
@settings(max_examples=150, deadline=None)
def test_rle_there_and_back(masks):
    mask = masks[0].numpy()
    rle = json.loads(json.dumps(to_rle(masks[0])))
    np.testing.assert_array_equal(from_rle(rle), mask); np.testing.assert_array_equal(coco.decode(rle), mask)
    assert rle["size"] == list(mask.shape) and rle == to_rle(mask) == to_rle(np.asfortranarray(mask))
    np.testing.assert_array_equal(from_rle({"size": list(mask.shape), "counts": runs(mask)}), mask)
    np.testing.assert_array_equal(from_rle(rle | {"counts": rle["counts"].encode()}), mask)

@given(some_masks(n=1, least=3), st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_rle_is_an_error_or_a_mask_of_its_size(masks, data):
    rle = to_rle(masks[0]); text = rle["counts"]
    at = data.draw(st.integers(0, len(text))); new = data.draw(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=3))
    try: mask = from_rle({"size": rle["size"], "counts": text[:at] + new + text[at + len(new) // 2:]})
    except ValueError: return
    assert mask.shape == tuple(rle["size"]) and mask.dtype == bool

@pytest.mark.parametrize("rle, says", [({}, "an RLE has 'size'"), (None, "an RLE has"), ({"size": [3], "counts": "a"}, "an RLE has"), ({"size": [2, 2], "counts": [1, 2]}, "add up to 3, size is 2x2"),
                                       ({"size": [2, 2], "counts": [-1, 5]}, "whole numbers from 0 on"), ({"size": [2, 2], "counts": ["4"]}, "whole numbers"), ({"size": [2, 2], "counts": 4}, "got int"), ({"size": [0, 4], "counts": []}, "not a picture's"), ({"size": [10**6, 10**6], "counts": "0"}, "not a picture's"),
                                       ({"size": [2, 2], "counts": "ÿ"}, "damaged at character 0"), ({"size": [2, 2], "counts": ""}, "add up to 0"), ({"size": [2, 2], "counts": "o"}, "damaged")], ids=str)
def test_nonsense_rle(rle, says):
    with pytest.raises(ValueError, match=says): from_rle(rle)

@given(some_masks())
@settings(max_examples=100, deadline=None)
def test_areas_and_boxes(masks):
    assert areas(masks).tolist() == [int(m.sum()) for m in masks]
    for mask, box in zip(masks.numpy(), boxes_xyxy(masks).tolist(), strict=True):
        y, x = mask.nonzero()
        assert box == ([x.min(), y.min(), x.max(), y.max()] if len(x) else [0, 0, 0, 0])

@given(some_masks(n=6), st.sampled_from([0.0, 1.0]))
@settings(max_examples=100, deadline=None)
def test_pairwise_iou(masks, empty):
    a, b = masks[:2], masks[2:]
    got = pairwise_iou(a, b, empty)
    for i in range(2):
        for j in range(4):
            union = int((a[i] | b[j]).sum())
            assert float(got[i, j]) == pytest.approx(int((a[i] & b[j]).sum()) / union if union else empty)
    assert torch.equal(got.T, pairwise_iou(b, a, empty)) and pairwise_iou(a[:0], b).shape == (0, 4)

@given(st.integers(0, 2**32 - 1), st.floats(0, 3), st.floats(-1, 1))
@settings(max_examples=60, deadline=None)
def test_stability(seed, offset, threshold):
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 7, 8)) * 2).float()
    got = stability_score(logits, offset, threshold)
    for l, s in zip(logits, got.tolist(), strict=True):
        high, low = int((l > threshold + offset).sum()), int((l > threshold - offset).sum())
        assert s == pytest.approx(high / low if low else 0) and 0 <= s <= 1
    assert torch.allclose(stability_score(logits[None], offset, threshold)[0], got) and float(stability_score(torch.full((4, 4), -99.), 1.0)) == 0

@given(st.integers(0, 2**32 - 1), st.floats(0.05, .95))
@settings(max_examples=60, deadline=None)
def test_box_nms_is_greedy(seed, most):
    rng = np.random.default_rng(seed)
    corner, size = rng.uniform(0, 20, (12, 2)), rng.uniform(1, 12, (12, 2))
    boxes, scores = np.hstack([corner, corner + size]).astype(np.float32), rng.permutation(12) / 12
    def iou(a, b):
        w, h = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
        inter = max(w, 0) * max(h, 0)
        return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)
    kept = []
    for i in np.argsort(-scores):
        if all(iou(boxes[i], boxes[k]) <= most for k in kept): kept.append(int(i))
    assert box_nms(torch.from_numpy(boxes), torch.from_numpy(scores), most).tolist() == kept

@pytest.mark.parametrize("bad, says", [(torch.zeros(2, 3), r"bool\[N,H,W\], got float32\[2, 3\]"), (torch.zeros(1, 2, 3), r"got float32\[1, 2, 3\]"), (np.zeros((2, 3), bool), r"got bool\[2, 3\]"), (torch.zeros(1, 2, 3, dtype=torch.uint8), "got uint8")])
def test_what_is_no_mask(bad, says):
    for function in (check_masks, areas, boxes_xyxy):
        with pytest.raises(TypeError, match=says): function(bad)
    with pytest.raises(TypeError, match=r"mask must be bool\[H,W\]"): to_rle(bad[None] if bad.ndim == 2 else bad)
    with pytest.raises(ValueError, match="masks of two sizes"): pairwise_iou(torch.zeros(1, 2, 3, dtype=torch.bool), torch.zeros(1, 3, 2, dtype=torch.bool))
