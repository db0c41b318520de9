"""Seed points: region means, shares, sampling, edge cases."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings as hyp, strategies as st

from rea2seg.records import Grounding
from rea2seg.seeds import _pixels, allocate, region_means, seed_points
from rea2seg.settings import Settings

S = Settings.load("lens")


def grounding(attention, logits, boxes=None, grid=None):
    H, W = logits.shape
    grid = grid or tuple(attention.shape)
    h, w = grid
    if boxes is None:
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        boxes = torch.stack([x * W / w, y * H / h, (x + 1) * W / w, (y + 1) * H / h], -1).view(-1, 4).float()
    return Grounding(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8, 8), attention.reshape(1, -1), logits, boxes, grid)


@hyp(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 10**6))
def test_region_means_against_supersampling(H, W, seed):
    "Boxes on a grid of quarter pixels: the mean over sub-pixels is exact."
    rng = np.random.default_rng(seed)
    L = torch.from_numpy(rng.normal(size=(H, W)) * 10).float()
    fine = L.repeat_interleave(4, 0).repeat_interleave(4, 1)
    q = np.sort(rng.integers(-8, 4 * max(H, W) + 9, (6, 2, 2)), axis=1) # [box, low/high, x/y], quarter pixels
    boxes = torch.from_numpy(q.reshape(6, 4) / 4).float()
    means, inside = region_means(L, boxes)
    for (x0, y0, x1, y1), mean, ok in zip(q.reshape(6, 4), means, inside, strict=True):
        part = fine[max(y0, 0):max(y1, 0), max(x0, 0):max(x1, 0)]
        if x1 > x0 and y1 > y0:
            assert ok == (part.numel() > 0)
            if ok: assert abs(part.double().mean() - mean) < 1e-4
            else: assert mean == -torch.inf


def test_region_without_area_is_the_pixel_that_holds_it():
    L = torch.arange(20.).view(4, 5)
    means, inside = region_means(L, torch.tensor([[2.3, 1.7, 2.3, 1.7], [-1, 1, -1, 2], [5, 0, 5, 4], [0, 0, 5, 0], [4, 3, 3, 2]]))
    assert means[0] == 7 and inside.tolist() == [True, False, False, True, False] and means[3] == L[0].mean()


@hyp(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12)), min_size=1, max_size=12), st.integers(0, 60))
def test_shares(pairs, total):
    w, room = torch.tensor([p[0] for p in pairs], dtype=torch.float64), torch.tensor([p[1] for p in pairs])
    given_ = allocate(w, total, room)
    assert given_.sum() == min(total, room.sum()) and (given_ <= room).all() and (given_ >= 0).all()
    assert torch.equal(given_, allocate(w, total, room))
    if w.max() > 0:
        quota = w / w.max() / (w / w.max()).sum() * total
        if (quota <= room).all(): assert ((given_ - quota).abs() < 1 + 1e-6).all()
    order = w.argsort()
    full = given_ == room
    for i, j in zip(order, order[1:], strict=False): assert w[j] - w[i] < 1e-6 or given_[i] <= given_[j] or full[j] # a larger weight never gets less


def test_shares_of_vanishing_weights():
    assert allocate(torch.tensor([0., 2e-308, 1e-308], dtype=torch.float64), 6, torch.tensor([9, 9, 9])).tolist() == [0, 4, 2]
    assert allocate(torch.tensor([5e-324, 0.], dtype=torch.float64), 3, torch.tensor([2, 9])).tolist() == [2, 1]


def test_rerank_drops_sinks_and_keeps_order():
    torch.manual_seed(0)
    a, L = torch.rand(16, 16), torch.randn(160, 240)
    s = S.with_(top_tokens=50, kept_tokens=30, seed_points=100)
    seeds = seed_points(grounding(a, L), s)
    top = a.flatten().argsort(descending=True)[:50]
    means = L.unflatten(0, (16, 10)).unflatten(2, (16, 15)).mean((1, 3)).flatten()
    assert torch.equal(seeds.top_tokens, top) and torch.equal(seeds.kept_tokens, top[means[top].argsort(descending=True)[:30]])
    assert len(seeds) == 100 and len({tuple(p) for p in seeds.points_xy.tolist()}) == 100
    x, y = (seeds.points_xy.long()[:, i] for i in (0, 1))
    assert torch.equal(y // 10 * 16 + x // 15, seeds.token_ids) # every point lies in its token's region
    assert torch.equal(seeds.weights, a.flatten()[seeds.token_ids]) and (seeds.weights.diff() <= 0).all()
    counts = seeds.token_ids.bincount(minlength=256)[seeds.kept_tokens]
    assert torch.equal(counts, allocate(a.flatten()[seeds.kept_tokens], 100, torch.full((30,), 150)))


def test_ties_and_determinism():
    a, L = torch.ones(4, 4), torch.zeros(32, 32)
    s = S.with_(top_tokens=6, kept_tokens=3, seed_points=7)
    seeds = seed_points(grounding(a, L), s)
    assert seeds.top_tokens.tolist() == [0, 1, 2, 3, 4, 5] and seeds.kept_tokens.tolist() == [0, 1, 2]
    assert seeds.token_ids.tolist() == [0] * 3 + [1] * 2 + [2] * 2
    assert torch.equal(seeds.points_xy, seed_points(grounding(a, L), s).points_xy)
    assert not torch.equal(seeds.points_xy, seed_points(grounding(a, L), s.with_(seed=1)).points_xy)
    # a token's own points do not depend on which other tokens there are
    one = seed_points(grounding(a, L), s.with_(top_tokens=1, kept_tokens=1, seed_points=3))
    assert torch.equal(one.points_xy, seeds.points_xy[:3])


def test_k1_beyond_all_tokens_and_tiny_pictures():
    seeds = seed_points(grounding(torch.rand(3, 3), torch.randn(9, 9)), S)
    assert len(seeds.top_tokens) == len(seeds.kept_tokens) == 9 and len(seeds) == 30
    for H, W in ((1, 1), (2, 3), (5, 1)):
        seeds = seed_points(grounding(torch.rand(16, 16), torch.randn(H, W)), S.with_(top_tokens=256, kept_tokens=256)) # many tokens in one pixel
        assert len(seeds) == H * W == len({tuple(p) for p in seeds.points_xy.tolist()})
        assert (seeds.points_xy >= 0).all() and (seeds.points_xy < torch.tensor([W, H])).all()


def test_regions_outside_the_picture_give_no_points():
    boxes = torch.tensor([[-8., 0, 0, 8], [0, 0, 8, 8], [8, 0, 16, 8], [16, 0, 24, 8]]) # a 12-pixel wide picture
    g = grounding(torch.tensor([[.9, .1, .2, .8]]), torch.zeros(8, 12), boxes)
    seeds = seed_points(g, S)
    assert seeds.top_tokens.tolist() == [0, 3, 2, 1] and seeds.kept_tokens.tolist() == [2, 1]
    assert (seeds.points_xy[:, 0] < 12).all() and (seeds.points_xy[seeds.token_ids == 2][:, 0] >= 8).all()
    nowhere = seed_points(grounding(torch.tensor([[.9]]), torch.zeros(8, 12), boxes[:1]), S)
    assert len(nowhere) == 0 and nowhere.points_xy.shape == (0, 2)


def test_overlapping_regions_share_no_pixel():
    boxes = torch.tensor([[0., 0, 3, 3], [0, 0, 3, 3], [0, 0, 4, 4]])
    seeds = seed_points(grounding(torch.tensor([[.4, .3, .3]]), torch.zeros(4, 4), boxes), S.with_(seed_points=16))
    assert len({tuple(p) for p in seeds.points_xy.tolist()}) == len(seeds) == 16


@hyp(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_neighbouring_regions_have_disjoint_pixels(H, W, h, w):
    g = grounding(torch.ones(h, w), torch.zeros(H, W))
    if W < 2 * w or H < 2 * h: return # regions below two pixels may share the pixel under their centres
    seen = np.zeros((H, W), int)
    for x0, y0, x1, y1 in _pixels(g.token_boxes_xyxy, (H, W)): seen[y0:y1, x0:x1] += 1
    assert (seen == 1).all()


def test_several_prompt_tokens_are_refused():
    g = Grounding(torch.zeros(2, 1, 8), torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 4), torch.zeros(2, 8, 8), torch.zeros(4, 4), (2, 2))
    with pytest.raises(ValueError, match="one by one with split"): seed_points(g, S)
