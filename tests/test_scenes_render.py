"The rendered world against an independent scalar ray caster, numpy.roots, and itself."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st

from rea2seg.scenes.cast import pack
from rea2seg.scenes.graph import COLOURS, KINDS, PRIMITIVES, TEXTURES, Camera, Lights, Part, Scene, SceneObject, from_json, to_json
from rea2seg.scenes.layout import THEMES, layout_settings, sample_scene
from rea2seg.scenes.objects import TEXT_KINDS, make_object
from rea2seg.scenes.primitives import HITS, TYPES, hit_torus
from rea2seg.scenes.render import render, render_packed

torch.set_num_threads(2)
LIGHTS, CAMERA = Lights("studio", -.9, .9), Camera((.4, -7, 3.5), (0, 0, .6), 33)


# ------------------------------------------------------------------------------------------ an independent caster
# One ray at a time, in float64, by another method: a solid is the intersection of half spaces and quadrics, each of which
# the ray crosses in intervals found with numpy.roots; the first interval of the intersection is the hit.
def inside_intervals(coefficients) -> list[tuple[float, float]]:
    "Where the polynomial in t is <= 0."
    roots = np.roots(coefficients)
    real = sorted(r.real for r in roots if abs(r.imag) < 1e-9 * max(1, abs(r.real)))
    knots = [-math.inf, *real, math.inf]
    middle = lambda a, b: 0. if a == -math.inf and b == math.inf else b - 1 if a == -math.inf else a + 1 if b == math.inf else (a + b) / 2
    return [(a, b) for a, b in zip(knots, knots[1:]) if np.polyval(coefficients, middle(a, b)) <= 0]


def meet(a, b): return [(max(p[0], q[0]), min(p[1], q[1])) for p in a for q in b if max(p[0], q[0]) < min(p[1], q[1])]
def line(o, d): return np.array([d, o])
def slab(o, d, low, high): return meet(inside_intervals([d, o - high]), inside_intervals([-d, low - o])) if d else ([(-math.inf, math.inf)] if low <= o <= high else [])


def solid_intervals(name, p, o, d):
    x, y, z = (line(o[i], d[i]) for i in range(3))
    sq = lambda v: np.polymul(v, v)
    add = lambda *v: sum(v[1:], v[0])
    ball = lambda c, r: inside_intervals(add(sq(x), sq(y), sq(line(o[2] - c, d[2])), [0, 0, -r * r]))
    if name == "sphere": return ball(0, p[0])
    if name == "box": return meet(meet(slab(o[0], d[0], -p[0], p[0]), slab(o[1], d[1], -p[1], p[1])), slab(o[2], d[2], -p[2], p[2]))
    if name == "cylinder": return meet(inside_intervals(add(sq(x), sq(y), [0, 0, -p[0] ** 2])), slab(o[2], d[2], -p[1], p[1]))
    if name == "cone":
        k0, k1 = (p[0] + p[1]) / 2, (p[1] - p[0]) / (2 * p[2])
        return meet(inside_intervals(add(sq(x), sq(y), -sq(k1 * z + [0, k0]))), slab(o[2], d[2], -p[2], p[2]))
    if name == "capsule":
        body = meet(inside_intervals(add(sq(x), sq(y), [0, 0, -p[0] ** 2])), slab(o[2], d[2], -p[1], p[1]))
        return body + ball(p[1], p[0]) + ball(-p[1], p[0])
    distance = add(sq(x), sq(y), sq(z), [0, 0, p[0] ** 2 - p[1] ** 2])
    return inside_intervals(np.polysub(sq(distance), np.concatenate([[0, 0], 4 * p[0] ** 2 * add(sq(x), sq(y))])))


def rotation(angles):
    a, b, c = angles
    rx = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    ry = np.array([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]])
    rz = np.array([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    return rz @ ry @ rx


def look(scene, px, py, size_hw):
    "(object id, part name, depth) behind the picture point (px, py), by brute force; (-1, None, depth or inf) for ground and sky."
    H, W = size_hw
    eye, target = np.array(scene.camera.eye), np.array(scene.camera.target)
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0, 0, 1]); right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    k = 2 * math.tan(math.radians(scene.camera.fov) / 2) / min(H, W)
    ray = forward + (px + .5 - W / 2) * k * right + (H / 2 - .5 - py) * k * up
    best = (-1, None, -eye[2] / ray[2] if ray[2] < 0 else math.inf)
    for o in scene.objects:
        turn = rotation((0, 0, o.yaw))
        for part in o.parts:
            own = turn @ rotation(part.rotation)
            centre = np.array(o.xyz) + o.scale * turn @ np.array(part.centre)
            reach = o.scale * 2 * np.linalg.norm(part.params) # no point of the solid is farther from its centre
            if np.linalg.norm(np.cross(centre - eye, ray)) > reach * np.linalg.norm(ray): continue
            for a, _ in solid_intervals(part.primitive, [v * o.scale for v in part.params], own.T @ (eye - centre), own.T @ ray):
                if 0 < a < best[2]: best = (o.id, part.name, a)
    return best


def random_scene(seed, primitive):
    "Some solids of one type, of random size and rotation."
    rng = np.random.default_rng(seed)
    objects = []
    for i in range(3):
        p = rng.uniform(.3, .7, len(PRIMITIVES[primitive]))
        if primitive == "torus": p[1] *= .4
        part = lambda n, c, p=p: Part(n, primitive, tuple(p), c, tuple(rng.uniform(-3, 3, 3)))
        objects.append(SceneObject(i + 5, "cube", "red", "rubber", "large", None, None, (*rng.uniform(-1, 1, 2), .9), float(rng.uniform(-3, 3)), float(rng.uniform(.6, 1.1)),
                                   (part("one", (0, 0, 0)), part("two", (.6, .2, .3)))))
    return Scene(seed, tuple(objects), CAMERA, LIGHTS)


@pytest.mark.parametrize("primitive", TYPES)
def test_masks_are_exact(primitive):
    "At every pixel's centre the parts agree with brute force, unless a thousandth of a pixel beside it sees something else."
    size, differ, objects = (24, 32), 0, 0
    scene = random_scene(TYPES.index(primitive), primitive)
    seen = render([scene], size)[0]
    for y in range(size[0]):
        for x in range(size[1]):
            id, part, depth = look(scene, x, y, size)
            got = seen.object_ids[y, x], None if seen.part_ids[y, x] < 0 else seen.parts[seen.part_ids[y, x]][1]
            objects += id >= 0
            if got == (id, part):
                assert abs(seen.depth[y, x] - depth) < 2e-3 or math.isinf(depth)
                continue
            differ += 1
            beside = {look(scene, x + dx, y + dy, size)[:2] for dx in (-1e-3, 0, 1e-3) for dy in (-1e-3, 0, 1e-3)}
            assert got in beside, (x, y, got, (id, part))
    assert objects > 60 and differ <= 3


@pytest.mark.parametrize("theme", ["multistep", "thin"])
def test_masks_of_real_objects_are_exact(theme):
    "The same for random pixels of sampled scenes, half of them on the masks' borders."
    size, scene = (96, 128), sample_scene(3, theme, size_hw=(96, 128))
    seen = render([scene], size)[0]
    rng = np.random.default_rng(0)
    edge = np.argwhere(seen.part_ids[1:, 1:] != seen.part_ids[:-1, :-1]) + 1
    points = np.concatenate([rng.permutation(edge)[:70], np.argwhere(seen.object_ids >= 0)[rng.permutation((seen.object_ids >= 0).sum())[:70]]])
    for y, x in points:
        id, part, _ = look(scene, x, y, size)
        got = seen.object_ids[y, x], None if seen.part_ids[y, x] < 0 else seen.parts[seen.part_ids[y, x]][1]
        if got != (id, part): assert got in {look(scene, x + dx, y + dy, size)[:2] for dx in (-2e-3, 0, 2e-3) for dy in (-2e-3, 0, 2e-3)}


# --------------------------------------------------------------------------------------------------- primitives
@hypothesis_settings(max_examples=60, deadline=None)
@given(st.integers(0, 10 ** 6), st.floats(.02, .95), st.floats(3, 40))
def test_torus_roots(seed, tube, far):
    "First real root of the quartic by numpy.roots; double roots (the outline) may fall either way."
    rng = np.random.default_rng(seed)
    d = rng.normal(size=3); d /= np.linalg.norm(d)
    o = rng.normal(size=3) * .5 - far * d
    t = hit_torus(*(torch.tensor(v, dtype=torch.float64)[:, None] for v in (o, d, [1., tube, 0])))[0].item()
    found = [a for a, b in solid_intervals("torus", (1., tube), o, d) if a > 0 and b - a > 1e-4]
    every = [a for a, _ in solid_intervals("torus", (1., tube), o, d) if a > 0]
    assert math.isfinite(t) or not found
    if math.isfinite(t): assert min(abs(t - a) for a in every) < 1e-5 and (not found or t <= found[0] + 1e-5)


@pytest.mark.parametrize("kind,hit", list(zip(TYPES, HITS)))
def test_thin_solids_from_afar(kind, hit):
    "In float32 and 15 units away, a solid 0.02 thick is hit where float64 hits it."
    gen = torch.Generator().manual_seed(1)
    d = torch.nn.functional.normalize(torch.randn(3, 3000, generator=gen, dtype=torch.float64), dim=0)
    o = torch.randn(3, 3000, generator=gen, dtype=torch.float64) * .05 - 15 * d
    p = torch.tensor({"sphere": (.02, 0, 0), "box": (.02, .5, .02), "cylinder": (.02, .6, 0), "cone": (.02, .01, .5), "torus": (.3, .01, 0), "capsule": (.02, .5, 0)}[kind],
                     dtype=torch.float64)[:, None].expand(3, 3000)
    exact, single = hit(o, d, p)[0], hit(o.float(), d.float(), p.float())[0].double()
    both = exact.isfinite() & single.isfinite()
    assert both.sum() > 50 and (exact.isfinite() != single.isfinite()).float().mean() < .01
    assert (exact - single)[both].abs().quantile(.99) < 1e-3


# --------------------------------------------------------------------------------------------------- pictures
def test_occlusion_fractions():
    "Alone pixels are those of a scene without the others."
    scene = sample_scene(4, "occlusion")
    seen = render([scene], (120, 120))[0]
    for o in scene.objects:
        alone = render([replace(scene, objects=(replace(o, on=None, inside=None),))], (120, 120))[0].mask(o.id).sum()
        fact = seen.fact(o.id)
        assert fact.alone_px == alone and fact.visible_px == seen.mask(o.id).sum() and math.isclose(fact.visible_fraction, fact.visible_px / max(alone, 1), rel_tol=1e-5)


def test_batch_equals_single():
    scenes = [sample_scene(s, theme) for s, theme in enumerate(THEMES)] + [Scene(0, (), CAMERA, LIGHTS)]
    batch = render_packed(pack(scenes), (64, 80))
    for i, scene in enumerate(scenes):
        one = render([scene], (64, 80))[0]
        assert (one.object_ids == batch.object_ids[i].numpy()).all() and (one.part_ids == batch.part_ids[i].numpy()).all()
        assert np.abs(one.image.astype(int) - batch.image[i].numpy()).max() <= 2
        assert [f.visible_px for f in one.facts] == batch.visible_px[batch.object_scene == i].tolist()
    assert batch.part_px.sum() == batch.visible_px.sum() == (batch.object_ids >= 0).sum()


@pytest.mark.parametrize("size", [(8, 8), (33, 97), (97, 33), (240, 320)])
def test_sizes(size):
    "Any size: a larger picture's masks are the smaller one's, refined."
    scene = sample_scene(2, "clevr")
    seen = render([scene], size)[0]
    assert seen.image.shape == (*size, 3) and seen.depth.shape == size
    if min(size) == 33:
        large = render([scene], tuple(3 * s for s in size))[0] # the middle of each 3x3 block is the same ray
        assert (large.object_ids[1::3, 1::3] != seen.object_ids).mean() < 2e-3


def test_same_seed_same_picture():
    "A seed's layout and picture are pinned: kinds exactly, the means of a 4x4 grid within rounding of another machine."
    first, again = (render([sample_scene(11, "multistep")], (128, 128))[0] for _ in range(2))
    assert (first.image == again.image).all() and (first.part_ids == again.part_ids).all()
    for seed, theme, kinds, visible, grid in PINNED:
        scene = sample_scene(seed, theme)
        assert " ".join(f"{o.colour} {o.kind}" for o in scene.objects) == kinds
        seen = render([scene], (64, 64))[0]
        assert np.abs(np.array([f.visible_px for f in seen.facts]) - visible).max() <= 2
        assert np.abs(seen.image.astype(float).mean(-1).reshape(4, 16, 4, 16).mean((1, 3)) - grid).max() < 1.5


PINNED = [
    (11, 'multistep', 'cyan table cyan dumbbell brown capsule yellow capsule blue lollipop red lollipop cyan lollipop cyan torus', [106, 20, 17, 8, 88, 40, 129, 44], [[209.4, 210.2, 207.5, 205.6], [188.3, 206.1, 194.8, 213.6], [164.0, 186.7, 192.4, 214.6], [211.9, 213.6, 214.8, 215.2]]),
    (3, 'clevr', 'purple cylinder yellow cylinder red cylinder green cube purple cube', [223, 61, 47, 26, 203], [[216.0, 212.4, 216.8, 217.2], [218.6, 198.4, 219.2, 219.5], [193.3, 156.7, 191.4, 220.5], [172.5, 174.9, 216.5, 221.3]]),
    (5, 'spatial', 'blue table brown cone purple torus green cone yellow cone red cone yellow tray brown crate', [221, 53, 12, 12, 48, 75, 27, 92], [[182.8, 189.0, 193.6, 193.9], [201.7, 196.0, 201.0, 213.0], [187.3, 164.1, 178.3, 224.4], [217.9, 178.4, 185.1, 229.7]]),
    (2, 'occlusion', 'purple cube purple signboard green lamp brown mug', [40, 81, 21, 82], [[193.3, 193.3, 193.4, 193.3], [172.3, 166.6, 195.2, 195.5], [224.1, 221.1, 221.5, 214.7], [229.5, 228.1, 224.5, 182.3]]),
    (4, 'camouflage', 'purple torus yellow dumbbell brown cylinder green cylinder green cube blue mug', [13, 79, 38, 51, 99, 47], [[213.6, 213.3, 212.9, 212.5], [209.4, 183.2, 206.6, 208.3], [194.9, 187.5, 187.2, 201.5], [198.9, 191.0, 185.2, 197.6]]),
]


def test_text_is_on_its_part():
    for kind in TEXT_KINDS:
        made = [make_object(0, kind, "yellow", scale=.68, text=t) for t in (None, "H")]
        plain, lettered = (render([Scene(0, (o,), CAMERA, LIGHTS)], (120, 120), smooth=False)[0] for o in made)
        ink = np.abs(plain.image.astype(int) - lettered.image).max(-1) > 25
        labelled = {p.name for p in made[1].parts if p.text}
        where = {lettered.parts[i][1] for i in lettered.part_ids[ink] if i >= 0}
        assert ink.sum() >= 12 and where == labelled and not (ink & (lettered.part_ids < 0)).any(), kind


def test_letters_differ():
    "Every label that layouts use can be told from every other in the picture."
    from rea2seg.scenes.layout import LABELS
    near = Camera((0, -5, 1.5), (0, 0, .5), 20)
    images = [render([Scene(0, (make_object(0, "cube", "yellow", scale=.68, text=c),), near, LIGHTS)], (64, 64))[0].image.astype(int) for c in LABELS]
    for i, a in enumerate(images):
        for b in images[:i]: assert (np.abs(a - b).max(-1) > 60).sum() >= 6


@pytest.mark.parametrize("texture", TEXTURES)
def test_texture_changes_the_picture_and_no_mask(texture):
    plain, painted = (render([Scene(0, (make_object(0, "sphere", "green", scale=1., texture=t),), CAMERA, LIGHTS)], (96, 96))[0] for t in (None, texture))
    assert (plain.object_ids == painted.object_ids).all()
    mask = plain.mask(0)
    inner = mask[:, 1:] & mask[:, :-1]
    busy = lambda seen: np.abs(np.diff(seen.image.astype(float), axis=1))[inner].mean()
    assert busy(painted) > 1.5 * busy(plain)
    assert np.abs(plain.image[~mask].astype(int) - painted.image[~mask]).mean() < 2


def test_camouflage_hides_in_colour():
    "The target's mean colour is nearer to the ground's than a plain object's of another colour."
    near = 0
    for seed in range(8):
        scene = sample_scene(seed, "camouflage")
        seen = render([scene], (128, 128))[0]
        target = scene.object(scene.meta["roles"]["target"][0]) if scene.meta["roles"].get("target") else None
        if target is None: continue
        assert (target.texture, target.colour) == (scene.ground_texture, scene.ground_colour)
        mean = lambda m: seen.image[m].astype(float).mean(0)
        ground = mean(seen.object_ids < 0)
        others = [np.abs(mean(seen.mask(o.id)) - ground).sum() for o in scene.objects if o.colour != target.colour and seen.fact(o.id).visible_px > 20]
        near += np.abs(mean(seen.mask(target.id)) - ground).sum() < np.median(others)
    assert near >= 6


def test_thin_objects_are_thin():
    "At 256 pixels the theme's bars are one to four pixels across."
    import cv2
    widths = []
    for seed in range(6):
        scene = sample_scene(seed, "thin")
        seen = render([scene])[0]
        for o in scene.objects:
            if o.kind in ("rod", "ring", "ladder", "stand") and seen.fact(o.id).visible_fraction > .8:
                widths.append(2 * np.percentile(cv2.distanceTransform(np.pad(seen.mask(o.id), 1).astype(np.uint8), cv2.DIST_L2, 5)[np.pad(seen.mask(o.id), 1)], 90))
    assert len(widths) >= 4 and 1 <= np.median(widths) <= 5


def test_shadow_and_light_models_differ():
    o = make_object(0, "sphere", "red", scale=.7)
    studio, sun = (render([Scene(0, (o,), CAMERA, Lights(m, -.5, .8))], (96, 96))[0] for m in ("studio", "sun"))
    assert np.abs(studio.image.astype(int) - sun.image).mean() > 2
    ground = sun.image[sun.object_ids < 0].astype(int).sum(-1)
    assert (ground < np.median(ground) * .75).sum() > 30 # a shadow lies on the ground


# --------------------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("theme", THEMES)
def test_layouts(theme):
    s = layout_settings()
    for seed in range(4):
        scene = sample_scene(seed, theme)
        assert scene == sample_scene(seed, theme) == from_json(to_json(scene))
        assert 1 <= len(scene) and [o.id for o in scene.objects] == list(range(len(scene)))
        for o in scene.objects:
            assert math.isclose(o.scale, s.small if o.size == "small" else s.large)
            parent = next((scene.object(i) for i in (o.on, o.inside) if i is not None), None)
            assert (o.xyz[2] > 0) == (parent is not None)
            if parent: assert math.dist(o.xyz[:2], parent.xyz[:2]) < 2 * parent.scale
    facts = [f for seed in range(4) for f in render([sample_scene(seed, theme)], (128, 128))[0].facts]
    assert np.mean([f.visible_fraction > .15 for f in facts]) > .9


def test_no_two_solids_share_space():
    "Points drawn inside the solids of one object lie in no solid of another."
    rng = np.random.default_rng(0)
    def inside(o, world):
        own = (world - np.array(o.xyz)) @ rotation((0, 0, o.yaw)) / o.scale
        out = np.zeros(len(world), bool)
        for p in o.parts:
            x, y, z = ((own - p.centre) @ rotation(p.rotation)).T
            r, a = np.hypot(x, y), p.params
            out |= {"sphere": lambda: x * x + y * y + z * z < a[0] ** 2, "box": lambda: (abs(x) < a[0]) & (abs(y) < a[1]) & (abs(z) < a[2]),
                    "cylinder": lambda: (r < a[0]) & (abs(z) < a[1]), "cone": lambda: (abs(z) < a[2]) & (r < (a[0] + a[1]) / 2 + (a[1] - a[0]) / 2 / a[2] * z),
                    "torus": lambda: np.hypot(r - a[0], z) < a[1], "capsule": lambda: np.hypot(r, np.clip(abs(z) - a[1], 0, None)) < a[0]}[p.primitive]()
        return out
    shared = total = 0
    for seed, theme in [(s, t) for t in THEMES for s in range(3)]:
        scene = sample_scene(seed, theme)
        for o in scene.objects:
            points = np.array(o.xyz) + rng.uniform([-1.5, -1.5, 0], [1.5, 1.5, 3.5], (3000, 3)) * o.scale
            points = points[inside(o, points)]
            total += len(points)
            shared += sum(inside(q, points).sum() for q in scene.objects if q.id != o.id)
    assert total > 5000 and shared <= total * 1e-3


def test_forbidden_pairs():
    banned = frozenset((k, c) for k in KINDS for c in ("red", "green", "yellow"))
    for theme in THEMES:
        assert {o.colour for s in range(3) for o in sample_scene(s, theme, forbid=banned).objects} <= set(COLOURS) - {"red", "green", "yellow"}
    with pytest.raises(ValueError, match="no colour is left for a"): sample_scene(0, "clevr", forbid=frozenset((k, c) for k in KINDS for c in COLOURS))


# --------------------------------------------------------------------------------------------------- nonsense
@pytest.mark.parametrize("make, message", [
    (lambda: render([sample_scene(0, "clevr")], (-5, 64)), "at least 8x8"),
    (lambda: render([sample_scene(0, "clevr")], 64), "size_hw must be"),
    (lambda: render([sample_scene(0, "clevr")], (5000, 5000)), "at most 5 million pixels"),
    (lambda: make_object(0, "unicorn", "red", scale=1.), "kind must be one of"),
    (lambda: make_object(0, "cube", "pink", scale=1.), "colour must be one of"),
    (lambda: make_object(0, "cube", "red", scale=-1.), "scale must be positive"),
    (lambda: make_object(0, "cube", "red", scale=math.nan), "finite"),
    (lambda: make_object(0, "cube", "red", scale=1., text="ß"), "1 to 3 of A-Z"),
    (lambda: Part("x", "torus", (.2, .5)), "thinner than the ring"),
    (lambda: Camera((0, 0, 5), (0, 0, 0), 40), "straight down"),
    (lambda: Lights("candle", 0, 1), "model must be one of"),
    (lambda: sample_scene(-1, "clevr"), "seed must not be negative"),
])
def test_nonsense_is_refused(make, message):
    with pytest.raises(ValueError, match=message): make()


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match=r"scenes\[0\] must be a Scene, got str"): render(["scene"])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu():
    scenes = [sample_scene(s, t) for s in range(3) for t in THEMES]
    packed = pack(scenes)
    a, b = render_packed(packed, (256, 256), "cpu"), render_packed(packed, (256, 256), "cuda")
    assert (a.part_ids != b.part_ids.cpu()).float().mean() < 1e-4
    assert (a.image.int() - b.image.cpu().int()).abs().float().mean() < .1
    assert (a.alone_px - b.alone_px.cpu()).abs().max() <= 3
