"""Main core against networkx, features and background point against plain loops, the refinement against SAM 2's own predictor."""
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings as hyp, strategies as st

from rea2seg.kcore import background_point, core_numbers, main_core, point_features, semantic_candidates
from rea2seg.records import Grounding, ImageEmbedding, Seeds
from rea2seg.sam2_model import Sam2
from rea2seg.settings import Settings

SMALL = dict(embed_dim=16, num_heads=1, stages=(1, 1, 2, 1), global_att_blocks=(3,), window_pos_embed_bkg_spatial_size=(4, 4), window_spec=(8, 4, 8, 4), image_size=256,
             dim=32, decoder_heads=4, decoder_mlp=64)


def adjacency(n, p, seed):
    upper = np.triu(np.random.default_rng(seed).random((n, n)) < p, 1)
    return upper | upper.T


@hyp(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 10**6), st.booleans())
def test_core_equals_networkx(n, p, seed, loops):
    A = adjacency(n, p, seed)
    graph = nx.from_numpy_array(A)
    T = torch.from_numpy(A.copy())
    if loops: T |= torch.eye(n, dtype=torch.bool) # a point is always similar to itself
    numbers = nx.core_number(graph)
    assert core_numbers(T).tolist() == [numbers[i] for i in range(n)]
    if A.any(): assert main_core(T).tolist() == sorted(nx.k_core(graph).nodes)
    else: assert main_core(T).tolist() == []


def test_core_of_nothing_and_bad_input():
    assert core_numbers(torch.zeros(0, 0, dtype=torch.bool)).shape == main_core(torch.zeros(0, 0, dtype=torch.bool)).shape == (0,)
    lopsided = torch.zeros(2, 2, dtype=torch.bool); lopsided[0, 1] = True
    with pytest.raises(ValueError, match="symmetric"): main_core(lopsided)
    with pytest.raises(TypeError, match=r"adjacency must be bool\[K,K\]"): main_core(torch.zeros(2, 2))


@pytest.mark.parametrize("orig,fills", [((48, 64), (64, 64)), ((48, 64), (48, 64)), ((100, 30), (64, 19)), ((1, 1), (64, 64))])
def test_features_are_bilinear_between_cell_centres(orig, fills):
    torch.manual_seed(0)
    F = torch.randn(1, 6, 4, 4)
    e = ImageEmbedding(F, (), orig, fills, 64)
    H, W = orig
    points = torch.stack([torch.randint(W, (40,)), torch.randint(H, (40,))], 1).float()
    for (x, y), got in zip(points.tolist(), point_features(e, points), strict=True):
        u, v = (x + .5) / W * fills[1] / 16 - .5, (y + .5) / H * fills[0] / 16 - .5 # in cells, zero at the first cell's centre
        u, v = min(max(u, 0), 3), min(max(v, 0), 3)
        i, j = min(int(v), 2), min(int(u), 2)
        a, b = v - i, u - j
        want = (1 - a) * ((1 - b) * F[0, :, i, j] + b * F[0, :, i, j + 1]) + a * ((1 - b) * F[0, :, i + 1, j] + b * F[0, :, i + 1, j + 1])
        assert torch.allclose(got, want / want.norm(), atol=1e-5) and abs(got.norm() - 1) < 1e-5


@hyp(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6), st.floats(-3, 3))
def test_background_point(H, W, seed, delta):
    L = torch.from_numpy(np.random.default_rng(seed).normal(size=(H, W)).round(1)).float()
    x, y = (int(v) for v in background_point(L, delta))
    below = [v for v in L.flatten().tolist() if v < float(np.float32(delta))] # logits are float32, so is the comparison
    assert L[y, x] == (max(below) if below else L.min())


def world(seed=0, similarity=.9, H=90, W=120):
    torch.manual_seed(seed)
    sam = Sam2.random(SMALL, seed)
    image = torch.randint(256, (H, W, 3), dtype=torch.uint8).numpy()
    e, prompt = sam.encode(image), torch.randn(1, 1, 32)
    low = sam.decode(e, prompt_embed=prompt, multimask=False).logits * 100 # beyond the clamp at 32
    g = Grounding(prompt, low, torch.ones(1, 1), sam.upscale(low, e)[0, 0], torch.tensor([[0., 0, W, H]]), (1, 1), e)
    points = torch.stack([torch.randint(W, (30,)), torch.randint(H, (30,))], 1).float()
    seeds = Seeds(points, torch.ones(30), torch.zeros(30, dtype=torch.int64), torch.arange(1), torch.arange(1))
    return sam, g, seeds, Settings.load("lens", similarity=similarity)


def test_refinement_is_one_decoder_call_with_core_background_and_mask():
    sam, g, seeds, s = world()
    calls, real = [], sam.decode
    object.__setattr__(sam, "decode", lambda *a, **k: calls.append((a, k)) or real(*a, **k))
    found = semantic_candidates(sam, g, seeds, s)
    (args, kwargs), = calls
    f = point_features(g.embedding, seeds.points_xy)
    graph = nx.from_numpy_array(((f @ f.T > .9) & ~torch.eye(30, dtype=torch.bool)).numpy())
    core = sorted(nx.k_core(graph).nodes)
    assert 2 <= len(core) < 30 # a graph in which the core is a choice
    want = torch.cat([seeds.points_xy[core], background_point(g.logits, s.background_logit)[None]])
    assert torch.equal(args[1][0], want) and args[2].tolist() == [[1] * len(core) + [0]]
    assert torch.equal(kwargs["mask_logits"], g.low_res_masks.clamp(-32, 32)) and not torch.equal(kwargs["mask_logits"], g.low_res_masks)
    assert found.sources == ("kcore",) * 3 and found.masks.shape == (3, 90, 120) and not found.notes
    out = real(g.embedding, want[None], args[2], mask_logits=g.low_res_masks.clamp(-32, 32))
    assert torch.equal(found.masks, sam.upscale(out.logits[0], g.embedding) > 0) and torch.equal(found.predicted_ious, out.ious[0])
    fewer = semantic_candidates(sam, g, seeds, s.with_(kcore_candidates=1))
    assert torch.equal(fewer.masks[0], found.masks[found.predicted_ious.argmax()])


def test_no_core_is_empty_with_a_note():
    sam, g, seeds, s = world(similarity=1.0)
    none = semantic_candidates(sam, g, seeds, s)
    assert len(none) == 0 and none.masks.shape == (0, 90, 120) and "no two of 30 seed points" in none.notes[0]
    one = replace(seeds, **{k: getattr(seeds, k)[:1] for k in ("points_xy", "weights", "token_ids")})
    assert len(semantic_candidates(sam, g, one, s.with_(similarity=-1.0))) == 0
