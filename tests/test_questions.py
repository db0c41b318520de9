"""Programs, verifier and samplers on hand-made and random scenes; the brute-force reader must agree, and must notice when it should not."""
import json
import time
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from brute_force import check, readings
from test_sgdr_world import masks_only

from rea2seg.scenes.families import FAMILIES, names
from rea2seg.scenes.graph import Camera, Facts, Lights, Scene
from rea2seg.scenes.language import TEMPLATES, paraphrases, phrase, vocabulary
from rea2seg.scenes.layout import THEMES, sample_scene
from rea2seg.scenes.objects import euler, extent, make_object
from rea2seg.scenes.programs import ProgramError, Unclear, check_program, execute, run
from rea2seg.scenes.questions import NoQuestion, answer_mask, answer_masks, language_rules, question_for, questions_for
from rea2seg.scenes.verify import SUBTYPES, ablations, needless, steps, verify
from rea2seg.scenes.view import View, bounds

SCENE, EVERYTHING = ("scene",), ("everything",)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pool():
    "Every theme a few times, without colours."
    scenes = [sample_scene(900 + s, theme) for s in range(6) for theme in THEMES]
    return [(s, r) for i in range(0, len(scenes), 6) for s, r in zip(scenes[i:i + 6], masks_only(scenes[i:i + 6]))]


def F(attr, value, s=SCENE): return ("filter", attr, value, s)
def the(s): return ("the", s)


def by_hand(*objects, px=None, ground=(None, "floor"), **parts):
    "A view of (kind, colour, x, y, options) with the facts of a crude camera: x to the right, y up the picture."
    made = []
    for i, (kind, colour, x, y, *rest) in enumerate(objects):
        o = dict(scale=.7, size="large") | (rest[0] if rest else {})
        z = o.pop("z", 0)
        made.append(make_object(i, kind, colour, (x, y, z), **o))
    alone = {o.id: round(900 * (o.scale / .7) ** 2) for o in made}
    px = alone | (px or {})
    facts = [Facts(o.id, px[o.id], alone[o.id], px[o.id] / alone[o.id], (128 + 20 * o.xyz[0], 150 - 12 * o.xyz[1] - 15 * o.xyz[2]), (0, 0, 1, 1), 10 + o.xyz[1],
                   {p: px[o.id] / len(o.part_names) for p in o.part_names}) for o in made]
    return View(Scene(0, tuple(made), Camera((0, -10, 6), (0, 0, 0), 35), Lights("studio", .6, .9), *ground), facts, (256, 256))


def verdict(view, program, category, subtype, **kw):
    v = verify(view, program, category, subtype, **kw)
    return v.reason or "kept"


# --- what the verifier must accept and reject ------------------------------------------------------------------------------------

ROW = (("mug", "red", -4, 0), ("mug", "green", -1, 0), ("mug", "blue", 3.5, 0), ("lamp", "yellow", -5.5, 0), ("cube", "red", 6, 0))
lamp, mugs, block = the(F("kind", "lamp")), F("kind", "mug"), the(F("kind", "cube"))


@pytest.mark.parametrize("program, subtype, reason", [
    (the(("nth", 1, "nearest", lamp, mugs)), "extreme", "kept"),
    (the(("nth", 2, "nearest", lamp, mugs)), "ordinal", "kept"),
    (the(("closer", block, lamp, mugs)), "distance", "trivial"),                                     # any anchor gives it here
    (the(("between", lamp, the(F("colour", "green")), mugs)), "between", "kept"),
    (the(("nth", 1, "nearest", lamp, ("relate", "right", lamp, mugs))), "side", "shortcut"),         # all mugs are to its right
    (the(("relate", "left", the(F("colour", "green")), mugs)), "side", "trivial"),                   # simply the leftmost
    (the(("nth", 1, "nearest", lamp, F("colour", "red", mugs))), "extreme", "shortcut"),             # the only red mug
    (the(("nth", 2, "nearest", lamp, F("size", "large", mugs))), "ordinal", "doubtful"),             # sizes are said of plain solids
    (the(("nth", 1, "nearest", lamp, F("material", "rubber"))), "extreme", "doubtful"),              # ... and so are materials
    (the(("nth", 1, "nearest", lamp, SCENE)), "extreme", "intrinsic"),                               # no category
    (the(("rank", 2, "left", mugs)), "ordinal", "absolute"),
    (the(("nth", 1, "nearest", the(F("colour", "red")), mugs)), "extreme", "ambiguous"),             # two red things
    (the(("nth", 1, "nearest", lamp, F("kind", "cube"))), "extreme", "shortcut"),
    (the(("nth", 1, "nearest", lamp, F("kind", "doll"))), "extreme", "empty"),
    (the(("relate", "right", lamp, mugs)), "side", "ambiguous"),
    (("all", ("relate", "left", lamp, mugs)), "side", "empty")])
def test_spatial_rules(program, subtype, reason):
    assert verdict(by_hand(*ROW), program, "spatial", subtype) == reason


def test_distance_comparison_is_kept_where_other_anchors_tell_otherwise():
    more = (("cone", "gray", 5, 2), ("cylinder", "gray", 4.5, -2.5), ("sphere", "cyan", -4.5, 2.5))
    assert verdict(by_hand(*ROW, *more), the(("closer", block, lamp, mugs)), "spatial", "distance") == "kept"


def test_spatial_anchor_must_be_clearly_visible():
    program = the(("nth", 1, "nearest", lamp, mugs))
    assert verdict(by_hand(*ROW, px={3: 500}), program, "spatial", "extreme") == "anchor"
    assert verdict(by_hand(*ROW, px={3: 100}), program, "spatial", "extreme") in ("anchor", "doubtful")


def test_spatial_needs_rivals_and_an_anchor_that_matters():
    view = by_hand(("mug", "red", -4, 0), ("mug", "green", -3, 0, dict(scale=.3)), ("lamp", "yellow", 5, 4), ("cube", "blue", 5, 0), ("cone", "cyan", 5, -3))
    assert verdict(view, the(("nth", 1, "farthest", lamp, mugs)), "spatial", "extreme") in ("trivial", "doubtful")
    alone = by_hand(("mug", "red", -4, 0), ("lamp", "yellow", 5, 4), ("cube", "blue", 5, 0))
    assert verdict(alone, the(("nth", 1, "nearest", lamp, mugs)), "spatial", "extreme") == "shortcut"


SHAPES = (("cube", "red", -4, 0), ("cube", "green", 4, 0, dict(material="metal")), ("sphere", "blue", 0, 0, dict(scale=.35, size="small")), ("cone", "red", 1, 4),
          ("cylinder", "green", -2, 4, dict(material="metal")))
ball, cubes = the(F("kind", "sphere")), F("kind", "cube")


@pytest.mark.parametrize("program, reason", [
    (the(("relate", "left", ball, cubes)), "kept"),
    (the(("same", "colour", the(F("kind", "cone")), SCENE)), "kept"),
    (the(("same", "colour", the(F("kind", "cone")), cubes)), "kept"),
    (the(("same", "colour", the(F("kind", "cone")), F("colour", "red"))), "shortcut"),
    (the(("relate", "left", ball, F("colour", "blue"))), "empty"),
    (the(("relate", "left", ball, F("colour", "red", cubes))), "shortcut"),
    (the(("relate", "right", ball, F("material", "metal", cubes))), "shortcut"),
    (the(("relate", "behind", ball, SCENE)), "ambiguous"),
    (("all", ("relate", "behind", ball, SCENE)), "doubtful"),                                         # the cubes stand level with it
    (the(("relate", "behind", the(F("kind", "cylinder")), SCENE)), "doubtful"),
    (the(("relate", "left", the(("relate", "right", ball, cubes)), F("colour", "red"))), "ambiguous"),
    (the(("rank", 1, "left", cubes)), "form"),
    (the(cubes), "ambiguous"),
    (the(("nth", 1, "nearest", ball, cubes)), "doubtful"),                                            # 4 units each
    (the(("relate", "larger", ball, cubes)), "ambiguous"),
    (("all", ("relate", "larger", ball, cubes)), "shortcut")])                                        # both cubes are
def test_geometric_rules(program, reason):
    assert verdict(by_hand(*SHAPES), program, "geometric", "position") == reason


def test_sizes_must_not_contradict_the_picture():
    program, shapes = the(("relate", "larger", the(F("kind", "cone")), cubes)), (("cube", "red", -4, 0), ("cube", "green", 4, 0, dict(scale=.35, size="small")), ("cone", "blue", 0, -3, dict(scale=.4)))
    assert verdict(by_hand(*shapes), program, "geometric", "size") == "kept"
    view = by_hand(*shapes)
    near = [replace(f, alone_px=2000) if f.object_id == 2 else f for f in view.facts]   # the small cone right in front of the camera
    assert verdict(View(view.scene, near, (256, 256)), program, "geometric", "size") == "doubtful"


@pytest.mark.parametrize("px, reason", [({0: 900}, "kept"), ({0: 30}, "doubtful"), ({0: 400}, "invisible"), ({1: 50}, "shortcut"), ({2: 40}, "doubtful")])
def test_visibility(px, reason):
    assert verdict(by_hand(*SHAPES, px=px), the(("relate", "left", ball, cubes)), "geometric", "position") == reason


def test_small_pixels_count_by_the_pictures_area():
    view = by_hand(*SHAPES)
    large = View(view.scene, [replace(f, visible_px=f.visible_px // 4) for f in view.facts], (512, 512))
    assert verdict(large, the(("relate", "left", ball, cubes)), "geometric", "position") == "doubtful"


def test_near_ties_and_margins():
    for shift, reason in ((.4, "doubtful"), (2., "kept")):
        view = by_hand(("cube", "red", -2, 0), ("cube", "green", 2 + shift, 0), ("sphere", "blue", 0, 0), ("cone", "gray", 0, 4))
        assert verdict(view, the(("nth", 1, "nearest", ball, cubes)), "geometric", "ordinal") == reason
    for y, reason in ((.2, "doubtful"), (2., "kept")):
        view = by_hand(("cube", "red", -2, y), ("cube", "green", 2, -2), ("sphere", "blue", 0, 0), ("cone", "gray", 0, 4))
        assert verdict(view, the(("relate", "behind", ball, cubes)), "geometric", "position") == reason


def test_incorrect_and_grammar():
    view, p = by_hand(*SHAPES), the(("relate", "left", ball, cubes))
    assert verdict(view, p, "geometric", "position", expected=[(0, None)]) == "kept"
    assert verdict(view, p, "geometric", "position", expected=[(1, None)]) == "incorrect"
    assert verdict(view, p, "geometric", "position", expected=[(0, "body")]) == "incorrect"
    assert verdict(view, ["the", ["relate", "near", list(ball), ["scene"]]], "geometric", "position") == "grammar"
    for category, subtype, message in (("logic", "size", "no category"), ("spatial", "size", "no sub-type")):
        with pytest.raises(ValueError, match=message): verify(view, p, category, subtype)


def test_discriminative_rules():
    hidden = dict(texture="dots")
    view = by_hand(("cube", "red", -3, 0, hidden), ("cube", "blue", 3, 0, hidden), ("ring", "green", 0, 3), ("mug", "gray", 0, -2), ground=("dots", "red"))
    assert view.ids_of(view.camouflaged) == (0,)
    assert verdict(view, the(("camouflaged", EVERYTHING)), "discriminative", "camouflaged") == "kept"
    assert verdict(view, the(F("texture", "dots", EVERYTHING)), "discriminative", "camouflaged") == "ambiguous"
    assert verdict(view, the(F("colour", "blue")), "discriminative", "camouflaged") == "form"
    assert verdict(view, the(("thin", SCENE)), "discriminative", "thin") == "kept"
    assert verdict(view, the(F("kind", "mug")), "discriminative", "thin") == "form"
    assert run(view, F("kind", "cube")) == (0b10, 0b11)       # the camouflaged one is doubtful for any other question
    two = by_hand(("ring", "red", -3, 0), ("rod", "blue", 3, 0), ("mug", "gray", 0, -2), ("cube", "gray", 0, 2))
    assert verdict(two, the(("thin", SCENE)), "discriminative", "thin") == "ambiguous"
    lonely = by_hand(("ring", "red", -3, 0), ("mug", "gray", 0, -2))
    assert verdict(lonely, the(("thin", SCENE)), "discriminative", "thin") == "trivial"


def test_occlusion_through_the_occluder(pool):
    found = 0
    for scene, seen in pool:
        view = View(scene, seen)
        for i, o in enumerate(scene.objects):
            for j in range(view.n):
                if view.relate("covered", i)[0] >> j & 1:
                    found += 1
                    assert view.rules.hidden_low <= view.fraction[j] <= view.rules.hidden_high and view.ground[i] < view.ground[j]
                    assert readings(scene, seen)[0].hides(o.id, view.ids[j])
    assert found >= 3


DOLLS = (("doll", "red", -3, 0, dict(text="A")), ("doll", "green", 3, 0, dict(text="BC")), ("table", "blue", 5.5, 1), ("cone", "gray", 6, -1))
dolls = F("kind", "doll")


@pytest.mark.parametrize("program, subtype, reason", [
    (("part", "head", the(("letters", "fewest", dolls))), "letters", "kept"),
    (the(("letters", "fewest", dolls)), "letters", "kept"),
    (("part", "hat", the(("letter", "first", "B", dolls))), "letters", "kept"),
    (("part", "hat", the(("letter", "any", "D", dolls))), "letters", "empty"),
    (("part", "head", the(("nth", 1, "nearest", the(F("kind", "table")), dolls))), "part", "kept"),
    (("part", "head", the(("nth", 1, "nearest", the(F("kind", "table")), ("letter", "any", "B", dolls)))), "part", "shortcut"),
    (("part", "handle", the(("nth", 1, "nearest", the(F("kind", "table")), dolls))), "part", "empty"),
    (the(("nth", 1, "nearest", the(F("kind", "table")), dolls)), "comparison", "steps"),
    (the(("nth", 1, "nearest", the(F("kind", "table")), ("purpose", "toy", SCENE))), "commonsense", "kept"),
    (the(("nth", 1, "nearest", the(("letters", "most", dolls)), ("purpose", "table", SCENE))), "commonsense", "shortcut"),
    (the(("purpose", "toy", SCENE)), "commonsense", "ambiguous"),
    (("all", ("purpose", "toy", SCENE)), "commonsense", "steps"),
    (("all", ("commonest", "kind", SCENE)), "counting", "kept"),
    (the(("most", "left", SCENE, dolls)), "counting", "kept")])
def test_multistep_rules(program, subtype, reason):
    check_program(program)
    assert verdict(by_hand(*DOLLS), program, "multi-step", subtype) == reason


def test_letters_must_be_readable():
    turned = tuple((*d[:4], d[4] | dict(yaw=1.4)) if k == 1 else d for k, d in enumerate(DOLLS[:2])) + DOLLS[2:]
    for view in (by_hand(*turned), by_hand(*DOLLS, px={1: 300})):
        assert verdict(view, the(("letters", "fewest", dolls)), "multi-step", "letters") == "doubtful"
    same = by_hand(("doll", "red", -3, 0, dict(text="AB")), *DOLLS[1:])
    assert verdict(same, the(("letters", "fewest", dolls)), "multi-step", "letters") == "doubtful"


def test_topology():
    view = by_hand(("table", "brown", 0, 0, dict(scale=1.4)), ("cube", "red", .5, 0, dict(z=1.75, on=0, scale=.3)), ("cube", "green", -.5, 0, dict(scale=.3)), ("cube", "blue", 4, 0, dict(scale=.3)),
                   ("crate", "gray", -4, 0), ("sphere", "red", -4, 0, dict(z=.1, inside=4, scale=.3)), ("sphere", "cyan", 4, 3, dict(scale=.3)))
    table, crate = the(F("kind", "table")), the(F("kind", "crate"))
    for relation, anchor, kind, expected in (("on", table, "cube", (1,)), ("under", table, "cube", (2,)), ("inside", crate, "sphere", (5,)), ("outside", crate, "sphere", (6,)),
                                             ("above", the(F("colour", "green")), "cube", (1,)), ("below", the(F("colour", "red", F("kind", "cube"))), "cube", (2,))):
        sure, maybe = run(view, ("relate", relation, anchor, F("kind", kind)))
        assert view.ids_of(sure) == expected == view.ids_of(maybe), relation
    assert verdict(view, the(("relate", "under", table, F("kind", "cube"))), "spatial", "topological") == "kept"


# --- language, grammar, helpers ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("program, message", [
    (["the"], "takes 1 arguments"), ("the", "expected program"), ([], "expected program"), (["the", ["scene", 1]], "takes 0"), (["the", ["filter", "colour", "pink", ["scene"]]], "is no word"),
    (["the", ["filter", "weight", "red", ["scene"]]], "weight"), (["the", ["nth", -1, "nearest", ["the", ["scene"]], ["scene"]]], "is no count"),
    (["the", ["nth", True, "nearest", ["the", ["scene"]], ["scene"]]], "is no count"), (["part", "a b", ["the", ["scene"]]], "is no part"), (["the", ["the", ["scene"]]], "expected set"),
    (["the", ["relate", "left", ["scene"], ["scene"]]], "expected one"), (["the", ["object", 3]], "expected set"), (["the", ["letter", "first", "ab", ["scene"]]], "is no character")])
def test_grammar_refuses(program, message):
    with pytest.raises((ProgramError, KeyError), match=message): check_program(program)


def test_templates_fill_and_are_apart():
    for key in TEMPLATES:
        train, held = paraphrases(key), paraphrases(key, True)
        assert len(train) >= 4 and held and not set(train) & set(held), key


def test_steps_and_ablations():
    p = ("part", "head", the(("nth", 1, "nearest", the(("rank", 1, "tallest", cubes)), ("purpose", "toy", SCENE))))
    assert steps(p) == 4
    assert [op for op, _ in ablations(p)] == ["nth", "rank", "filter", "purpose"]
    view = by_hand(*SHAPES)
    answer = execute(view, the(("relate", "left", ball, cubes)))
    assert not needless(view, the(cubes), answer) and needless(view, the(F("colour", "red", cubes)), answer)


def test_bounds_agree_with_hulls():
    for kind in ("sphere", "cube", "cylinder", "cone", "torus", "capsule", "mug", "doll", "ladder", "fork", "dumbbell", "frame"):
        o = make_object(0, kind, "red", scale=.6)
        low, high = bounds(o)
        a, b, _ = extent(o.parts)
        np.testing.assert_allclose([low, high], [np.asarray(a) * .6, np.asarray(b) * .6], atol=.02)
    assert np.allclose(euler((0, 0, 0)), np.eye(3))


# --- random scenes ----------------------------------------------------------------------------------------------------------------

def test_random_questions_by_brute_force(pool):
    kept, granularities, subtypes = 0, set(), set()
    for k, (scene, seen) in enumerate(pool):
        worlds = readings(scene, seen)
        for q in questions_for(scene, seen, k, 14):
            check(worlds, q.program, q.answer, answer_mask(seen, q.answer))
            check_program(q.program)
            json.dumps(q.to_dict())
            kept += 1; granularities.add(q.granularity); subtypes.add((q.category, q.subtype))
            assert len(vocabulary(q.question)) <= 40 and "None" not in q.question + q.reasoning and "{" not in q.question
    assert kept > 400 and granularities == {"part", "object", "semantic"} and len(subtypes) >= 18, (kept, subtypes)


def test_brute_force_notices(pool):
    "Wrong answers, wrong masks and questions with two answers are found out."
    caught = tried = 0
    for k, (scene, seen) in enumerate(pool[:10]):
        worlds = readings(scene, seen)
        for q in questions_for(scene, seen, k, 6):
            other = [o.id for o in scene.objects if o.id not in {i for i, _ in q.answer}]
            if not other: continue
            tried += 2
            for answer, mask in (([(other[0], q.answer[0][1])], answer_mask(seen, q.answer)), (q.answer, ~answer_mask(seen, q.answer))):
                with pytest.raises(AssertionError): check(worlds, q.program, answer, mask)
                caught += 1
    assert caught == tried > 40
    scene, seen = pool[0]
    with pytest.raises(AssertionError, match="answers"): check(readings(scene, seen), ["the", ["scene"]], [(0, None)], answer_mask(seen, [(0, None)]))


def test_same_seed_same_questions(pool):
    scene, seen = pool[1]
    ask = lambda rng: questions_for(scene, seen, rng, 10)
    assert ask(5) == ask(5) == ask(Random(5)) != ask(6)
    assert ask(np.random.default_rng(1)) == ask(np.random.default_rng(1))
    assert len({json.dumps(q.program) for q in ask(5)}) == len(ask(5))


def test_answer_masks_in_one_gather(pool):
    for scene, seen in pool[:8]:
        qs = questions_for(scene, seen, 0, 10)
        masks = answer_masks(torch.from_numpy(seen.object_ids), torch.from_numpy(seen.part_ids), seen.parts, [q.answer for q in qs])
        for q, m in zip(qs, masks): np.testing.assert_array_equal(m.numpy(), answer_mask(seen, q.answer))


def test_held_out_pairs_and_wording(pool):
    pairs, seen_new = language_rules().pairs, 0
    for k, (scene, seen) in enumerate(pool):
        at = {o.id: (o.colour, o.kind) for o in scene.objects}
        for q in questions_for(scene, seen, k, 8): assert not q.novel and not {at[i] for i, _ in q.answer} & pairs
        for q in questions_for(scene, seen, k, 4, novel=True): assert q.novel; seen_new += "pair" in q.novel
    assert seen_new > 0
    assert not any((o.colour, o.kind) in pairs for s in range(20) for o in sample_scene(s, "clevr", forbid={(k, c) for c, k in pairs}).objects)


def test_names_are_shortest_and_single_out(pool):
    for scene, seen in pool[:20]:
        view = View(scene, seen)
        for i in range(view.n):
            for s in names(view, i):
                assert run(view, s) == (1 << i, 1 << i) and phrase(s)


def test_questions_are_cheap(pool):
    views = [View(s, r) for s, r in pool]
    questions_for(views[0], n=4)
    start = time.process_time()
    made = sum(len(questions_for(View(s, r), rng=1, n=16)) for s, r in pool)
    assert (time.process_time() - start) / made < .006 # 1 ms on a quiet core


def test_impossible_questions_are_errors():
    view = by_hand(*SHAPES)
    with pytest.raises(NoQuestion, match="no valid discriminative/camouflaged question in 5 tries"): question_for(view, "discriminative", "camouflaged", 0, tries=5)
    with pytest.raises(NoQuestion, match="other granularity"): question_for(view, "warmup", "attribute", 0, tries=5, granularity="part")
    with pytest.raises(ValueError, match="no category"): question_for(view, "logic", "size", 0)
    with pytest.raises(ValueError, match="n must be"): questions_for(view, n=-1)
    with pytest.raises(ValueError, match="no facts about objects"): View(view.scene, view.facts[:2], (256, 256))
    with pytest.raises(Unclear, match="empty"): execute(view, the(("relate", "left", the(F("kind", "doll")), SCENE)))
    assert set(FAMILIES) == {(c, s) for c, ss in SUBTYPES.items() for s in ss}
