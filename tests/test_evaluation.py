"""The evaluation run: nothing lost, nothing twice, whatever happens to the process or the data."""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from rea2seg.data.samples import Sample
from rea2seg.data.sources import Listed, register_source
from rea2seg.evaluation import Answer, add_arguments, answers, evaluate, format_summary, parse_shard, reader_options, run
from rea2seg.masks import to_rle
from rea2seg.metrics import Convention
from rea2seg.records import CandidateSet
from rea2seg.results import Parts, RunError, RunSettings, compare_runs
from rea2seg.settings import Settings

SMALL = RunSettings.load(samples_per_part=4)


def disc(k, **kw):
    yx = np.mgrid[:24, :32]
    mask = np.hypot(yx[0] - 12, yx[1] - 12) < 3 + k % 7
    image = np.where(mask[..., None], 200, 60).astype(np.uint8).repeat(3, 2)
    image[0, 0, 0] = k  # no two pictures are equal
    return Sample(**{**dict(name=f"disc-{k:03d}", image=image, question=f"disc {k}", mask=to_rle(mask), category=("geometric", "spatial")[k % 2], subtype="round", image_id=f"i{k // 2}"), **kw})


def discs(n, **kw): return Listed("discs", [disc(k, **kw) for k in range(n)])


def candidates(mask):
    masks = torch.stack([mask, mask.roll(4, 1), torch.ones_like(mask)])
    return CandidateSet(masks, ("multimask", "kcore", "amg"), torch.tensor([.2, .9, .5]), torch.ones(3))


def bright(model, image, question, embedding=None):
    m = torch.from_numpy(image[..., 1] > 100)
    return Answer(m.roll(2, 1).numpy(), candidates(m), np.array([.9, .5, .1]))


def go(folder, samples=None, answer=bright, **kw):
    return evaluate(SimpleNamespace(), discs(10) if samples is None else samples, folder, progress=False, answer=answer, run_settings=SMALL, **kw)


def test_summary_and_files(tmp_path):
    s = go(tmp_path / "run", json_path=tmp_path / "out.json")
    assert s == json.loads((tmp_path / "out.json").read_text()) and s["complete"] and s["failed"] == 0
    for row, found in s["rows"].items():
        assert set(found) == {"geometric", "spatial", "overall"}, row
        for values in found.values():
            assert 0 <= values["giou"] <= 1 and 0 <= values["ciou"] <= 1 and values["ci95"][0] <= values["giou"] + 1e-9 and values["ci95"][1] >= values["giou"] - 1e-9
    assert s["rows"]["rea2seg"]["overall"] == s["rows"]["oracle"]["overall"] and s["rows"]["rea2seg"]["overall"]["giou"] == 1 and s["rows"]["initial"]["overall"]["images"] == 5
    rows = pd.read_parquet(tmp_path / "out.parquet")
    assert list(rows["name"]) == [f"disc-{k:03d}" for k in range(10)] and (rows["rea2seg_iou"] == 1).all() and rows["predicted_iou_pick"].eq(1).all()
    # the summary's numbers, from the rows alone
    for row in s["rows"]:
        assert s["rows"][row]["overall"]["giou"] == pytest.approx(rows[f"{row}_iou"].mean())
        spatial = rows[rows["category"] == "spatial"]
        assert s["rows"][row]["spatial"]["ciou"] == pytest.approx(spatial[f"{row}_intersection"].sum() / spatial[f"{row}_union"].sum())
    p = s["provenance"]
    assert p["data"]["scored"] == 10 and len(p["data"]["hash"]) == 16 and p["convention"]["name"] == "lisa" and "torch" in p["versions"] and p["duration_s"] > 0 and not p["mixed"]
    assert len(list((tmp_path / "run").glob("part-*.parquet"))) == 3
    text = format_summary(s)
    assert "gIoU %" in text and "rea2seg+prior" in text and "100.0" in text


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from test_evaluation import SMALL, SimpleNamespace, bright, discs, evaluate
calls = open({calls!r}, "a", buffering=1)
def slow(model, image, question, embedding):
    calls.write(question + "\\n"); time.sleep(.05)
    return bright(model, image, question)
evaluate(SimpleNamespace(), discs(40), {out!r}, progress=False, answer=slow, run_settings=SMALL)
"""


def test_kill_9_loses_nothing_and_repeats_at_most_one_part(tmp_path):
    calls, out = tmp_path / "calls", tmp_path / "run"
    script = SCRIPT.format(tests=str(Path(__file__).parent), calls=str(calls), out=str(out))
    start = lambda: subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    child, until = start(), time.monotonic() + 120
    while len(list(out.glob("part-*.parquet"))) < 4:
        assert child.poll() is None and time.monotonic() < until, child.stderr.read().decode()[-2000:]
        time.sleep(.01)
    time.sleep(.08)  # into the next part
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = {n for p in out.glob("part-*.parquet") for n in pq.read_table(p, columns=["name"])["name"].to_pylist()}
    assert 16 <= len(kept) < 40 and not (out / "summary.json").exists()
    child = start()
    assert child.wait(120) == 0, child.stderr.read().decode()[-2000:]
    written = [n for p in out.glob("part-*.parquet") for n in pq.read_table(p, columns=["name"])["name"].to_pylist()]
    assert sorted(written) == [f"disc-{k:03d}" for k in range(40)]  # each exactly once
    asked = calls.read_text().split("\n")[:-1]
    assert set(asked) == {f"disc {k}" for k in range(40)} and 40 <= len(asked) <= 40 + SMALL.samples_per_part
    summary = json.loads((out / "summary.json").read_text())
    assert summary["complete"] and summary["rows"]["rea2seg"]["overall"]["n"] == 40
    assert summary["rows"] == go(tmp_path / "whole", discs(40))["rows"]  # as if it had never been killed
    assert not list(out.glob("*.tmp"))


def test_nothing_is_asked_twice(tmp_path):
    first = go(tmp_path)
    def never(*a): raise AssertionError("asked again")
    again = go(tmp_path, answer=never)
    assert again["rows"] == first["rows"] and len(again["provenance"]["sessions"]) == 1
    asked = []
    go(tmp_path, answer=lambda *a: asked.append(a[2]) or bright(*a), resume=False)
    assert len(asked) == 10


def test_interrupt_keeps_what_was_done(tmp_path):
    def stop(model, image, question, embedding):
        if question == "disc 6": raise KeyboardInterrupt
        return bright(model, image, question)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, answer=stop)
    asked = []
    go(tmp_path, answer=lambda *a: asked.append(a[2]) or bright(*a))
    assert asked == [f"disc {k}" for k in range(6, 10)]


def test_shards(tmp_path):
    asked = []
    track = lambda *a: asked.append(a[2]) or bright(*a)
    first = go(tmp_path, answer=track, shard=(0, 3))
    assert not first["complete"] and first["rows"]["initial"]["overall"]["n"] == 4
    go(tmp_path, answer=track, shard=(2, 3))
    last = go(tmp_path, answer=track, shard=(1, 3))
    assert last["complete"] and sorted(asked) == sorted(f"disc {k}" for k in range(10)) and last["rows"] == go(tmp_path / "whole")["rows"]
    assert len(last["provenance"]["sessions"]) == 3
    # another division of an unfinished run: still nothing twice
    asked.clear()
    go(tmp_path / "b", answer=track, shard=(1, 3))
    assert go(tmp_path / "b", answer=track)["complete"] and len(asked) == 10
    with pytest.raises(RunError, match="starts afresh only in an empty folder"):
        go(tmp_path / "b", shard=(0, 2), resume=False)


def test_locks(tmp_path):
    parts = Parts(tmp_path, {}, (0, 2), settings=SMALL)
    other = Parts(tmp_path, {}, (1, 2), settings=SMALL)  # its neighbour may run
    for shard in ((0, 2), (0, 1), (1, 3)):
        with pytest.raises(RunError, match="another process is working on shard"):
            Parts(tmp_path, {}, shard, settings=SMALL)
    parts.close()
    other.close()
    Parts(tmp_path, {}, (0, 1), settings=SMALL).close()


def test_a_folder_is_one_run(tmp_path):
    go(tmp_path, data={"spec": "mine", "seed": 1})
    with pytest.raises(RunError, match="data.seed: 1 then, 2 now.*no-resume"):
        go(tmp_path, data={"spec": "mine", "seed": 2})
    with pytest.raises(RunError, match="data.items: 10 then, 4 now"):
        go(tmp_path, discs(4), data={"spec": "mine", "seed": 1})
    go(tmp_path, discs(4), data={"spec": "mine", "seed": 1}, resume=False)
    # the convention is applied to the records: it may change
    assert go(tmp_path, discs(4), data={"spec": "mine", "seed": 1}, convention="seg-zero")["provenance"]["convention"]["empty_union"] == 0


def test_bad_samples_are_counted_and_passed(tmp_path):
    good = discs(6).samples
    bad = [disc(20, mask=None), disc(21, image=Path("gone.png")), disc(22, mask={"size": [24, 32], "counts": "zz"}), disc(23, mask=to_rle(np.ones((5, 5), bool)), image=lambda: good[0].image),
           good[0].with_(question="the same name"), disc(24, mask=to_rle(np.zeros((24, 32), bool)))]
    s = go(tmp_path, Listed("mixed", good + bad))
    assert s["rows"]["initial"]["overall"]["n"] == 7 and s["complete"]
    kinds = {p["name"]: p["kind"] for p in s["provenance"]["problems"]}
    assert kinds == {"disc-020": "mask", "disc-021": "picture", "disc-022": "mask", "disc-023": "size", "disc-000 (again)": "layout"} and s["provenance"]["data"]["unreadable"] == 5
    again = go(tmp_path, Listed("mixed", good + bad), answer=None)  # resuming forgets none of them
    assert again["complete"] and {p["name"] for p in again["provenance"]["problems"]} == set(kinds)
    with pytest.raises(RunError, match="no sample could be scored; disc-021"):
        go(tmp_path / "none", Listed("bad", bad[1:2]))


def test_a_failing_model(tmp_path):
    def sometimes(model, image, question, embedding):
        if question in ("disc 0", "disc 3"): raise ValueError("no prompt token")
        return bright(model, image, question)
    s = go(tmp_path, answer=sometimes)
    assert s["failed"] == 2 and s["rows"]["rea2seg"]["overall"]["giou"] == pytest.approx(.8) and s["rows"]["oracle"]["overall"]["n"] == 10
    rows = pd.read_parquet(tmp_path / "summary.parquet").set_index("name")
    assert rows.loc["disc-000", "failed"] == "ValueError: no prompt token" and rows.loc["disc-000", "rea2seg_iou"] == 0
    def never(*a): raise ValueError("broken checkpoint")
    with pytest.raises(RunError, match="failed on the first 5 samples, last disc-004: ValueError: broken checkpoint"):
        go(tmp_path / "b", answer=never)
    with pytest.raises(RunError, match="failed on every sample"):
        go(tmp_path / "c", discs(3), answer=never)
    assert not list((tmp_path / "b").glob("part-*")) and go(tmp_path / "b")["failed"] == 0  # nothing of it was kept
    def dies(*a): raise RuntimeError("CUDA error")
    with pytest.raises(RuntimeError):
        go(tmp_path / "d", answer=dies)


def test_an_empty_truth_is_scored_by_the_convention(tmp_path):
    blank = disc(0, mask=to_rle(np.zeros((24, 32), bool)))
    nothing = lambda *a: Answer(np.zeros((24, 32), bool), candidates(torch.zeros(24, 32, dtype=torch.bool)), np.array([.9, .5, .1]))
    for name, want in (("lisa", 1.0), ("seg-zero", 0.0)):
        assert go(tmp_path, Listed("blank", [blank]), nothing, convention=name)["rows"]["rea2seg"]["overall"]["giou"] == want
    def fails(*a): raise ValueError("x")
    s = go(tmp_path / "f", Listed("blank", [disc(1), blank]), lambda m, i, q, e: fails() if q == "disc 0" else bright(m, i, q))
    assert s["rows"]["rea2seg"]["overall"]["giou"] == .5  # a failure is no agreement


def test_no_candidates_falls_back_to_the_initial_mask(tmp_path):
    none = lambda m, image, q, e: Answer(image[..., 1] > 100, candidates(torch.zeros(24, 32, dtype=torch.bool))[[]], None)
    s = go(tmp_path, answer=none)
    assert {r: v["overall"]["giou"] for r, v in s["rows"].items()} == dict.fromkeys(s["rows"], 1.0) and "rea2seg" in s["rows"]


def test_rows_are_checked_before_the_run(tmp_path):
    with pytest.raises(RunError, match="no row is called top5; there are initial, rea2seg, top3"):
        go(tmp_path, rows=("top5",), answer=None)
    assert set(go(tmp_path, rows=("top5", "initial"), k=5)["rows"]) == {"top5", "initial"}


class Stages:
    "The surface of `Rea2Seg` that an evaluation uses."
    settings = SimpleNamespace(prior=0.0)

    def __init__(self): self.encoded = []

    def ground(self, image, question, embedding=None):
        if embedding is None: self.encoded.append(question)
        m = torch.from_numpy(image[..., 1] > 100)
        g = SimpleNamespace(initial=m.roll(1, 1), embedding="features of this picture")
        g.split = lambda: [g]
        return g

    def discover(self, image, grounding): return candidates(grounding.initial.roll(-1, 1))
    def score(self, image, question, found, grounding): return SimpleNamespace(ious=torch.tensor([.5, .9, .1]))


def test_stages_of_a_model(tmp_path):
    model, shared = Stages(), disc(0)
    samples = [shared.with_(name="a"), shared.with_(name="b", question="again"), disc(1), shared.with_(name="c")]
    s = evaluate(model, samples, tmp_path, progress=False)
    assert model.encoded == ["disc 0", "disc 1", "disc 0"]  # one picture's questions share its embedding, another picture's never do
    assert s["rows"]["rea2seg"]["overall"]["giou"] < 1 == s["rows"]["oracle"]["overall"]["giou"] and s["seconds"].keys() == {"load", "ground", "discover", "score"}
    model.settings = SimpleNamespace(prior=10.0)  # the profile's own prior decides the row rea2seg
    found = answers(model, shared.image, "x")
    assert found.scores.tolist() == pytest.approx([.5, .9, .1]) and found.initial.dtype == bool
    other = evaluate(model, samples, tmp_path / "prior", progress=False)
    assert other["rows"]["rea2seg"]["overall"]["giou"] == 1


def test_two_runs_compare(tmp_path):
    a = go(tmp_path / "a", answer=lambda m, i, q, e: Answer((i[..., 1] > 100), candidates(torch.from_numpy(np.roll(i[..., 1] > 100, 2, 1))), np.array([.9, .5, .1])))
    go(tmp_path / "b")
    r = compare_runs(tmp_path / "a/summary.parquet", tmp_path / "b/summary.parquet")
    assert r["overall"]["difference"] == pytest.approx(1 - a["rows"]["rea2seg"]["overall"]["giou"]) and r["overall"]["wins"] == 10 and set(r) == {"geometric", "spatial", "overall", "only_in_one"}
    go(tmp_path / "c", Listed("other", [disc(k, question="another question") for k in range(10)]))
    with pytest.raises(RunError, match="10 samples differ between the runs' data"):
        compare_runs(tmp_path / "a/summary.parquet", tmp_path / "c/summary.parquet")


def test_memory_does_not_grow_with_masks(tmp_path):
    "A record is numbers: under a kilobyte or two a sample, whatever the picture's size."
    go(tmp_path, discs(40))
    assert sum(p.stat().st_size for p in tmp_path.glob("part-*")) < 40 * 4000


def test_command_line(tmp_path, monkeypatch, capsys):
    import rea2seg.evaluation as module
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    register_source("discs", lambda where, split=None, **kw: Listed("discs", [disc(k) for k in range(int(where))], **kw))
    fake_cli = SimpleNamespace(load_model=lambda args: Stages())
    monkeypatch.setitem(sys.modules, "rea2seg.cli", fake_cli)
    out = tmp_path / "deep/out.json"
    assert run(parser.parse_args(["--data", "discs:12", "--limit", "7", "--seed", "3", "--json", str(out), "--quiet"])) == 0
    found, text = json.loads(out.read_text()), capsys.readouterr()
    assert found["rows"]["initial"]["overall"]["n"] == 7 and found["provenance"]["data"]["limit"] == 7 and "7 scored, 0 unreadable, 0 failed" in text.out and "gIoU %" in text.out and "cIoU %" in text.out
    assert out.with_suffix(".parquet").exists() and out.with_suffix(".parts").is_dir()
    args = parser.parse_args(["--data", "reasonseg:x", "--all-sentences"])
    assert reader_options(args, Convention.load()) == {"first_sentence_only": False}
    assert reader_options(parser.parse_args(["--data", "sgdr:x", "--column", "image=img"]), Convention.load()) == {"columns": {"image": "img"}}
    for bad in (["--data", "discs:3", "--shard", "2/2"], ["--data", "discs:3", "--column", "x"], ["--data", "what"], ["--data", "discs:3", "--convention", "none"], ["--data", "discs:3", "--rows", "none"]):
        with pytest.raises(ValueError):
            run(parser.parse_args([*bad, "--json", str(tmp_path / "x.json"), "--quiet"]))
    with pytest.raises(ValueError):
        parse_shard("a/b")
    assert module.run is run


def test_weights_are_part_of_the_identity(tmp_path):
    "A run cannot go on with other weights under the same name."
    weights = tmp_path / "generator"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"one")
    model = Stages()
    model.settings = Settings.load("tiny", generator=str(weights), evaluator_kind="random")
    s = evaluate(model, [disc(k) for k in range(4)], tmp_path / "run", progress=False)
    assert len(s["provenance"]["weights"]["generator"]) == 16 and s["provenance"]["settings"]["generator"] == str(weights)
    (weights / "model.safetensors").write_bytes(b"two")
    with pytest.raises(RunError, match="weights.generator"):
        evaluate(model, [disc(k) for k in range(4)], tmp_path / "run", progress=False)
