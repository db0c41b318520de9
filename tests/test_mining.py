"""Mining: nothing lost, nothing twice, the same candidates as one question at a time, whatever happens to the process or the data."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rea2seg.candidates import discover
from rea2seg.cli import main
from rea2seg.data.pack import PackReader, benchmark_weights, map_array, spread
from rea2seg.data.reader import DataError, ProblemLog
from rea2seg.data.samples import Sample
from rea2seg.data.sources import load_samples
from rea2seg.generators import load_generator
from rea2seg.masks import to_rle
from rea2seg.mined import MinedError, MinedSample, read_mined
from rea2seg.mining import mine, mine_picture, pictures
from rea2seg.records import CandidateSet
from rea2seg.results import RunError, RunSettings
from rea2seg.settings import Settings, load_section

PROFILE = Settings.load("tiny")
SMALL = load_section(RunSettings, "mining.run", samples_per_part=4)
YX = np.mgrid[:24, :32]

def disc(k, **kw):
    mask = np.hypot(YX[0] - 12, YX[1] - 12) < 3 + k % 7
    image = np.where(mask[..., None], 200, 60).astype(np.uint8).repeat(3, 2)
    return Sample(**{**dict(name=f"disc-{k:03d}", image=image, question=f"disc {k}", mask=to_rle(mask), category=("geometric", "spatial")[k % 2], image_id=f"i{k // 2}"), **kw})

def bright(generator, settings, image, questions):
    if any("refused" in q for q in questions): raise ValueError("the question is too long")
    m = torch.from_numpy(image[..., 1] > 100)
    masks = torch.stack([m, m.roll(4, 1), torch.ones_like(m)])
    return [(SimpleNamespace(initial=m.roll(2, 1)), CandidateSet(masks, ("multimask", "kcore", "amg"), torch.tensor([.2, .9, .5]), torch.ones(3))) for _ in questions]

def go(folder, samples=None, **kw): return mine(None, PROFILE, [disc(k) for k in range(10)] if samples is None else samples, folder, **(dict(progress=False, find=bright, run_settings=SMALL) | kw))

def names(folder): return [n for p in sorted(Path(folder).glob("part-*.parquet")) for n in pq.read_table(p, columns=["name"])["name"].to_pylist()]

# ---- the run --------------------------------------------------------------------------------------------------------------

def test_rows_hold_what_was_found(tmp_path):
    done = go(tmp_path)
    mined = read_mined(tmp_path)
    assert done["mined"] == len(mined) == 10 and done["problems"] == [] and len(list(tmp_path.glob("part-*"))) == 3
    for k, s in enumerate(mined):
        truth = disc(k).load_mask()
        assert s.name == f"disc-{k:03d}" and s.question == f"disc {k}" and s.category == disc(k).category and s.sources == ["multimask", "kcore", "amg"] and len(s) == 3
        masks = s.masks()
        assert (s.truth() == truth).all() and (s.initial() == np.roll(masks[0], 2, 1)).all() and s.fingerprint == disc(k).fingerprint()
        ious = [(m & truth).sum() / (m | truth).sum() for m in (*masks, s.initial())]
        assert [*s.ious, s.initial_iou] == pytest.approx(ious, abs=1e-6)

def test_ignored_pixels_count_for_nothing(tmp_path):
    ignore = np.zeros((24, 32), bool); ignore[:, 16:] = True
    go(tmp_path, [disc(3, ignore=to_rle(ignore))])
    s = read_mined(tmp_path)[0]
    kept = [(m & s.truth() & ~ignore).sum() / ((m | s.truth()) & ~ignore).sum() for m in s.masks()]
    assert s.ious == pytest.approx(kept, abs=1e-6) and s.ious[2] != pytest.approx((s.truth()).mean(), abs=1e-3)

SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from test_mining import bright, disc, go
calls = open({calls!r}, "a", buffering=1)
def slow(generator, settings, image, questions):
    for q in questions: calls.write(q + "\\n")
    time.sleep(.05)
    return bright(generator, settings, image, questions)
go({out!r}, [disc(k) for k in range(40)], find=slow)
"""

def test_kill_9_loses_nothing_and_repeats_at_most_one_part(tmp_path):
    calls, out = tmp_path / "calls", tmp_path / "run"
    script = SCRIPT.format(tests=str(Path(__file__).parent), calls=str(calls), out=str(out))
    start = lambda: subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    child, until = start(), time.monotonic() + 120
    while len(list(out.glob("part-*.parquet"))) < 3:
        assert child.poll() is None and time.monotonic() < until, child.stderr.read().decode()[-2000:]
        time.sleep(.01)
    time.sleep(.08)  # into the next part
    child.send_signal(signal.SIGKILL); child.wait()
    kept = set(names(out))
    assert 12 <= len(kept) < 40
    second = start(); assert second.wait(120) == 0, second.stderr.read().decode()[-2000:]
    all_ = names(out)
    assert sorted(all_) == [f"disc-{k:03d}" for k in range(40)] == [s.name for s in read_mined(out)]
    asked = calls.read_text().split("\n")[:-1]
    twice = {q for q in asked if asked.count(q) > 1}
    assert len(twice) <= 6 and not {f"disc-{int(q.split()[1]):03d}" for q in twice} & kept and all(asked.count(q) <= 2 for q in asked)

def test_shards_share_the_pictures(tmp_path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    go(whole); parts = [go(shared, shard=(i, 3))["mined"] for i in range(3)]
    assert sum(parts) == 10 and all(n % 2 == 0 for n in parts) and len(names(shared)) == 10
    a, b = read_mined(whole), read_mined(shared)
    assert [(s.name, s.candidates, s.ious) for s in a] == [(s.name, s.candidates, s.ious) for s in b]

def test_other_settings_do_not_continue_a_run(tmp_path):
    go(tmp_path)
    with pytest.raises(RunError, match=f"settings.seed_points: {PROFILE.seed_points} then, 7 now"): mine(None, PROFILE.with_(seed_points=7), [disc(0)], tmp_path, progress=False, find=bright)
    with pytest.raises(RunError, match="per_image"): go(tmp_path, per_image=1)
    assert mine(None, PROFILE.with_(group_size=3, mask_view="binary"), [disc(0)], tmp_path, progress=False, find=bright)["mined"] == 0  # how candidates are scored does not matter here
    assert go(tmp_path, [disc(0)], resume=False)["mined"] == 1 and len(read_mined(tmp_path)) == 1

# ---- bad data -------------------------------------------------------------------------------------------------------------

def test_bad_samples_cost_only_themselves(tmp_path):
    other = np.zeros((24, 33), bool); other[3] = True
    bad = {1: dict(mask=None), 2: dict(question="refused"), 5: dict(mask=dict(size=[24, 32], counts="zzz")), 6: dict(image=lambda: np.zeros((24, 32, 3), np.uint8), mask=to_rle(other)),
           8: dict(image=Path("nowhere.png"), image_id="alone")}
    samples = [disc(k, **bad.get(k, {})) for k in range(10)]
    done = go(tmp_path, samples)
    assert {p["name"] for p in done["problems"]} == {f"disc-{k:03d}" for k in (1, 2, 5, 6, 8)} and not any(p["kept"] for p in done["problems"])
    said = {p["name"]: p["message"] for p in done["problems"]}
    assert "no mask" in said["disc-001"] and "refuses it: the question is too long" in said["disc-002"] and "damaged" in said["disc-005"] and "24x33" in said["disc-006"] and "nowhere.png" in said["disc-008"]
    assert [s.name for s in read_mined(tmp_path)] == [f"disc-{k:03d}" for k in (0, 3, 4, 7, 9)]
    healed = go(tmp_path, [disc(k) for k in range(10)])
    assert healed["mined"] == 5 and healed["problems"] == []

def test_a_generator_that_always_fails_stops_the_run(tmp_path):
    with pytest.raises(RunError, match="none of the first 6 samples could be mined; last: .*too long"): go(tmp_path, [disc(k, question="refused") for k in range(40)])
    with pytest.raises(RunError, match="no sample could be mined: .*no mask"): go(tmp_path / "b", [disc(k, mask=None) for k in range(3)])

def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(MinedError, match="no run.json"): read_mined(tmp_path)
    go(tmp_path)
    part = sorted(tmp_path.glob("part-*"))[0]; whole = part.read_bytes()
    part.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(MinedError, match=f"{part.name} cannot be read"): read_mined(tmp_path)
    pq.write_table(pq.read_table(sorted(tmp_path.glob("part-*"))[1]).drop_columns(["ious"]), part)
    with pytest.raises(MinedError, match="lacks ious"): read_mined(tmp_path)

def test_a_full_disk_leaves_whole_parts(tmp_path, monkeypatch):
    import rea2seg.results as results
    real = results.pq.write_table
    def full(table, path, **kw):
        real(table, path, **kw)
        if len(list(tmp_path.glob("part-*"))) >= 1: Path(path).write_bytes(b"half"); raise OSError(28, "No space left on device")
    monkeypatch.setattr(results.pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"): go(tmp_path)
    assert not list(tmp_path.glob(".part*")) and len(read_mined(tmp_path)) == 4
    monkeypatch.setattr(results.pq, "write_table", real)
    assert go(tmp_path)["before"] == 4 and len(read_mined(tmp_path)) == 10

# ---- the real generator, packs ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    "Two scenes of three coloured squares with questions of two categories; the second scene is in another shard."
    folder = tmp_path_factory.mktemp("packs") / "toy"; folder.mkdir()
    for first in (0, 256):
        maps, image = np.full((1, 64, 64), 255, np.uint8), np.full((1, 64, 64, 3), 120, np.uint8)
        for i, colour in enumerate(((200, 40, 40), (40, 60, 200), (60, 180, 60))):
            y, x = 6 + (first // 64 + 20 * i) % 40, 2 + 20 * i
            maps[0, y:y + 16, x:x + 16] = i; image[0, y:y + 16, x:x + 16] = colour
        asked = [dict(q=q, a=a, c=c, s="s") for q, a, c in (("What is the red object?", [0], "geometric"), ("What is left of the green object?", [0, 1], "spatial"), ("the red one", [0], "warmup"),
                                                             ("the blue object", [1], "geometric"), ("the green object", [2], "geometric"))]
        np.savez(folder / f"pack-{first:07d}.npz", image=image, part_map=maps, questions=np.frombuffer(json.dumps([asked]).encode(), np.uint8))
    return folder

def test_packs_are_samples(pack):
    every = list(load_samples(f"pack:{pack}"))
    assert [s.name for s in every] == [f"toy/{scene:06d}/{q:02d}" for scene in (0, 256) for q in (0, 1, 3, 4)] and len({s.image_id for s in every}) == 2
    with np.load(pack / "pack-0000256.npz") as z:
        assert (map_array(pack / "pack-0000256.npz", "part_map") == z["part_map"]).all()
        assert (every[5].load_mask() == np.isin(z["part_map"][0], [0, 1])).all() and (every[5].load_image() == z["image"][0]).all() and every[5].meta == {"scene": 256, "question": 1}
    some = [s.name for s in load_samples(f"pack:{pack}", per_image=2)]
    assert len(some) == 4 and [s.name for s in load_samples(f"pack:{pack}", per_image=2)] == some
    assert all(len({s.category for s in g}) == 2 for g in pictures(load_samples(f"pack:{pack}", per_image=2), set()))
    assert [s.name for s in load_samples(f"pack:{pack}", limit=3, seed=9)] == [s.name for s in every[:3]] and len(load_samples(f"pack:{pack}", warmup=True)) == 10
    with pytest.raises(DataError, match="per_image must be at least 1"): PackReader(pack, per_image=0)
    np.savez_compressed(pack.parent / "pack-z.npz", image=np.zeros(3))
    with pytest.raises(DataError, match="not stored plainly"): map_array(pack.parent / "pack-z.npz", "image")

def test_a_pack_is_asked_as_the_benchmark_asks(tmp_path):
    "Ninety-nine of the benchmark's questions are about sizes, 46 about distances: what a scene offers of each does not count."
    kinds = [("geometric", "size"), *[("spatial", "distance")] * 9, ("warmup", "part"), ("geometric", "unknown")]
    asked = [[dict(q=f"{k} of {n}", a=[0], c=c, s=s) for k, (c, s) in enumerate(kinds)] for n in range(400)] + [[]]
    weights = benchmark_weights(asked[:1], easy=0.5)[0]
    assert weights == pytest.approx([0.5 * 99 / 1190, *[0.5 * 46 / 1190 / 9] * 9, 0.5, 0])
    n = len(asked)
    np.savez(tmp_path / "pack-0000000.npz", image=np.zeros((n, 8, 8, 3), np.uint8), part_map=np.zeros((n, 8, 8), np.uint8), questions=np.frombuffer(json.dumps(asked).encode(), np.uint8))
    found = [s.subtype for s in load_samples(f"pack:{tmp_path}", per_image=1, shares="benchmark")]
    assert len(found) == 400 and found.count("size") / 400 == pytest.approx(99 / 145, abs=0.08) and set(found) == {"size", "distance"}
    some = [s.name for s in load_samples(f"pack:{tmp_path}", per_image=3, shares="benchmark")]
    assert len(some) == len(set(some)) == 1200 and some == [s.name for s in load_samples(f"pack:{tmp_path}", per_image=3, shares="benchmark")]
    with pytest.raises(DataError, match="shares must be categories or benchmark, got 'even'"): PackReader(tmp_path, shares="even")
    for wrong in (dict(), dict(per_image=2, warmup=True)):
        with pytest.raises(DataError, match="need per_image, and have no one-step questions"): PackReader(tmp_path, shares="benchmark", **wrong)

@pytest.mark.parametrize("n,kinds", [(3, "aaab"), (4, "abcabc"), (1, "a"), (2, "")])
def test_a_spread_takes_each_category_in_turn(n, kinds):
    found = spread(list(kinds), n, (0, 7))
    assert len(found) == min(n, len(kinds)) and found == sorted(set(found))
    counts = [sum(kinds[i] == k for i in found) for k in set(kinds)]
    assert not counts or max(counts) - min(counts) <= 1 or any(kinds.count(k) < max(counts) for k in set(kinds))

def test_together_is_the_same_as_one_by_one(pack):
    generator, settings = load_generator("embedded:generator", layers=PROFILE.layers), PROFILE.with_(seed_points=8)
    group = list(load_samples(f"pack:{pack}"))[:4]
    image = group[0].load_image()
    rows = mine_picture(generator, settings, group, ProblemLog())
    for s, row in zip(group, rows, strict=True):
        g = generator.ground(image, s.question, max_new_tokens=settings.max_new_tokens)
        alone = discover(generator.sam, g.split()[0], settings)
        assert row["sources"] == list(alone.sources) and row["predicted_ious"] == pytest.approx(alone.predicted_ious.tolist(), abs=1e-4)
        assert (np.stack([np.asarray(m) for m in alone.masks]) != MinedSample(row).masks()).mean() < 1e-4

def test_the_verb_mines_a_pack_and_continues(pack, tmp_path, capsys):
    out = tmp_path / "whole"
    command = ["mine", "--data", f"pack:{pack}", "--per-image", "2", "--out", str(out), "--set", "seed_points=6", "--quiet", "--device", "cpu"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "4 mined" in said and "questions/s" in said
    mined = read_mined(out)
    assert len(mined) == 4 and all(1 <= len(s) <= 15 for s in mined) and mined.picture(3).shape == (64, 64, 3)
    assert mined.picture(0).tolist() == list(load_samples(f"pack:{pack}"))[0].load_image().tolist()
    assert main(command) == 0 and "0 mined" in capsys.readouterr().out and len(names(out)) == 4
    assert main(["mine", "--data", "world", "--shares", "benchmark", "--out", str(tmp_path / "x")]) == 2 and "--shares benchmark is for packs, got --data world" in capsys.readouterr().err
    assert main(["mine", "--data", f"pack:{tmp_path}", "--out", str(tmp_path / "x")]) == 2 and "no pack-*.npz" in capsys.readouterr().err
    moved = pack.rename(pack.with_name("moved"))
    try:
        with pytest.raises(MinedError, match="cannot be opened from here"): read_mined(out).picture(0)
    finally: moved.rename(pack)
