"""Metrics against tiny cases done by hand and against slow implementations that share no code with the library."""
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rea2seg.metrics import (CONVENTIONS, Convention, MetricSettings, best_of, boundary, boundary_ious, candidate_recall, cluster_sums, compare_paired, count_pixels, iou_of, resample,
                             score_set)
from rea2seg.results import SCHEMA, choose, draw, rows_table, summarise
from rea2seg.settings import SettingsError

LISA, LENS, SESAME, ZERO = (Convention.load(n) for n in CONVENTIONS)


def slow_lisa(preds, labels):
    "LISA's rule by loops: 255 leaves both sums, an empty union counts 1; per-sample IoUs, intersection and union of the target class."
    ious, inter_sum, union_sum = [], 0, 0
    for p, label in zip(preds, labels, strict=True):
        inter = union = 0
        for y, x in itertools.product(*map(range, label.shape)):
            if label[y, x] == 255:
                continue
            inter += int(p[y, x] and label[y, x] == 1)
            union += int(p[y, x] or label[y, x] == 1)
        ious.append(inter / union if union else 1.0)
        inter_sum, union_sum = inter_sum + inter, union_sum + union
    return sum(ious) / len(ious), inter_sum / union_sum if union_sum else 0.0


def slow_background(preds, labels, empty):
    "LENS, SESAME (empty = 1) and Seg-Zero (empty = 0): only the pixels labelled 1 are the target, all others background, by sets of coordinates."
    ious, inter_sum, union_sum = [], 0, 0
    for p, label in zip(preds, labels, strict=True):
        a, b = set(zip(*np.nonzero(p), strict=True)), set(zip(*np.nonzero(label == 1), strict=True))
        ious.append(len(a & b) / len(a | b) if a | b else empty)
        inter_sum, union_sum = inter_sum + len(a & b), union_sum + len(a | b)
    return sum(ious) / len(ious), inter_sum / union_sum if union_sum else 0.0


pictures = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@settings(max_examples=60, deadline=None)
@given(pictures, st.integers(1, 6))
def test_every_convention_agrees_with_a_slow_one(rng, n):
    labels = [rng.choice([0, 1, 255], (5, 6), p=rng.choice([[.5, .4, .1], [1, 0, 0], [.5, 0, .5]])) for _ in range(n)]
    preds = [rng.random((5, 6)) < rng.choice([0, .3, .7]) for _ in range(n)]
    counts = np.concatenate([count_pixels(p[None], lab == 1, lab == 255) for p, lab in zip(preds, labels, strict=True)])
    small = MetricSettings.load(bootstrap=2)
    for convention, want in ((LISA, slow_lisa(preds, labels)), (LENS, slow_background(preds, labels, 1.0)), (SESAME, slow_background(preds, labels, 1.0)), (ZERO, slow_background(preds, labels, 0.0))):
        found = score_set(counts, convention, settings=small)
        assert (found["giou"], found["ciou"]) == pytest.approx(want)


def test_numbers_by_hand():
    "Truth: left half of 2x4. Predictions: it (4/4), all (4/8), a quarter of it (2/4), the other half (0/8), nothing against nothing."
    left = np.array([[1, 1, 0, 0]] * 2, bool)
    preds = np.stack([left, left | True, left & [[True], [False]], ~left])
    counts = count_pixels(preds, left)
    assert counts.tolist() == [[4, 4, 4], [4, 8, 8], [2, 4, 4], [0, 8, 8]]
    found = score_set(counts, LISA)
    assert found["giou"] == (1 + .5 + .5 + 0) / 4 and found["ciou"] == 10 / 24 and found["n"] == 4
    nothing = count_pixels(np.zeros((1, 2, 4), bool), left & False)
    both = np.concatenate([counts, nothing])
    assert score_set(both, LISA)["giou"] == pytest.approx(3 / 5) and score_set(both, ZERO)["giou"] == pytest.approx(2 / 5)
    assert score_set(both, LISA)["ciou"] == 10 / 24
    assert score_set(np.zeros((0, 3)), LISA)["n"] == 0 and score_set(np.zeros((0, 3)), LISA)["giou"] is None
    assert score_set(nothing, LISA)["ciou"] == 0.0


def test_ignored_pixels():
    truth, ignore = np.zeros((1, 6), bool), np.zeros((1, 6), bool)
    truth[0, :3] = ignore[0, 2:4] = True  # they overlap: ignored wins
    counts = count_pixels(np.array([[[1, 1, 1, 1, 1, 0]]], bool), truth, ignore)
    assert counts.tolist() == [[2, 3, 5]]
    assert iou_of(counts, LISA)[0] == 2 / 3 and iou_of(counts, LENS)[0] == 2 / 5
    only_ignored = count_pixels(ignore[None], truth & False, ignore)
    assert iou_of(only_ignored, LISA)[0] == 1 and iou_of(only_ignored, LENS)[0] == 0 and iou_of(only_ignored, ZERO)[0] == 0


def test_masks_must_fit():
    with pytest.raises(TypeError, match="masks must be bool.N,H,W. and truth bool.H,W. of one size, got bool.1, 2, 3. and bool.3, 2."):
        count_pixels(np.zeros((1, 2, 3), bool), np.zeros((3, 2), bool))
    with pytest.raises(TypeError, match="got float64"):
        count_pixels(np.zeros((1, 2, 3)), np.zeros((2, 3), bool))


def test_conventions_come_from_the_settings():
    assert (LISA.ignore, LENS.ignore, SESAME.ignore) == ("exclude", "background", "background")
    assert (LISA.empty_union, LENS.empty_union, SESAME.empty_union, ZERO.empty_union) == (1, 1, 1, 0)
    assert all(c.first_sentence_only for c in (LISA, LENS, SESAME, ZERO)) and Convention.load() == LISA
    assert Convention.load("lisa", first_sentence_only=False).first_sentence_only is False
    for bad in ({"ignore": "skip"}, {"empty_union": 2.0}):
        with pytest.raises(SettingsError):
            Convention.load("lisa", **bad)


@settings(max_examples=40, deadline=None)
@given(pictures, st.integers(1, 3))
def test_boundary_by_brute_force(rng, width):
    "A pixel belongs to the boundary if a pixel outside the mask, or outside the frame, lies within `width` in both directions."
    mask = rng.random((9, 11)) < .8
    padded = np.pad(mask, width)
    want = np.zeros_like(mask)
    for y, x in itertools.product(range(9), range(11)):
        want[y, x] = mask[y, x] and not padded[y:y + 2 * width + 1, x:x + 2 * width + 1].all()
    assert (boundary(mask, width) == want).all()


def test_boundary_iou():
    a = np.zeros((40, 40), bool)
    a[10:30, 10:30] = True
    b = np.zeros_like(a)
    b[12:30, 10:30] = True
    # width round(.02 * 56.57) = 1: rings of 76 and 72 pixels; they share the bottom row, and both sides from row 12 on
    shared = 20 + 17 * 2
    assert boundary_ious(b[None], a, .02)[0] == pytest.approx(shared / (76 + 72 - shared))
    assert boundary_ious(np.stack([a, a & False]), a, .02).tolist() == [1, 0]
    assert boundary_ious(a[None] & False, a & False, .02)[0] == 1
    ignore = np.zeros_like(a)
    ignore[:15] = True
    assert boundary_ious(b[None], a, .02, ignore)[0] == 1  # what differs is ignored
    whole = np.ones((40, 40), bool)
    assert boundary(whole, 1).sum() == 4 * 39  # the frame is a border


@settings(max_examples=40, deadline=None)
@given(pictures, st.integers(1, 15), st.integers(1, 5))
def test_top_k(rng, n, k):
    ious, scores = rng.integers(0, 4, n) / 4, rng.integers(0, 3, n) / 3
    order = sorted(range(n), key=lambda i: -scores[i])  # stable: equal scores keep their order
    assert ious[best_of(ious, np.argsort(-scores, kind="stable"), k)] == max(ious[i] for i in order[:k])
    assert best_of(ious) == ious.tolist().index(max(ious))
    assert candidate_recall(ious, (.5, .75)) == {"0.5": np.mean([i >= .5 for i in ious]), "0.75": np.mean([i >= .75 for i in ious])}


def test_bootstrap_is_the_bootstrap():
    "All 27 samples of three clusters, weighed equally, against many draws."
    sums = np.array([[1., 1], [4, 2], [9, 3]])
    exact = np.array([sum(sums[list(c)])[0] / sum(sums[list(c)])[1] for c in itertools.product(range(3), repeat=3)])
    draws = resample(sums, 40_000, 0)
    found = draws[:, 0] / draws[:, 1]
    assert found.mean() == pytest.approx(exact.mean(), abs=.01) and found.std() == pytest.approx(exact.std(), abs=.01)
    assert set(np.round(found, 6)) == set(np.round(exact, 6))
    assert (resample(sums, 50, 1) == resample(sums, 50, 1)).all() and (resample(sums, 50, 1) != resample(sums, 50, 2)).any()
    assert cluster_sums(np.array([[1.], [2], [4]]), ["b", "a", "b"]).tolist() == [[2], [5]]


def test_intervals_cover():
    "95 % intervals of the mean of clustered values hold the truth about 95 times in 100, and clearly less often when the clusters are forgotten."
    rng, hits, naive = np.random.default_rng(0), 0, 0
    config = MetricSettings.load(bootstrap=300)
    for trial in range(150):
        level = rng.uniform(20, 80, 40)
        inter = np.clip(rng.normal(level.repeat(6), 3), 0, 100).round()
        counts, clusters = np.stack([inter, np.full(240, 100), np.full(240, 100)], 1).astype(int), np.arange(40).repeat(6)
        lo, hi = score_set(counts, LISA, clusters, config, trial)["ci95"]
        hits += lo <= .5 <= hi
        lo, hi = score_set(counts, LISA, None, config, trial)["ci95"]
        naive += lo <= .5 <= hi
    assert 130 <= hits <= 150 and naive < 110, (hits, naive)


def test_paired_comparison():
    rng = np.random.default_rng(0)
    a = rng.uniform(0, 1, 200)
    better, other = np.clip(a + rng.normal(.03, .05, 200), 0, 1), rng.permutation(a)
    r = compare_paired(a, better)
    assert r["difference"] == pytest.approx((better - a).mean()) and r["ci95"][0] > 0 and r["p"] < .01 and r["wins"] + r["ties"] + r["losses"] == 200
    assert compare_paired(better, a)["difference"] == -r["difference"]
    null = compare_paired(a, other)
    assert null["ci95"][0] < 0 < null["ci95"][1] and null["p"] > .05
    wide = compare_paired(a, better, np.arange(200) // 100)
    assert wide["n"] == 200
    with pytest.raises(ValueError, match="the same samples are needed, got .200. and .3. values"):
        compare_paired(a, a[:3])


def record(k, **values):
    return {**dict.fromkeys(SCHEMA.names), "name": f"n{k}", "image_id": f"i{k}", "category": "spatial", "initial": [1, 4, 4], "initial_boundary": .25,
            "candidates": [[3, 4, 6], [4, 4, 8], [2, 4, 4]], "boundary": [.7, .9, .5], "sources": ["multimask", "kcore", "amg"], "predicted_ious": [.1, .2, .9], "stability": [1., 1., 1.],
            "scores": [.9, .3, .8], "ranking": [.9, .3, .8], "agreement": [0., 0., 1.], "attention": [.2, .7, .1], **values}


def test_rows_pick_what_they_say():
    config = MetricSettings.load()
    picks = choose(record(0), LISA, config, 0, 2)
    assert {r: i for r, i in picks.items() if r != "random"} == {"initial": -1, "rea2seg": 0, "top2": 0, "predicted_iou": 2, "attention": 1, "oracle": 1, "rea2seg+prior": 2}
    # with ignored pixels as background the unions grow: 3/6, 4/8, 2/4 are equal and the first wins
    assert choose(record(0), LENS, config, 0, 3)["oracle"] == 0
    assert "rea2seg" not in choose(record(0, scores=None, ranking=None), LISA, config, 0, 3)
    assert choose(record(0), LISA, config, 0, 3).keys() - choose(record(0, attention=None), LISA, config, 0, 3).keys() == {"attention"}
    draws = [choose(record(k), LISA, config, 7, 3)["random"] for k in range(300)]
    assert draws == [draw(f"n{k}", 7, 3) for k in range(300)] and all(70 < draws.count(i) < 130 for i in range(3))


def test_summary_of_records():
    rows = [record(k, category=("spatial", "geometric", None)[k % 3], subtype="x" if k % 3 else None) for k in range(30)]
    s = summarise(rows, LISA)
    assert list(s["rows"]) == ["initial", "rea2seg", "top3", "predicted_iou", "attention", "random", "oracle", "rea2seg+prior"]
    assert set(s["rows"]["initial"]) == {"spatial", "geometric", "overall"} and s["rows"]["initial"]["spatial"]["n"] == 10 and s["rows"]["initial"]["overall"]["n"] == 30
    assert [s["rows"][r]["overall"]["giou"] for r in ("initial", "rea2seg", "top3", "oracle", "rea2seg+prior")] == [.25, .75, 1, 1, .5]
    assert s["subtypes"]["oracle"].keys() == {"geometric/x"} and s["conventions"]["lens"]["rea2seg"]["giou"] == .5
    assert s["boundary_iou"]["oracle"]["overall"] == pytest.approx(.9)
    assert s["candidates"]["mean"] == 3 and s["candidates"]["picked"]["oracle"] == {"amg": 0, "kcore": 30, "multimask": 0} and s["candidates"]["recall"]["overall"] == {"0.5": 1, "0.75": 1}
    assert set(summarise(rows, LISA, rows=("oracle",))["rows"]) == {"oracle"}
    table = rows_table(rows, LISA, MetricSettings.load(), 0, 3)
    assert table["rea2seg_iou"].to_pylist() == [.75] * 30 and table["oracle_intersection"][0].as_py() == 4 and table["initial_pick"][0].as_py() == -1
