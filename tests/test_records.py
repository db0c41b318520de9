"Records check themselves: right ones pass through unchanged, wrong ones name field, expected and actual."
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from rea2seg.masks import pairwise_iou
from rea2seg.records import SOURCES, CandidateSet, Grounding, ImageEmbedding, Scores, Seeds, expect

def candidates(N=4, seed=0, **changes):
    g = torch.Generator().manual_seed(seed)
    return CandidateSet(**dict(masks=torch.rand(N, 6, 7, generator=g) > .5, sources=tuple(SOURCES[i % 3] for i in range(N)), predicted_ious=torch.rand(N, generator=g),
                               stability=torch.rand(N, generator=g), points_xy=torch.rand(N, 2, generator=g)) | changes)

def grounding(n=1, L=3, h=2, w=4, H=20, W=40, **changes):
    lead = () if n == 1 else (n,)
    g = torch.Generator().manual_seed(n)
    rand = lambda *s: torch.randn(*s, generator=g)
    return Grounding(**dict(prompt_embed=rand(n, 1, 8), low_res_masks=rand(n, 1, 5, 5), attention_layers=rand(*lead, L, h * w).softmax(-1), logits=rand(*lead, H, W),
                            token_boxes_xyxy=rand(h * w, 4), grid_hw=(h, w)) | changes)

# ---- specs --------------------------------------------------------------------------------------------------------------------

def test_expect():
    assert expect("R", {}, a=(torch.zeros(3, 2), "float[N,2]"), b=(torch.zeros(3, dtype=torch.int64), "int[N]"), c=(None, "bool[N]?")) == {"N": 3}
    for tensors, says in ((dict(a=(torch.zeros(3), "float[N,2]")), r"R.a must be float\[N,2\], got float32\[3\]"), (dict(a=(torch.zeros(2).bool(), "int[N]")), r"must be int\[N\], got bool\[2\]"),
                          (dict(a=(None, "float[N]")), "got NoneType"), (dict(a=([1.0], "float[N]")), "got list"), (dict(a=(torch.zeros(3, 3), "float[N,2]")), r"got float32\[3, 3\]"),
                          (dict(a=(torch.zeros(3), "float[N]"), b=(torch.zeros(4), "float[N]")), r"R.b must be float\[N\] with N = 3, got float32\[4\]")):
        with pytest.raises(TypeError, match=says): expect("R", {}, **tensors)

# ---- candidates ---------------------------------------------------------------------------------------------------------------

@given(st.lists(st.sampled_from([0., .25, .5, 1.]), min_size=1, max_size=9))
@settings(max_examples=80, deadline=None)
def test_ranking_is_a_stable_descending_sort(scores):
    c = candidates(len(scores))
    ranked = c.ranked(torch.tensor(scores))
    order = sorted(range(len(scores)), key=lambda i: -scores[i]) # Python's sort is stable
    assert ranked.scores.tolist() == [scores[i] for i in order] and ranked.sources == tuple(c.sources[i] for i in order)
    for name in ("masks", "predicted_ious", "stability", "points_xy"): assert torch.equal(getattr(ranked, name), getattr(c, name)[order])
    assert c.scores is None

@given(st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_joining_and_taking_apart(a, b):
    one, two = candidates(a, 1, notes=("x",)), candidates(b, 2, notes=("y",), points_xy=None)
    both = CandidateSet.concat([one, two])
    assert len(both) == a + b and both.notes == ("x", "y") and both.points_xy[a:].isnan().all()
    for part, back in ((one, both[:a]), (two, both[a:])): assert torch.equal(part.masks, back.masks) and part.sources == back.sources and torch.equal(part.stability, back.stability)
    kcore = both.of("kcore")
    assert set(kcore.sources) <= {"kcore"} and len(kcore) == both.sources.count("kcore")

def test_indexing():
    c = candidates(4)
    for index, order in ((2, [2]), (-1, [3]), (slice(1, None, 2), [1, 3]), ([3, 0], [3, 0]), (torch.tensor([2, 2]), [2, 2]), (torch.tensor([True, False, False, True]), [0, 3]), ([], [])):
        assert torch.equal(c[index].masks, c.masks[order]) and c[index].sources == tuple(c.sources[i] for i in order)
    with pytest.raises(IndexError): c[9]
    assert torch.equal(c.ious(c.masks[1]), pairwise_iou(c.masks, c.masks[1:2])[:, 0]) and c.areas.tolist() == c.masks.sum((1, 2)).tolist()

@pytest.mark.parametrize("changes, error, says", [
    (dict(masks=torch.zeros(4, 6, 7)), TypeError, r"CandidateSet.masks must be bool\[N,H,W\], got float32\[4, 6, 7\]"), (dict(masks=torch.zeros(3, 6, 7, dtype=torch.bool)), TypeError, "N = 3"),
    (dict(predicted_ious=torch.zeros(4, dtype=torch.int64)), TypeError, r"float\[N\] with N = 4, got int64\[4\]"), (dict(stability=torch.zeros(4, 1)), TypeError, "stability"),
    (dict(sources=("amg",) * 3), ValueError, "4 masks but 3 sources"), (dict(sources=("amg", "a", "b", "amg")), ValueError, "got a, b"), (dict(scores=torch.zeros(5)), TypeError, "scores"),
    (dict(points_xy=torch.zeros(4, 3)), TypeError, r"points_xy must be float\[N,2\]")], ids=str)
def test_wrong_candidates(changes, error, says):
    with pytest.raises(error, match=says): candidates(**changes)

def test_wrong_scores():
    c = candidates(3)
    with pytest.raises(ValueError, match=r"3 candidates but scores of shape \[2\]"): c.ranked(torch.zeros(2))
    with pytest.raises(ValueError, match="NaN or infinite"): c.ranked(torch.tensor([1, torch.inf, 0]))
    for bad in ([1.2], [-.1], [torch.nan]):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"): Scores(torch.tensor(bad))
    with pytest.raises(TypeError, match=r"Scores.ious must be float\[N\], got int64\[1\]"): Scores(torch.tensor([1]))
    assert len(Scores(torch.zeros(0)).ious) == 0

# ---- groundings ---------------------------------------------------------------------------------------------------------------

@given(n=st.integers(1, 4), L=st.integers(1, 5), h=st.integers(1, 4), w=st.integers(1, 4), data=st.data())
@settings(max_examples=60, deadline=None)
def test_attention_is_the_mean_of_the_chosen_layers(n, L, h, w, data):
    layers = tuple(sorted(data.draw(st.sets(st.integers(0, L - 1)))))
    g = grounding(n, L, h, w, layers=layers)
    rows = g.attention_layers.reshape(n, L, h, w)
    expected = torch.stack([rows[:, l] for l in layers or range(L)]).mean(0)
    assert torch.allclose(g.attention.reshape(n, h, w), expected) and g.attention.shape == ((h, w) if n == 1 else (n, h, w))
    assert torch.equal(g.initial, g.logits > 0) and g.n == n
    parts = g.split()
    assert len(parts) == n and all(p.n == 1 and p.layers == layers for p in parts)
    for i, p in enumerate(parts):
        assert torch.equal(p.logits, g.logits if n == 1 else g.logits[i]) and torch.equal(p.prompt_embed, g.prompt_embed[i:i + 1]) and torch.allclose(p.attention, expected[i])

@pytest.mark.parametrize("changes, error, says", [
    (dict(logits=torch.zeros(2, 20, 40)), TypeError, r"Grounding.logits must be float\[H,W\], got float32\[2, 20, 40\]"), (dict(prompt_embed=torch.zeros(1, 8)), TypeError, "prompt_embed"),
    (dict(grid_hw=(3, 4)), ValueError, r"8 attention columns, 8 token boxes and a \(3, 4\) grid"), (dict(token_boxes_xyxy=torch.zeros(9, 4)), TypeError, "T = 9|T = 8"), (dict(layers=(3,)), ValueError, r"layers \(3,\) of a model with 3 layers"),
    (dict(layers=(-1,)), ValueError, "of a model with 3"), (dict(logits=torch.full((20, 40), torch.inf)), ValueError, "Grounding.logits has NaN or infinite"), (dict(logits=torch.zeros(20, 40).bool()), TypeError, "got bool")], ids=str)
def test_wrong_groundings(changes, error, says):
    with pytest.raises(error, match=says): grounding(**changes)

def test_records_are_frozen():
    for record, name in ((grounding(), "logits"), (candidates(), "masks"), (Scores(torch.zeros(1)), "ious")):
        with pytest.raises(FrozenInstanceError): setattr(record, name, None)
    assert replace(grounding(), answer="yes").answer == "yes"

# ---- frames -------------------------------------------------------------------------------------------------------------------

@given(H=st.integers(1, 300), W=st.integers(1, 300), x=st.floats(0, 1), y=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_points_into_sams_frame(H, W, x, y):
    e = ImageEmbedding(torch.zeros(1, 8, 4, 4), (), (H, W), (64, 48), 64)
    got = e.to_input(torch.tensor([[x * W, y * H]]))[0]
    assert torch.allclose(got, torch.tensor([x * 48, y * 64]), atol=1e-3)

def test_wrong_embeddings_and_seeds():
    with pytest.raises(ValueError, match=r"input_hw \(65, 3\) exceeds SAM's input of 64 pixels"): ImageEmbedding(torch.zeros(1, 8, 4, 4), (), (9, 9), (65, 3), 64)
    with pytest.raises(TypeError, match=r"float\[1,C,h,w\].*got float32\[2, 8, 4, 4\]"): ImageEmbedding(torch.zeros(2, 8, 4, 4), (), (9, 9), (6, 3), 64)
    good = dict(points_xy=torch.zeros(3, 2), weights=torch.zeros(3), token_ids=torch.zeros(3, dtype=torch.long), top_tokens=torch.zeros(5, dtype=torch.long), kept_tokens=torch.zeros(2, dtype=torch.long))
    assert len(Seeds(**good)) == 3
    for name, bad in (("points_xy", torch.zeros(3)), ("weights", torch.zeros(2)), ("token_ids", torch.zeros(3))):
        with pytest.raises(TypeError, match=f"Seeds.{name}"): Seeds(**good | {name: bad})
