"""sgdr-world: every sample of the fixed test set read a second time by brute force; composition, splits, cache, manifest, composing again."""
import json
from collections import Counter

import numpy as np
import pytest
import torch
from brute_force import check, readings

from rea2seg.masks import from_rle
from rea2seg.scenes import benchmark as bench
from rea2seg.scenes.benchmark import SPLITS, WorldError, compose, load_world, manifest_path, read_manifest, scaled, scene_seed, world_rules, world_scene
from rea2seg.scenes.cast import cast, pack
from rea2seg.scenes.questions import language_rules
from rea2seg.scenes.render import RenderedBatch, measure, to_records
from rea2seg.scenes.verify import verify
from rea2seg.scenes.view import View

PAPER = {"geometric": 396, "spatial": 270, "discriminative": 279, "multi-step": 245}


def masks_only(scenes, size_hw=(256, 256)):
    "Renderings without colours: the cast alone, in a fifth of the time."
    packed = pack(scenes)
    seen = cast(packed, size_hw, "cpu")
    none, some = seen.solid < 0, seen.solid.clamp(min=0)
    pick = lambda table: torch.where(none, -1, table[some]).to(torch.int16)
    batch = RenderedBatch(torch.zeros(*seen.solid.shape, 3, dtype=torch.uint8), pick(packed.object_id[packed.owner]), pick(packed.part_index[packed.part]), seen.t,
                          **measure(packed, seen, size_hw))
    return to_records(batch, scenes)


@pytest.fixture(autouse=True)
def one_thread():
    "Small pictures: a second thread only waits."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REA2SEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sgdr-world"


@pytest.fixture(scope="module")
def manifest():
    return read_manifest()


def rows_of(manifest): return [row for _, _, rows in manifest["scenes"] for row in rows]


def test_composition_is_the_papers(manifest):
    rows = rows_of(manifest)
    assert len(rows) == 1190 and Counter(r[0] for r in rows) == PAPER
    assert Counter((r[0], r[1]) for r in rows) == world_rules().counts()
    assert [Counter(r[1] for r in rows)[s] for s in ("camouflaged", "occluded", "thin")] == [113, 58, 108]
    assert {r[2] for r in rows} == {"part", "object", "semantic"}
    assert max(len(rows) for _, _, rows in manifest["scenes"]) <= 3
    assert len({s for s, _, _ in manifest["scenes"]}) == len(manifest["scenes"])
    assert manifest_path().stat().st_size < 600_000


def test_every_sample_by_brute_force(manifest):
    "1,190 programs, each with exactly one answer in four readings, equal to the mask's objects; the verifier keeps each."
    k, pairs, todo = 0, language_rules().pairs, manifest["scenes"]
    for i in range(0, len(todo), 8):
        chunk = todo[i:i + 8]
        scenes = [world_scene("test", seed, theme) for seed, theme, _ in chunk]
        for scene, seen, (seed, _, rows) in zip(scenes, masks_only(scenes), chunk):
            assert seed == scene.seed and scene_seed("test", 0, 0) <= seed < scene_seed("test", 1, 0)
            assert not any((o.colour, o.kind) in pairs for o in scene.objects)
            view, worlds = View(scene, seen), readings(scene, seen)
            for category, subtype, granularity, _, question, program, answer, _ in rows:
                mask = from_rle(manifest["masks"][k])
                try: check(worlds, program, answer, mask)
                except AssertionError as e: raise AssertionError(f"sample {k}: {question}\n{e}") from e
                verdict = verify(view, program, category, subtype, answer)
                assert verdict, f"sample {k}: {question}: {verdict.reason} {verdict.detail}"
                assert verdict.answer.granularity == granularity
                k += 1
    assert k == 1190


def test_questions_are_plain_english(manifest):
    from rea2seg.scenes.language import vocabulary
    questions = [r[4] for r in rows_of(manifest)]
    words = Counter(w for q in questions for w in vocabulary(q))
    assert 150 < len(words) < 350
    assert max(len(vocabulary(q)) for q in questions) <= 40
    assert len(set(questions)) > 800
    assert all(q[0].isupper() and q[-1] in ".?" and "{" not in q and "  " not in q for q in questions)


def test_spatial_questions_name_only_the_category(manifest):
    from rea2seg.scenes.programs import path
    for row in rows_of(manifest):
        if row[0] == "spatial": assert [n[1] for n in path(row[5]) if n[0] in ("filter", "with", "purpose", "letter")] == ["kind"]


@pytest.mark.parametrize("split", SPLITS)
def test_seeds_stay_in_their_range(split):
    start, end, stride = SPLITS[split]
    for other, (a, b, _) in SPLITS.items(): assert other == split or b <= start or end <= a
    assert start <= scene_seed(split, 0, 0) < scene_seed(split, 1, 0) == scene_seed(split, 0, stride - 1) + 1 < end
    with pytest.raises(WorldError, match="used up"): scene_seed(split, 0, stride)
    with pytest.raises(ValueError, match="seeds are 0 to"): scene_seed(split, (end - start) // stride, 0)
    with pytest.raises(ValueError, match="seeds are 0 to"): scene_seed(split, -1, 0)


def test_first_scenes_are_composed_again_equally(manifest):
    "Composing test set 0 from scratch gives the manifest's first scenes."
    made = compose(world_rules().counts(), "test", 0)
    for (seed, theme, rows), (scene, _, questions) in zip(manifest["scenes"][:12], made):
        assert (scene.seed, scene.meta["theme"]) == (seed, theme)
        assert [(q.question, q.program, q.digest) for q in questions] == [(r[4], r[5], r[7]) for r in rows]


def test_manifest_set_loads_and_comes_from_the_cache(cache):
    world = load_world("test", n=12)
    assert world.manifest and len(world) == 12
    first = list(world)
    assert Counter((s.category, s.subtype) for s in first) == {k: n for k, n in scaled(world_rules().counts(), 12).items() if n}
    assert any(cache.rglob("samples.jsonl"))
    second = list(load_world("test", n=12))
    assert [s.fingerprint() for s in first] == [s.fingerprint() for s in second]
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a.load_image(), b.load_image())
        assert a.reasoning == b.reasoning and a.load_mask().any() and a.split == "test" and a.source == "sgdr-world"
        assert a.reasoning.startswith("The picture shows") and "So the answer is" in a.reasoning


def test_damaged_cache_heals(cache):
    world = load_world("val", n=3, categories="geometric")
    samples = list(world)
    good = samples[0].load_image()
    for damage in (lambda p: p.write_bytes(p.read_bytes()[:100]), lambda p: p.unlink()):
        damage(samples[0].image)
        np.testing.assert_array_equal(next(iter(world)).load_image(), good)


def test_interrupted_pass_leaves_no_half_cache(cache):
    world = load_world("val", n=3, categories="geometric")
    next(iter(world))
    assert not list(cache.rglob("samples.jsonl"))
    assert len(list(world)) == 3 and len(list(cache.rglob("samples.jsonl"))) == 1


def test_cache_that_cannot_be_written_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REA2SEG_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written"): samples = list(load_world("val", n=2, categories="geometric"))
    assert len(samples) == 2 and isinstance(samples[0].image, np.ndarray)


def test_two_runs_are_equal_and_seeds_differ():
    make = lambda seed: [(s.fingerprint(), s.load_image().tobytes()) for s in load_world("test", n=5, seed=seed, cache=False)]
    assert make(7) == make(7) != make(8)


def test_another_test_set_has_the_same_shares():
    wanted = scaled(world_rules().counts(), 20)
    got = Counter((s.category, s.subtype) for s in load_world("test", n=20, seed=3, cache=False))
    assert got == {k: n for k, n in wanted.items() if n}


def test_train_has_no_end_and_no_cache(cache):
    world = load_world("train", counts={"geometric/position": 1, "warmup/semantic": 1})
    with pytest.raises(TypeError, match="no end"): len(world)
    stream = iter(world)
    got = [next(stream) for _ in range(9)]
    assert {s.category for s in got} == {"geometric", "warmup"} and not cache.exists()
    assert all(s.meta["scene_seed"] >= SPLITS["train"][0] and not s.meta["novel"] for s in got)


def test_general_split_holds_something_new():
    from rea2seg.scenes.language import paraphrases
    for s in load_world("general", n=6, cache=False):
        assert set(s.meta["novel"]) & {"pair", "wording"}
    assert paraphrases("nth") and not set(paraphrases("nth")) & set(paraphrases("nth", True))


def test_other_sizes():
    world = load_world("test", n=3, size_hw=(120, 160), cache=False)
    for s in world: assert s.load_image().shape == (120, 160, 3) and s.load_mask().shape == (120, 160)


@pytest.mark.parametrize("change, message", [
    (lambda m: m["scenes"][0][2][0].__setitem__(6, [[99, None]]), "digest of sample 0 does not fit"),
    (lambda m: m["scenes"].pop(), "questions, 1190 masks"),
    (lambda m: m.pop("masks"), "is no manifest of sgdr-world"),
    (lambda m: m.__setitem__("masks", "AAAA"), "is no manifest of sgdr-world")])
def test_spoilt_manifest_is_refused(tmp_path, change, message):
    m = json.loads(manifest_path().read_text())
    change(m)
    (tmp_path / "m.json").write_text(json.dumps(m))
    with pytest.raises(WorldError, match=message): read_manifest(tmp_path / "m.json")


def test_machine_that_renders_otherwise_is_told(manifest):
    other = manifest | {"masks": [manifest["masks"][1]] + manifest["masks"][1:]}
    with pytest.raises(WorldError, match="test 0 sample 0: mask agrees with the manifest's by IoU"): next(bench.from_manifest(other, (256, 256), {0}))
    scenes = json.loads(json.dumps(manifest["scenes"]))
    row = scenes[0][2][0]
    row[6] = [[(row[6][0][0] + 1) % 3, None]]
    with pytest.raises(WorldError, match="sample 0: this machine finds"): next(bench.from_manifest(manifest | {"scenes": scenes}, (256, 256), {0}))


@pytest.mark.parametrize("options, message", [
    (dict(split="exam"), "no split 'exam'"), (dict(seed=-1), "seeds are 0 to"), (dict(n=0), "cannot make 0"), (dict(categories=["logic"]), "no category 'logic'"),
    (dict(categories=["spatial/size"]), "no sub-type 'size'"), (dict(counts={"spatial/between": 1.5}), "must be a whole number"), (dict(counts={"spatial/between": -1}), "whole number"),
    (dict(counts={}), "without samples")])
def test_bad_requests(options, message):
    with pytest.raises(ValueError, match=message): load_world(**options)


def test_impossible_counts_end_with_an_error():
    from dataclasses import replace
    with pytest.raises(WorldError, match="no discriminative/thin question in 1 scenes of thin: its count 2 cannot be met"):
        list(compose({("discriminative", "thin"): 2}, rules=replace(world_rules(), tries=0, patience=1), size_hw=(64, 64)))
