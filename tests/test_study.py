"The study: cached rows equal plain ones, nothing is dropped, outputs know where they came from; every notebook at its smallest size."
import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import papermill
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from stacks import FOLDERS, LAYERS, OPEN, picture
from test_data import annotate, png

from rea2seg.data.samples import Sample
from rea2seg.evaluation import answers, record_of
from rea2seg.generators import load_generator
from rea2seg.internvl import InternvlSize, new_internvl, save_evaluator, small_tokenizer
from rea2seg.masks import to_rle
from rea2seg.pipeline import Rea2Seg
from rea2seg.settings import Settings
from rea2seg.study.cache import PARTS, CachedModel, Variant, evaluator_like
from rea2seg.study.claims import CLAIMS, held_against
from rea2seg.study.paper import Measure, benchmark_table, generator_table, published, reasonseg_table
from rea2seg.study.plan import FULL, StudySettings, sweep_variants
from rea2seg.study.provenance import check
from rea2seg.study.shown import choose_shown
from rea2seg.study.store import Store, content, pack, unpack
from rea2seg.study.sweep import RowResult, load_rows, run_rows, save_rows, spread_over
from rea2seg.study.tables import Line, Table, Value, to_csv, to_latex, to_markdown

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("seconds_load", "seconds_ground", "seconds_discover", "seconds_score")
SIZE = InternvlSize(side=32, patch=8, vision_width=16, vision_layers=1, vision_heads=2, vision_mlp=16, text_width=16, text_layers=2, text_heads=2, text_kv_heads=2, text_mlp=16,
                    downsample=0.5, rope_theta=1e4, positions=4096, tokens=300)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    "A small random checkpoint of each family and of the evaluator."
    root = tmp_path_factory.mktemp("checkpoints")
    return {**{family: make(root / family) for family, make in FOLDERS.items()}, "internvl": save_evaluator(new_internvl(SIZE, small_tokenizer()), root / "internvl")}


def sample(k: int, **kw) -> Sample:
    "The brighter half of a picture of blobs."
    image = picture(seed=k)
    mask = image.mean(2) > np.median(image.mean(2))
    return Sample(**{**dict(name=f"s{k}", image=image, question=f"the blob number {k}", mask=to_rle(mask), category=("geometric", "spatial")[k % 2], image_id=f"i{k}"), **kw})


def settings(**changes) -> Settings:
    return Settings.load("tiny", **(dict(generator="", evaluator="", max_new_tokens=4, seed_points=6, top_tokens=8, kept_tokens=6, group_size=3, scoring="expected") | LAYERS | OPEN | changes))


@pytest.fixture(scope="module")
def models(folders):
    "Both families with the random evaluator; `model(family, **changes)` shares the weights."
    made = {f: load_generator(folders[f]) for f in FOLDERS}
    from rea2seg.evaluator import load_evaluator
    judge = load_evaluator(folders["internvl"], settings())
    def model(family="lens", evaluator=None, **changes):
        s = settings(generator=str(folders[family]), evaluator=str(folders["internvl"]), **({"evaluator_kind": "internvl"} | changes))
        return Rea2Seg(made[family], evaluator or evaluator_like(judge, s), s)
    return model


VARIANTS = [FULL, Variant("amg", "", parts=("multimask", "kcore")), Variant("semantic", "", parts=("multimask", "amg")), Variant("initial", "", parts=("multimask",)), Variant("layers", "", {"first_layer": 0, "last_layer": 0}),
            Variant("tau", "", {"similarity": .2}), Variant("delta", "", {"background_logit": -.5}, scored=False), Variant("k2", "", {"kept_tokens": 2}), Variant("group", "", {"group_size": 2}),
            Variant("text", "", {"scoring": "text"}), Variant("masks", "", {"amg_candidates": 2}), Variant("attention", "", evaluator="attention"), Variant("sam", "", evaluator="predicted_iou"),
            Variant("prior", "", {"prior": .5}), Variant("rounds", "", {"rounds": 2}), Variant("consensus", "", {"consensus": .2})]


def plain(model, s: Sample, v: Variant) -> dict:
    "A row's record by the pipeline alone."
    from rea2seg.candidates import discover
    from rea2seg.evaluator import load_evaluator
    changed = model.settings.with_(**v.changes)
    own = Rea2Seg(model.generator, load_evaluator(v.evaluator, changed) if v.evaluator else evaluator_like(model.evaluator, changed), changed)
    if v.parts != PARTS: own.discover = lambda image, g: discover(own.generator.sam, g, changed, v.parts)
    if not v.scored: own.score = lambda *a, **k: pytest.fail("an unscored row asks no evaluator")
    image = s.load_image()
    if v.scored: found = answers(own, image, s.question)
    else:
        g = own.ground(image, s.question).split()[0]
        from rea2seg.evaluation import Answer
        masks = own.discover(image, g)
        found = Answer(g.initial.numpy(), masks, None, {}, load_evaluator("attention").score(image, s.question, masks.masks, grounding=g).ious.double().numpy())
    return record_of(s, image, s.load_mask(), None, found, changed.prior, .02)


@pytest.mark.parametrize("family", FOLDERS)
def test_cached_rows_are_the_plain_ones(models, family, tmp_path):
    "Every row, first computed, then found in the store by another process' eyes: equal numbers to the last bit."
    model, samples = models(family), [sample(0), sample(1)]
    for turn in range(2):
        cached = CachedModel(model, Store(tmp_path / "kept.sqlite"))
        rows = run_rows(cached, samples, VARIANTS, progress=False)
        for row in rows:
            assert row.status == "complete", row.mark()
            for got, s in zip(row.records, samples, strict=True):
                want = plain(model, s, row.variant)
                assert {k: v for k, v in got.items() if k not in TIMES} == {k: v for k, v in want.items() if k not in TIMES}, row.variant.name
        assert (cached.store.misses == 0) == (turn == 1)
    distinct = {json.dumps([r["candidates"], r["scores"]]) for row in rows for r in row.records[:1]}
    assert len(distinct) > 8, "rows that are all alike would prove nothing"


def test_a_grounding_is_found_again_with_its_records_gone(models, tmp_path):
    "Without records, scores and candidates the grounding and the embedding still come from the store, equal to the last bit."
    model, s, store = models("lens"), sample(3), Store(tmp_path / "kept.sqlite")
    first = run_rows(CachedModel(model, store), [s], [FULL], progress=False)
    store.db.execute("delete from kept where kind in ('record', 'scores', 'candidates')")
    model.ground = lambda *a, **k: pytest.fail("grounded again")
    encode, model.generator.sam.encode = model.generator.sam.encode, lambda *a: pytest.fail("encoded again")
    try: again = run_rows(CachedModel(model, store), [s], [FULL], progress=False)
    finally: model.generator.sam.encode = encode; del model.ground
    assert first[0].records[0] | dict.fromkeys(TIMES) == again[0].records[0] | dict.fromkeys(TIMES)


def test_other_inputs_are_other_results(models, tmp_path):
    "A changed picture, question, mask or setting is never answered from the store."
    model, store, s = models("lens"), Store(tmp_path / "kept.sqlite"), sample(4)
    go = lambda s, model=model: run_rows(CachedModel(model, store), [s], [FULL], progress=False)[0].records[0]
    base = go(s)
    other = s.load_image().copy(); other[:20, :20] = 255
    for changed in (s.with_(image=other), s.with_(question="something else entirely, please")):
        made = store.misses
        assert go(changed)["initial"] != base["initial"] and store.misses > made
    flipped = go(s.with_(mask=to_rle(~s.load_mask())))
    assert flipped["truth_px"] != base["truth_px"] and flipped["scores"] == base["scores"]
    assert go(s, models("lens", mask_view="cutout"))["scores"] != base["scores"]


def test_weights_without_a_hash_share_nothing(models, tmp_path):
    "Two models in memory whose weights nobody can name must not find each other's results."
    store = Store(tmp_path / "kept.sqlite")
    one, two = models("lens"), models("lens")
    one.settings = two.settings = one.settings.with_(generator=str(tmp_path / "gone"))
    assert CachedModel(one, store).base != CachedModel(two, store).base
    assert CachedModel(models("lens"), store).base == CachedModel(models("lens"), store).base != CachedModel(models("lisa"), store).base


# ---------------------------------------------------------------- store


def test_store_keeps_within_its_bound(tmp_path):
    store = Store(tmp_path / "kept.sqlite", most=1e-4) # 107 kB
    for k in range(60): store.put(str(k), os.urandom(5000), "noise", compress=False)
    assert store.size() <= 1e-4 * 2**30 and store.get("59") is not None and store.get("0") is None
    assert Store(tmp_path / "kept.sqlite").size() == store.size()


@pytest.mark.parametrize("tensor", [torch.zeros(0, 3), torch.rand(2, 3).bool(), torch.rand(4, 4).bfloat16(), torch.arange(5), torch.zeros(0, 4, 4, dtype=torch.bool), torch.tensor([torch.nan, 1.0])], ids=str)
def test_tensors_come_back_as_they_were(tensor):
    back, facts = unpack(pack({"t": tensor, "u": tensor}, a=[1, None, "é"]))
    assert back["t"].dtype == tensor.dtype and torch.equal(back["t"].view(torch.uint8) if tensor.dtype != torch.bool else back["t"], tensor.view(torch.uint8) if tensor.dtype != torch.bool else tensor)
    assert facts == {"a": [1, None, "é"]} and content(back["u"]) == content(tensor)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_study import *
s = settings(generator=sys.argv[1], evaluator="", evaluator_kind="predicted_iou")
model = Rea2Seg.from_profile("tiny", generator=sys.argv[1], evaluator="predicted_iou", **{k: v for k, v in s.to_dict().items() if k not in ("profile", "generator", "evaluator", "evaluator_kind")})
def watch(sample):
    print(sample.name, flush=True)
    if sample.name == "s2": os.kill(os.getpid(), signal.SIGKILL)
run_rows(CachedModel(model, Store(sys.argv[3])), [sample(k) for k in range(5)], VARIANTS[:4], progress=False, watch=watch)
"""


def test_a_killed_sweep_goes_on(folders, tmp_path):
    "SIGKILL in the third sample: the next run makes only what was not finished."
    path = tmp_path / "kept.sqlite"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folders["lens"]), str(Path(__file__).parent), str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL and done.stdout.split() == ["s0", "s1", "s2"], done.stderr
    assert Store(path).count()["record"] == 12
    s = settings()
    model = Rea2Seg.from_profile("tiny", generator=str(folders["lens"]), evaluator="predicted_iou", **{k: v for k, v in s.to_dict().items() if k not in ("profile", "generator", "evaluator", "evaluator_kind")})
    cached = CachedModel(model, Store(path))
    grounded, ground = [], model.ground
    model.ground = lambda image, question, **k: grounded.append(question) or ground(image, question, **k)
    rows = run_rows(cached, [sample(k) for k in range(5)], VARIANTS[:4], progress=False)
    assert grounded == ["the blob number 3", "the blob number 4"] and all(r.status == "complete" and len(r.records) == 5 for r in rows)


# ---------------------------------------------------------------- rows that go wrong


class Failing:
    "An evaluator that fails on some questions."
    kind = "failing"
    def __init__(self, when, error=ValueError): self.when, self.error = when, error
    def score(self, image, question, masks, **k):
        if self.when(question): raise self.error("no score to be had")
        from rea2seg.records import Scores
        return Scores(torch.linspace(.1, .9, len(masks)))


def failing(models, when, error=ValueError):
    model = models("lens", Failing(when, error), evaluator_kind="random")
    cached = CachedModel(model, Store())
    cached.evaluator_of = lambda v: (model.evaluator, "failing")
    return cached


def test_a_sample_that_fails_counts_as_zero(models):
    rows = run_rows(failing(models, lambda q: q.endswith("1")), [sample(k) for k in range(3)], [FULL, Variant("unscored", "", scored=False)], progress=False)
    assert [r.status for r in rows] == ["complete", "complete"] and [r["failed"] is not None for r in rows[0].records] == [False, True, False]
    assert "failed on 1 of 3 samples" in rows[0].mark() and not rows[1].mark()
    assert Measure().ious(rows[0].records, "rea2seg")[1] == 0


@pytest.mark.parametrize("error", [ValueError, RuntimeError, MemoryError])
def test_a_row_that_always_fails_is_given_up_and_stays(models, error):
    cached, samples = failing(models, lambda q: True, error), [sample(k) for k in range(7)]
    rows = run_rows(cached, samples, [FULL, Variant("unscored", "", scored=False)], progress=False)
    assert rows[0].status == "failed" and "no score to be had" in rows[0].mark() and len(rows[0].records) <= 5
    assert rows[1].status == "complete" and len(rows[1].records) == 7


def test_unfinished_rows_are_saved_and_marked_in_the_table(models, tmp_path):
    seen, cached = [], CachedModel(models("lens"), Store())
    rows = run_rows(cached, [sample(k) for k in range(4)], [FULL, Variant("without_amg", "without AMG masks", missing="because")], minutes=1e-9, progress=False, save=lambda r: seen.append(len(r[0].records)), save_every=0)
    assert rows[0].status == "interrupted" and len(rows[0].records) == 1 and seen == [1]
    facts = dict(convention="lisa", seed=0, reading="blobs", settings=models("lens").settings.to_dict(), plan={}, table_4=[])
    save_rows(tmp_path / "ablations-tiny", rows, facts); save_rows(tmp_path / "benchmark-tiny", rows[:1], facts)
    text = to_markdown(generator_table(tmp_path))
    for part in ("without AMG masks [", "not run: because", "interrupted after 1 of 4 samples", "not part of this run"): assert part in text
    assert "interrupted after 1 of 4" in to_latex(benchmark_table(tmp_path)) and "interrupted after 1 of 4" in to_csv(benchmark_table(tmp_path))
    assert load_rows(tmp_path / "ablations-tiny")[0][0].records == rows[0].records


def test_rows_need_names_of_their_own(models):
    with pytest.raises(ValueError, match="rows of one name: all"): run_rows(CachedModel(models("lens"), Store()), [sample(0)], [FULL, replace(FULL, label="again")], progress=False)


@pytest.mark.parametrize("n, count", [(1, 1), (7, 3), (96, 32), (1190, 96), (5, 9)])
def test_samples_of_a_sweep_are_evenly_spread(n, count):
    at = [i for i in range(n) if spread_over(i, n, count)]
    assert len(at) == min(n, count) and (count >= n or max(np.diff(at), default=0) <= -(-n // count))


# ---------------------------------------------------------------- tables, claims, provenance


def test_numbers_reach_the_table_unrounded():
    value = 0.123456789012345678
    table = Table("t", "c", {"a": ("x", "gIoU")}, [Line("r|r & 50% of_it", {"a": Value(value, value / 2, value * 2)}), Line("s", {"a": Value(.1)}), Line("t", {"a": Value(None)}, note="failed: <it> & more")])
    row = next(csv.DictReader(to_csv(table).splitlines()))
    assert float(row["a"]) == value and float(row["a_low"]) == value / 2 and row["method"] == "r|r & 50% of_it"
    assert r"r|r \& 50\% of\_it & \textbf{12.3}" in to_latex(table) and r"$<$it$>$ \& more" in to_latex(table)
    assert r"r\|r" in to_markdown(table) and "**12.3**" in to_markdown(table) and "<u>10.0</u>" in to_markdown(table)
    assert to_latex(table).count(r"\begin{tabular}") == 1 and all(line.count(" & ") == 1 for line in to_latex(table).splitlines() if line.endswith(r"\\") and "multicolumn" not in line and r"\&" not in line)


def test_published_numbers_have_sources_and_none_is_ours():
    lines = published()
    assert len(lines) == 18 and all(line.source and line.style == "published" for line in lines) and not any("rea2seg" in line.label.lower() for line in lines)
    found = {line.label: line.cells for line in lines}
    assert found["LISA-13B-LLaVA1.5 (finetuned)"]["val_ciou"].value == pytest.approx(.729) and found["READ-13B"].keys() == {"test_giou", "test_ciou"} and found["EVOL-SAM3 7B"]["test_ciou"].value is None


def record(k: int, good: int, initial: int = 4) -> dict:
    from rea2seg.results import make_record
    s = Sample(f"s{k}", np.zeros((4, 4, 3), np.uint8), "q", None, category="spatial", image_id=f"i{k}")
    return make_record(s, height=4, width=4, truth_px=8, ignore_px=0, initial=[initial, 9, 9], initial_boundary=.1, candidates=[[2, 10, 10], [good, 8, 8], [8, 8, 8]], boundary=[.1, .2, .3], sources=["multimask", "kcore", "amg"],
                       predicted_ious=[.9, .5, .4], stability=[1., 1., 1.], scores=[.1, .8, .3], agreement=[.1, .1, .1], ranking=[.1, .8, .3])


def test_claims_follow_the_records():
    "The same rows the other way round turn every verdict."
    facts = dict(convention="lisa", seed=0, settings=Settings.load("tiny").to_dict())
    good, bad = [record(k, 6 + k % 2, 2) for k in range(16)], [record(k, 3 + k % 2, 8) for k in range(16)]
    rows = lambda a, b: [RowResult(FULL, a, "complete"), *(RowResult(Variant(n, n), b, "complete") for n in ("initial_only", "without_amg", "without_semantic"))]
    first, second = ({f.claim.text: f.verdict for f in held_against(rows(a, b), facts)} for a, b in ((good, bad), (bad, good)))
    for text in ("AMG masks help", "semantic-level masks help", "all parts together beat the initial predictions alone", "the reranked mask beats the initial mask"): assert (first[text], second[text]) == ("holds", "differs")
    assert first["the best of the top 3 beats the top 1"] == "holds" and first["chain of thought slightly improves the average"] == "not measured" and len(first) == len(CLAIMS)


def test_shown_samples_follow_a_rule():
    records = [record(k, 1 + k % 8) | {"category": ("geometric", "spatial")[k % 2]} for k in range(20)]
    picked = choose_shown(records, Measure(), 6)
    assert picked == choose_shown(records[::-1], Measure(), 6) and 3 <= len(picked) <= 6 and sum("loss" in why for why in picked.values()) == 1
    assert choose_shown([r | {"failed": "no"} for r in records], Measure(), 6) == {}


@pytest.mark.parametrize("profile", ["tiny", "lens", "sesame"])
def test_every_profile_has_a_plan(profile):
    plan, s = StudySettings.load(profile), Settings.load(profile, evaluator_kind="internvl", evaluator="x")
    sweeps = sweep_variants(plan, s)
    assert {"k1", "k2", "tau", "delta", "layers", "masks", "group", "consensus", "scoring"} <= sweeps.keys()
    for name, rows in sweeps.items():
        assert sum(v is FULL for v in rows) == 1 and len(rows) > 1, name
        for v in rows: s.with_(**v.changes)


# ---------------------------------------------------------------- notebooks


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    "No W&B, no network, no GPU."
    with pytest.MonkeyPatch.context() as m:
        for name, value in dict(WANDB_MODE="disabled", HF_HUB_OFFLINE="1", MPLBACKEND="agg", CUDA_VISIBLE_DEVICES="", OPENAI_API_KEY="").items(): m.setenv(name, value)
        m.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        yield tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def tiny_study(quiet) -> Path:
    "All four notebooks as papermill runs them, at their smallest size."
    common = dict(profile="tiny", out=str(quiet / "out"), figures=str(quiet / "figures"))
    for name, own in (("01_data", dict(samples=4)), ("04_benchmark", dict(samples=4)), ("05_ablations", dict(samples=2, sweep_samples=1)), ("06_figures", {})):
        papermill.execute_notebook(ROOT / "nbs" / f"{name}.ipynb", quiet / f"{name}.ipynb", common | own, progress_bar=False, cwd=quiet)
    return quiet


def test_the_study_makes_every_table_and_figure(tiny_study):
    figures = tiny_study / "figures"
    for name in ("table_1", "table_2", "table_3", "table_4", "table_s1", "table_s2", "table_sweeps", "table_shape"):
        for end in ("csv", "md", "tex", "provenance.json"): assert (figures / f"{name}.{end}").stat().st_size > 100, name
    for name in ("fig_1", "fig_2", "fig_3", "fig_s1", "fig_s6", "fig_s11", "fig_s12", "fig_sweeps", "fig_shape"):
        for end, least in (("csv", 40), ("pdf", 5000), ("png", 5000), ("provenance.json", 500)): assert (figures / f"{name}.{end}").stat().st_size > least, name
        assert (figures / f"{name}.pdf").read_bytes()[:5] == b"%PDF-"
    kept = json.loads((figures / "table_1.provenance.json").read_text())
    assert kept["settings"]["generator"] == "embedded:generator" and len(kept["weights"]["generator"]) == 16 and kept["data"]["hash"] and kept["commit"] and kept["versions"]["torch"] and kept["duration_s"] > 0
    assert "sgdr-world (4 samples)" in (figures / "table_1.md").read_text() and "not run here" in (figures / "table_2.md").read_text()
    assert "statements of the paper" in (figures / "shape.txt").read_text()


def test_one_call_says_whether_outputs_still_match(tiny_study, tmp_path):
    import shutil
    figures = shutil.copytree(tiny_study / "figures", tmp_path / "figures")
    found = check(figures)
    assert found, str(found)
    table = figures / "table_3.csv"
    table.write_text(table.read_text().replace("without AMG", "without amg"))
    assert {(o, what) for o, what, *_ in check(figures).differences} == {("table_3", "file table_3.csv")}
    data = json.loads((figures / "fig_3.provenance.json").read_text()); data["weights"]["generator"] = "0" * 16
    (figures / "fig_3.provenance.json").write_text(json.dumps(data))
    assert ("fig_3", "weights of generator") in {(o, what) for o, what, *_ in check(figures).differences}
    (figures / "results" / "ablations-tiny.parquet").write_bytes(b"other results") # what an output was drawn from counts, too
    assert ("table_4", "input results/ablations-tiny.parquet") in {(o, what) for o, what, *_ in check(figures).differences}


def test_printed_report(tiny_study):
    done = subprocess.run([sys.executable, "-m", "rea2seg.study.report", str(tiny_study / "figures")], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and done.stdout.count("Table: ") == 5 and "Shape of the results, profile tiny on sgdr-world" in done.stdout, done.stderr


def run_inline(name: str, **parameters) -> dict:
    "A study notebook's cells in this process, with parameters as papermill puts them in; far quicker than a kernel."
    node = parameterize_notebook(load_notebook_node(str(ROOT / "nbs" / f"{name}.ipynb")), parameters)
    space = {"__name__": "notebook"}
    for cell in node.cells:
        if cell.cell_type == "code": exec(compile(cell.source, f"{name}.ipynb", "exec"), space)
    return space


def data_folders(root: Path) -> tuple[str, str]: # the benchmark as parquet, ReasonSeg
    samples = [sample(k) for k in range(3)]
    (root / "sgdr").mkdir(parents=True)
    pq.write_table(pa.table({"image": [png(s.image) for s in samples], "mask": [png((s.load_mask() * 255).astype(np.uint8)) for s in samples], "question": [s.question for s in samples],
                             "category": ["Spatial Reasoning", "Geometric Reasoning", "Multi-step Reasoning"]}), root / "sgdr" / "test.parquet")
    for split in ("val", "test"):
        for k in range(2): annotate(root / "reasonseg" / split, f"{split}{k}", [f"what is number {k}?"], bool(k))
    return f"sgdr:{root / 'sgdr'}", str(root / "reasonseg")


@pytest.mark.parametrize("profile, family", [("lens", "lens"), ("sesame", "lisa")])
def test_the_notebooks_run_a_checkpoint_of_each_family(profile, family, folders, quiet, tmp_path):
    "The paths of the released checkpoints end to end: data folders, generator, evaluator with reasoning, tables, figures."
    data, reasonseg = data_folders(tmp_path)
    common = dict(profile=profile, data=data, out=str(tmp_path / "out"), figures=str(tmp_path / "figures"), track=False)
    model = dict(generator=str(folders[family]), evaluator=str(folders["internvl"]), device="cpu",
                 changes="first_layer=1 last_layer=2 predicted_iou=0 stability=0 max_new_tokens=4 max_reasoning_tokens=4 seed_points=6 sam= clip=")
    run_inline("01_data", reasonseg=reasonseg, training="world", **common)
    bench = run_inline("04_benchmark", reasonseg=reasonseg, samples=2, **common, **model)
    assert [r.status for r in bench["rows"]] == ["complete", "absent"] and bench["session"].model().model.generator.family == family
    space = run_inline("05_ablations", samples=2, sweep_samples=1, smaller_evaluator=str(folders["internvl"]), **common, **model)
    rows = {r.variant.name: r for r in space["rows"]}
    assert rows["plain"].status == "absent" and rows["smaller"].status == "complete" and rows["without_cot"].status == "complete" and len(rows["all"].records) == 2
    beyond = [r for n, r in rows.items() if n.startswith("layers=")]
    assert beyond and all(r.status == "failed" and "3 layers" in r.mark() for r in beyond), "layers that the small model lacks are marked"
    if family == "lens": run_inline("06_figures", profile=profile, out=common["out"], figures=common["figures"], track=False) # draws the same of either family
    two = {line.label: line for line in reasonseg_table(tmp_path / "figures" / "results").lines if profile in line.group}
    assert two["Rea2Seg"].cells["val_giou"].value is not None and two["Rea2Seg"].cells["test_giou"].value is not None
    assert "3 layers" in (tmp_path / "figures" / "table_sweeps.md").read_text() and (family == "lisa" or (tmp_path / "figures" / "fig_3.pdf").exists())
    assert check(tmp_path / "figures")
    assert len(json.loads((tmp_path / "figures" / "table_4.provenance.json").read_text())["weights"][str(folders["internvl"])]) == 16   # a row's own checkpoint


def test_the_study_works_without_wandb(models, quiet, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None); monkeypatch.setenv("WANDB_MODE", "offline")
    from rea2seg.study.session import Session
    s = Session("04_benchmark", evaluator="predicted_iou", data="world", out=str(tmp_path / "out"), figures=str(tmp_path / "figures"))
    assert s.tracker.run is None
    s.keep_table(Table("table_0", "c", {"a": ("", "a")}, [Line("r", {"a": Value(.5)})]))
    assert "2 files" not in s.finish() and (tmp_path / "figures" / "table_0.csv").exists()


def test_wandb_gets_tables_pictures_and_results(tmp_path, monkeypatch):
    "Offline: a stand-in for wandb that records what it is given."
    from types import ModuleType, SimpleNamespace
    from rea2seg.study.figures import Canvas
    from rea2seg.study.session import Session
    logged, artifacts = [], []
    fake = ModuleType("wandb")
    fake.Table = lambda dataframe: ("table", dataframe); fake.Image = lambda f: ("image", f); fake.Settings = lambda **k: k
    fake.Artifact = lambda name, kind: SimpleNamespace(name=name, kind=kind, files=[], add_file=lambda p, name: artifacts.append(name))
    fake.init = lambda **k: SimpleNamespace(config=k["config"], mode=k["mode"], log=lambda v, step: logged.append(v), log_artifact=lambda a: artifacts.append(a.name), finish=lambda: logged.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", fake); monkeypatch.delenv("WANDB_MODE", raising=False); monkeypatch.delenv("WANDB_API_KEY", raising=False)
    s = Session("04_benchmark", evaluator="predicted_iou", data="world", out=str(tmp_path / "out"), figures=str(tmp_path / "figures"))
    assert s.tracker.run.mode == "offline" and s.tracker.run.config["settings"]["evaluator_kind"] == "predicted_iou" and s.tracker.run.config["plan"]["k1"]
    s.keep_table(Table("table_0", "c", {"a": ("", "a")}, [Line("r", {"a": Value(.5)})]))
    s.keep_figure(Canvas(1, 1).figure, [{"a": 1}], "fig_0"); s.finish()
    assert logged[0]["table_0"][0] == "table" and logged[1] == {"table_0//r/a": .5} and logged[2]["fig_0"][0][0] == "image" and logged[-1] == "finished"
    assert {"table_0.csv", "fig_0.pdf", "04_benchmark-results"} <= set(artifacts)
