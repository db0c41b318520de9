"""Readers: small data sets written by hand in the real layouts, and everything that can be wrong with them."""
import io
import json
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rea2seg.data.coco import CocoFile, annotation_texts
from rea2seg.data.decode import decode_mask, draw_shapes, fill_polygons, read_mask_picture
from rea2seg.data.folder import Folder
from rea2seg.data.parquet import Parquet, detect_columns, tidy_category
from rea2seg.data.reader import DataError, ProblemLog, picture_size
from rea2seg.data.reasonseg import ReasonSeg
from rea2seg.data.samples import Sample, SampleError
from rea2seg.data.sources import Listed, load_samples, register_source
from rea2seg.images import load_image
from rea2seg.masks import from_rle, to_rle

H, W = 30, 40


def png(array, **kw):
    out = io.BytesIO()
    Image.fromarray(np.asarray(array)).save(out, "PNG", **kw)
    return out.getvalue()


def bar(H=H, W=W):
    mask = np.zeros((H, W), bool)
    mask[5:9, 5:25] = True
    return mask


PICTURE = png(np.full((H, W, 3), 90, np.uint8))


def rect(label, x0, y0, x1, y1):
    return {"label": label, "points": [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]}


def annotate(folder, name, text=("what?",), long=True, shapes=(rect("target", 5, 5, 24, 8),), encoding="utf-8", picture=True, **more):
    folder.mkdir(parents=True, exist_ok=True)
    if picture:
        (folder / f"{name}.jpg").write_bytes(PICTURE)
    content = {"text": list(text), "is_sentence": long, "shapes": list(shapes), **more}
    (folder / f"{name}.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))


# ---------------------------------------------------------------- ReasonSeg


def test_reasonseg_reads_its_layout(tmp_path):
    annotate(tmp_path / "val", "a", ["the first", "the second"], True)
    annotate(tmp_path / "val", "b", ["the café"], False, encoding="cp1252")
    annotate(tmp_path / "val", "c", ["Ünïcode"], "yes", encoding="utf-8")
    found = list(ReasonSeg(tmp_path, "val"))
    assert [(s.name, s.question, s.category, s.split) for s in found] == [("a", "the first", "long", "val"), ("b", "the café", "short", "val"), ("c", "Ünïcode", "long", "val")]
    assert (found[0].load_mask() == bar()).all() and not found[0].ignore
    assert found[0].load_image().shape == (H, W, 3)
    every = ReasonSeg(tmp_path, "val", first_sentence_only=False)
    assert [s.name for s in every] == ["a", "a#1", "b", "c"] and len(every) == 4
    assert len({s.image_id for s in every}) == 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["target", "ignore", "flag", "IGNORE area"]), st.integers(-3, 20), st.integers(-3, 20), st.integers(0, 15), st.integers(0, 15)), min_size=1, max_size=5))
def test_shapes_are_painted_largest_first_with_their_outline(boxes):
    "Rectangles, for which painting can be done by slices; equal areas are left out (their order is the listing's, last first)."
    size, painted = (18, 22), []
    for label, x, y, w, h in boxes:
        one = np.zeros(size, bool)
        one[max(0, y):max(0, y + h + 1), max(0, x):max(0, x + w + 1)] = True
        if label != "flag":
            painted.append((one.sum(), label, one))
    if len({area for area, *_ in painted}) < len(painted):
        return
    want = np.zeros(size, int)
    for _, label, one in sorted(painted, key=lambda p: -p[0]):
        want[one] = 255 if "ignore" in label.lower() else 1
    target, ignore = draw_shapes([rect(label, x, y, x + w, y + h) for label, x, y, w, h in boxes], size)
    assert (target == (want == 1)).all() and (ignore == (want == 255)).all()


def test_shapes_truncate_corners_and_draw_degenerate_ones():
    target, _ = draw_shapes([{"label": "target", "points": [[2.9, 2.9], [6.9, 2.9], [6.9, 4.9], [2.9, 4.9]]}], (10, 10))
    assert target.sum() == 15 and target[2:5, 2:7].all()
    line, _ = draw_shapes([{"label": "target", "points": [[1, 1], [5, 1]]}], (10, 10))
    assert line.sum() == 5  # two corners: the outline remains


def test_reasonseg_goes_on_and_names_what_is_wrong(tmp_path):
    val = tmp_path / "val"
    annotate(val, "good")
    annotate(val, "no_picture", picture=False)
    (val / "no_json.jpg").write_bytes(PICTURE)
    annotate(val, "no_text", text=[])
    annotate(val, "blank_text", text=["  "])
    annotate(val, "only_flag", shapes=[rect("flag", 1, 1, 9, 9)])
    annotate(val, "bad_points", shapes=[{"label": "target", "points": [[1, 2, 3]]}])
    annotate(val, "nan_points", shapes=[{"label": "target", "points": [[1, float("nan")], [2, 3], [4, 5]]}])
    annotate(val, "other_size", imageHeight=300, imageWidth=400)
    (val / "not_json.jpg").write_bytes(PICTURE)
    (val / "not_json.json").write_text("{")
    (val / "no_shapes.jpg").write_bytes(PICTURE)
    (val / "no_shapes.json").write_text('{"text": ["x"]}')
    annotate(val, "bad_picture")
    (val / "bad_picture.jpg").write_bytes(b"not a picture")
    data = ReasonSeg(tmp_path, "val")
    assert [s.name for s in data] == ["good", "only_flag", "other_size"]
    kinds = {p.name: (p.kind, p.kept) for p in data.problems}
    assert kinds == {"no_picture": ("missing", False), "no_json": ("missing", False), "no_text": ("text", False), "blank_text": ("text", False), "only_flag": ("empty", True),
                     "bad_points": ("mask", False), "nan_points": ("mask", False), "other_size": ("size", True), "not_json": ("layout", False), "no_shapes": ("layout", False),
                     "bad_picture": ("picture", False)}
    assert data.problems.skipped == 9 and len(data.problems) == 11 and "11 problems" in str(data.problems)
    list(data)
    assert len(data.problems) == 11  # a second pass does not count twice


def test_reasonseg_refuses_a_wrong_folder(tmp_path):
    with pytest.raises(DataError, match="there is no"):
        ReasonSeg(tmp_path / "nowhere", "val")
    annotate(tmp_path / "train", "a")
    with pytest.raises(DataError, match="has the folders train"):
        ReasonSeg(tmp_path, "val")
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="has no NAME.jpg"):
        ReasonSeg(tmp_path, "test")
    (tmp_path / "train" / "a.json").write_text("[]")
    with pytest.raises(DataError, match="nothing can be read, 1 problems .1 layout."):
        list(ReasonSeg(tmp_path, "train"))


# ---------------------------------------------------------------- streams


def squares(n):
    return [Sample(f"s{k:03d}", np.full((8, 8, 3), k, np.uint8), "the square", to_rle(np.eye(8, dtype=bool))) for k in range(n)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 7), st.none() | st.integers(1, 50), st.none() | st.integers(0, 3), st.data())
def test_shards_of_any_subset_are_disjoint_and_complete(n, parts, limit, seed, data):
    reader = Listed("squares", squares(n), limit=limit, seed=seed)
    whole = [s.name for s in reader]
    assert len(whole) == len(reader) == min(n, limit or n) and whole == sorted(whole)
    skip = set(data.draw(st.lists(st.sampled_from(whole), max_size=5)))
    seen = [s.name for i in range(parts) for s in reader.stream(skip, (i, parts))]
    assert sorted(seen) == sorted(set(whole) - skip)
    # what is done does not move the others to another shard
    assert [s.name for s in reader.stream(skip, (0, parts))] == [x for x in (s.name for s in reader.stream((), (0, parts))) if x not in skip]


def test_limits_draw_by_seed():
    data = squares(50)
    pick = lambda seed: [s.name for s in Listed("squares", data, limit=10, seed=seed)]
    assert pick(1) == pick(1) != pick(2) and pick(None) == [f"s{k:03d}" for k in range(10)]
    with pytest.raises(DataError, match="limit must be at least 1"):
        Listed("squares", data, limit=0)


def test_problem_log_stays_small():
    log = ProblemLog(keep=10)
    for k in range(1000):
        log.add(f"n{k}", "mask", "bad", kept=k % 2 == 0)
    assert len(log) == 1000 and len(log.items) == 10 and log.skipped == 500 and json.dumps(log.to_dict())


# ---------------------------------------------------------------- masks


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.booleans())
def test_damaged_masks_are_value_errors(noise, with_header):
    good = png(bar().astype(np.uint8) * 255)
    content = good[: 20 + len(noise)] + noise if with_header else noise
    try:
        mask, _ = decode_mask(content, (H, W))
    except ValueError:
        return
    assert mask.dtype == bool


def test_mask_pictures():
    m = bar()
    u8 = m.astype(np.uint8)
    palette = Image.fromarray(u8, "P")
    palette.putpalette([0, 0, 0, 128, 0, 0] + [0] * 750)
    out = io.BytesIO()
    palette.save(out, "PNG")
    rgba = np.dstack([np.zeros((H, W, 3), np.uint8), u8 * 255])
    for content in (png(u8), png(u8 * 255), png(m), png(np.repeat(u8[..., None] * 255, 3, 2)), out.getvalue(), png(rgba), png(np.dstack([u8 * 255] * 3 + [np.full((H, W), 255, np.uint8)]))):
        assert (read_mask_picture(content)[0] == m).all()
    colours = np.zeros((H, W, 3), np.uint8)
    colours[..., 0] = u8 * 255
    for content, reason in ((png(colours), "colours"), (png(u8 * 7), "got 2 values: 0, 7"), (png(np.random.default_rng(0).integers(0, 255, (H, W)).astype(np.uint8)), "values"), (b"\x89PNG", "damaged")):
        with pytest.raises(ValueError, match=reason):
            read_mask_picture(content)


def test_mask_lists():
    m, poly = bar(), [[5, 5, 25, 5, 25, 9, 5, 9]]
    same = lambda v, size=(H, W): (decode_mask(v, size)[0] == m).all()
    assert same(m.tolist()) and same(m.tolist(), None) and same(m.astype(int).tolist()) and same(m.ravel().tolist()) and same(m)
    assert same(poly) and same(poly[0]) and same(np.reshape(poly, (-1, 2)).tolist()) and same([np.reshape(poly, (-1, 2)).tolist()]) and same(json.dumps(poly))
    left, right = m.copy(), m.copy()
    left[:, 15:], right[:, :15] = False, False
    assert same([to_rle(left), to_rle(right)]) and same([{"bytes": png(left)}, {"bytes": png(right)}])
    ignored = decode_mask(png(m.astype(np.uint8) + 255 * np.eye(H, W, k=-10).astype(np.uint8) * ~m), None)
    assert (ignored[0] == m).all() and ignored[1].sum() == np.eye(H, W, k=-10)[~m].sum()
    for bad in ([], [1, 2, 3], [[1, 2]], {"x": 1}, 3.5, [[1, 2, 3, 4, 5]], [[0, 1], [1]], b"", "{"):
        with pytest.raises((ValueError, OSError)):
            decode_mask(bad, (H, W))
    with pytest.raises(ValueError, match="picture's size is unknown"):
        decode_mask([poly[0], [1, 1, 3, 1, 3, 3]])
    assert fill_polygons([], (3, 3)).sum() == 0


def test_picture_size_follows_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((20, 50, 3), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    assert picture_size(tmp_path / "turned.jpg") == load_image(tmp_path / "turned.jpg").shape[:2] == (50, 20)


# ---------------------------------------------------------------- parquet

RLE = pa.struct([("size", pa.list_(pa.int64())), ("counts", pa.string())])
HUB = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path, n=3, mask=None, mask_type=pa.binary(), start=0, row_group_size=2, picture=PICTURE, **columns):
    mask = png(bar()) if mask is None else mask
    found = {"image": pa.array([{"bytes": picture, "path": None}] * n, HUB), "mask": pa.array([mask] * n, mask_type), "question": [f"question {start + k}?" for k in range(n)], **columns}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(found), path, row_group_size=row_group_size)


@pytest.mark.parametrize("mask, kind", [
    (png(bar()), pa.binary()), ({"bytes": png(bar()), "path": None}, HUB), (json.dumps(to_rle(bar())), pa.string()), (to_rle(bar()), RLE), (bar().tolist(), pa.list_(pa.list_(pa.bool_()))),
    (bar().astype(np.uint8).tolist(), pa.list_(pa.list_(pa.uint8()))), ([[5.0, 5, 25, 5, 25, 9, 5, 9]], pa.list_(pa.list_(pa.float64()))), ([to_rle(bar())], pa.list_(RLE)),
    ({"size": [H, W], "counts": [5 * H + 5, *[4, H - 4] * 19, 4, H * W - (24 * H + 9)]}, pa.struct([("size", pa.list_(pa.int64())), ("counts", pa.list_(pa.int64()))])),
], ids=["png", "struct", "rle text", "rle struct", "bools", "bytes by row", "polygons", "list of rle", "run lengths"])
def test_parquet_masks_in_every_form(tmp_path, mask, kind):
    write(tmp_path / "test.parquet", mask=mask, mask_type=kind)
    found = list(Parquet(tmp_path))
    assert len(found) == 3 and all((s.load_mask() == bar()).all() for s in found)
    assert [s.question for s in found] == ["question 0?", "question 1?", "question 2?"] and found[0].load_image().shape == (H, W, 3)


def test_parquet_columns(tmp_path):
    table = pa.table({"img": pa.array([{"bytes": PICTURE, "path": None}] * 2, HUB), "GT-Mask": [png(bar())] * 2, "Query": ["one", "two"], "Reasoning_Type": ["Geometric", "multi step"],
                      "Sub_Category": ["ordinal", "count"], "CoT": ["because", None], "level": ["object-level", "odd"], "height": [30, 30], "candidates": pa.array([[json.dumps(to_rle(bar()))]] * 2),
                      "ious": [[0.5], [0.25]]})
    pq.write_table(table, tmp_path / "a.parquet")
    data = Parquet(tmp_path)
    assert data.columns == {"image": "img", "mask": "GT-Mask", "question": "Query", "category": "Reasoning_Type", "subtype": "Sub_Category", "granularity": "level", "reasoning": "CoT",
                            "candidates": "candidates", "candidate_ious": "ious"}
    a, b = data
    assert (a.category, a.subtype, a.granularity, a.reasoning, a.meta["height"]) == ("geometric", "ordinal", "object", "because", 30)
    assert (b.category, b.granularity, b.reasoning) == ("multi-step", None, None)
    assert a.meta["candidates"] == [to_rle(bar())] and b.meta["candidate_ious"] == [0.25]
    other = Parquet(tmp_path, columns={"question": "CoT", "reasoning": "Query"})
    assert [s.question for s in other] == ["because"] and [p.kind for p in other.problems] == ["text"]
    with pytest.raises(DataError, match="no such column: mask = nope; there are img"):
        Parquet(tmp_path, columns={"mask": "nope"})
    with pytest.raises(DataError, match="no role is called picture"):
        Parquet(tmp_path, columns={"picture": "img"})
    with pytest.raises(DataError, match="cannot tell which column is question; there are pixels: binary, words: string.*columns={'question'"):
        detect_columns(pa.schema([("pixels", pa.binary()), ("words", pa.string())]), {"image": "pixels"})
    assert tidy_category(None) is None and tidy_category(" ") is None


def test_parquet_splits_and_shards(tmp_path):
    for k in range(2):
        write(tmp_path / f"data/test-0000{k}-of-00002.parquet", start=3 * k)
    write(tmp_path / "data/train-00000-of-00001.parquet", 5)
    data = Parquet(tmp_path, "test")
    assert len(data) == 6 and [s.question for s in data] == [f"question {k}?" for k in range(6)] and {s.split for s in data} == {"test"}
    assert len({s.name for s in data}) == 6 and data.columns["image"] == "image"
    some = [s.name for s in Parquet(tmp_path, "test", limit=3, seed=5)]
    assert len(some) == 3 and set(some) < {s.name for s in data} and some == [s.name for s in Parquet(tmp_path, "test", limit=3, seed=5)]
    assert sorted(s.name for i in range(4) for s in data.stream(shard=(i, 4))) == sorted(s.name for s in data)
    with pytest.raises(DataError, match="has no split val; its shards are of test, train"):
        Parquet(tmp_path, "val")
    write(tmp_path / "one" / "all.parquet", 4, split=["test", "train", "test", "train"])
    assert [s.question for s in Parquet(tmp_path / "one", "train")] == ["question 1?", "question 3?"] and len(Parquet(tmp_path / "one", "train", limit=1)) == 1
    assert [s.question for s in Parquet(tmp_path / "one" / "all.parquet", "test")] == ["question 0?", "question 2?"]
    with pytest.raises(DataError, match="whose split is 'val'"):
        len(Parquet(tmp_path / "one", "val"))


def test_parquet_goes_on(tmp_path):
    rows = {"image": pa.array([{"bytes": b, "path": p} for b, p in [(PICTURE, None), (b"junk", None), (None, None), (None, "gone.png"), (PICTURE, None), (PICTURE, None), (PICTURE, None)]], HUB),
            "mask": [png(bar()), png(bar()), png(bar()), png(bar()), png(bar(20, 20)), None, png(np.zeros((H, W), np.uint8))], "question": [f"q{k}" for k in range(7)]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet", row_group_size=3)
    write(tmp_path / "b.parquet", 2)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-30])  # cut off while copying
    write(tmp_path / "c.parquet", 1)
    data = Parquet(tmp_path)
    assert [s.name for s in data] == ["a:0", "a:6", "c:0"]
    assert {p.name: p.kind for p in data.problems} == {"a:1": "picture", "a:2": "picture", "a:3": "missing", "a:4": "size", "a:5": "mask", "a:6": "empty", "b": "layout"}
    assert "mask is 20x20 but the picture is 30x40" in next(p for p in data.problems if p.name == "a:4").message


def test_parquet_from_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    write(tmp_path / "snapshot/data/test-00000-of-00001.parquet")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: asked.append((name, kw)) or str(tmp_path / "snapshot"))
    assert len(list(load_samples("sgdr", "test"))) == 3 and load_samples("parquet:me/mine").source == "parquet:me/mine"
    assert asked == [("snowball521/ReasonSeg-SGDR", {"repo_type": "dataset"}), ("me/mine", {"repo_type": "dataset"})]
    def offline(*a, **k): raise OSError("no network")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(DataError, match="'snowball521/Rea2Seg-16K' is no folder here, and the hub does not give it: OSError: no network"):
        load_samples("rea2seg16k")
    with pytest.raises(DataError, match="neither a file, a folder nor a hub id"):
        load_samples(f"sgdr:{tmp_path}/not/there")
    with pytest.raises(DataError, match="has no .*parquet; it has nothing"):
        (tmp_path / "empty").mkdir()
        load_samples(f"sgdr:{tmp_path}/empty")


@pytest.mark.parametrize("row_group_size", [10, 10_000], ids=["small row groups", "one row group"])
def test_parquet_memory_does_not_grow(tmp_path, row_group_size):
    "Peak of Arrow's and of Python's memory over 60 and 360 rows of 120 kB each."
    noise = png(np.random.default_rng(0).integers(0, 256, (H * 6, W * 6, 3)).astype(np.uint8))
    assert len(noise) > 120_000
    def peak(n):
        write(tmp_path / f"{n}/a.parquet", n, mask=png(bar(H * 6, W * 6)), picture=noise, row_group_size=row_group_size)
        # distinct pages: no dictionary that would hold the one picture once
        table = pq.read_table(tmp_path / f"{n}/a.parquet")
        pq.write_table(table, tmp_path / f"{n}/a.parquet", row_group_size=row_group_size, use_dictionary=False, compression="none", write_batch_size=8)
        del table
        pa.default_memory_pool().release_unused()
        base, arrow, count = pa.total_allocated_bytes(), 0, 0
        tracemalloc.start()
        for _ in Parquet(tmp_path / str(n)):
            arrow, count = max(arrow, pa.total_allocated_bytes() - base), count + 1
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == n
        return arrow, python
    (a1, p1), (a2, p2) = peak(60), peak(360)
    total = 360 * len(noise)
    assert a2 < max(1.5 * a1, 4e6) and p2 < max(1.5 * p1, 4e6), (a1, a2, p1, p2)
    assert a2 + p2 < total / 3


# ---------------------------------------------------------------- folders, COCO


def own_folder(root, table, suffix="csv"):
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for name, mask in (("a", bar()), ("b", bar(20, 20)), ("e", np.zeros((H, W), bool))):
        (root / f"images/{name}.png").write_bytes(PICTURE)
        (root / f"masks/{name}.png").write_bytes(png(mask))
    (root / "images/nomask.png").write_bytes(PICTURE)
    (root / "images/cut.png").write_bytes(PICTURE)
    (root / "masks/cut.png").write_bytes(png(bar())[:50])
    (root / f"questions.{suffix}").write_text(table, encoding="utf-8")


def test_folder_of_csv(tmp_path):
    own_folder(tmp_path / "x", "\ufeffimage,question,category,mask,split\na.png,\"one, two\",spatial,,test\nb.png,other size,spatial,,test\ne.png,empty,spatial,,test\n"
               "nomask.png,no mask,spatial,,test\ncut.png,cut,spatial,,test\ngone.png,gone,spatial,,test\na.png,,spatial,,test\na.png,named mask,geometric,a.png,train\n")
    data = Folder(tmp_path / "x")
    found = list(data)
    assert [(s.question, s.category, s.image_id) for s in found] == [("one, two", "spatial", "a.png"), ("empty", "spatial", "e.png"), ("named mask", "geometric", "a.png")]
    assert [p.kind for p in data.problems] == ["size", "empty", "missing", "mask", "missing", "text"] and (found[2].load_mask() == bar()).all()
    assert [s.question for s in Folder(tmp_path / "x", "train")] == ["named mask"] and len(Folder(tmp_path / "x", "train")) == 1


def test_folder_of_jsonl(tmp_path):
    lines = [{"image": "a.png", "question": "rle", "mask": to_rle(bar()), "name": "mine", "granularity": "part"}, {"image": "a.png", "query": "polygon", "mask": [[5, 5, 25, 5, 25, 9, 5, 9]]}]
    own_folder(tmp_path / "x", "\n".join([*map(json.dumps, lines), "", "not json", "[1]", '{"question": "no image"}']), "jsonl")
    data = Folder(tmp_path / "x")
    found = list(data)
    assert found[0].name == "mine" and found[0].granularity == "part" and all((s.load_mask() == bar()).all() for s in found) and len(found) == 2
    assert [p.kind for p in data.problems] == ["layout"] * 3


def test_folder_refuses_other_layouts(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        Folder(tmp_path / "x")
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match="neither questions.csv nor questions.jsonl; it has nothing"):
        Folder(tmp_path / "x")
    (tmp_path / "x/questions.csv").write_text("file,ask\na,b\n")
    with pytest.raises(DataError, match="needs a column image or file_name or picture; it has file, ask"):
        Folder(tmp_path / "x")
    (tmp_path / "x/questions.csv").write_text("image,question\n")
    with pytest.raises(DataError, match="has no rows"):
        Folder(tmp_path / "x")


def test_coco(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(PICTURE)
    poly = [[5, 5, 25, 5, 25, 9, 5, 9]]
    content = {"images": [{"id": 1, "file_name": "a.png", "height": H, "width": W}, {"id": 2, "file_name": "gone.png"}, {"id": 3, "file_name": "a.png", "height": 99, "width": 99}],
               "categories": [{"id": 4, "name": "spatial"}],
               "annotations": [{"id": 10, "image_id": 1, "segmentation": poly, "caption": "polygon", "category_id": 4}, {"id": 11, "image_id": 1, "segmentation": to_rle(bar()), "question": "rle"},
                               {"id": 12, "image_id": 1, "segmentation": {"size": [H, W], "counts": "zz"}, "text": "damaged"}, {"id": 13, "image_id": 2, "segmentation": poly, "text": "gone"},
                               {"id": 14, "image_id": 3, "segmentation": poly, "text": "sizes"}, {"id": 15, "image_id": 9, "segmentation": poly, "text": "no image"},
                               {"id": 16, "image_id": 1, "segmentation": poly, "sentences": [{"sent": "first"}, {"raw": "second"}]}, {"id": 17, "image_id": 1, "segmentation": poly},
                               {"id": 18, "image_id": 1, "segmentation": to_rle(bar(20, 20)), "text": "small mask"}]}
    (tmp_path / "own.json").write_text(json.dumps(content))
    data = CocoFile(tmp_path / "own.json")
    assert [(s.name, s.question) for s in data] == [("10", "polygon"), ("11", "rle"), ("16", "first"), ("16#1", "second")] and len(data) == 9
    assert {p.name: p.kind for p in data.problems} == {"12": "mask", "13": "missing", "14": "size", "15": "layout", "18": "size"}
    assert all((s.load_mask() == bar()).all() for s in data) and next(iter(data)).category == "spatial"
    assert annotation_texts({"question": " "}) == [] and annotation_texts({}) == []
    for text, reason in (('{"images": []}', "needs images and annotations"), ("[", "is not JSON"), ('{"images": [], "annotations": [{"id": 1, "bbox": 2}]}', "found bbox, id")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match=reason):
            CocoFile(tmp_path / "bad.json")
    with pytest.raises(DataError, match="there is no file"):
        CocoFile(tmp_path / "none.json")


# ---------------------------------------------------------------- registry, record


def test_registry(monkeypatch, tmp_path):
    asked = []
    fake = types.ModuleType("rea2seg.scenes.benchmark")
    fake.load_world = lambda split, n=None, seed=0: asked.append((split, n, seed)) or squares(n or 20)
    monkeypatch.setitem(sys.modules, "rea2seg.scenes.benchmark", fake)
    assert len(list(load_samples("sgdr-world", limit=7, seed=5))) == 7 and len(load_samples("sgdr-world", "test")) == 20 and asked == [("test", 7, 5), ("test", None, 0)]
    assert len(list(load_samples("world", "train", limit=5, seed=3))) == 5 and len(load_samples("world")) == 20 and asked[2:] == [("train", 5, 3), ("val", None, 0)]
    for spec, split, reason in (("sgdr-world", "val", "there is no split val"), ("world", "train", "has no end: give a limit")):
        with pytest.raises(DataError, match=reason):
            load_samples(spec, split)
    register_source("mine", lambda where, **kw: Listed(where, squares(2)))
    assert len(load_samples("mine:x")) == 2
    with pytest.raises(DataError, match="unknown data 'imagenet'; kinds are .*reasonseg:"):
        load_samples("imagenet")
    with pytest.raises(DataError, match="must say where the data is: reasonseg:..."):
        load_samples("reasonseg")
    annotate(tmp_path / "test", "a", ["x", "y"])
    assert len(load_samples(f"reasonseg:{tmp_path}", "test", first_sentence_only=False)) == 2


def test_sample_record():
    s = squares(1)[0]
    assert json.loads(json.dumps(s.with_(image=Path("a.png")).to_dict()))["image"] == "a.png" and s.to_dict()["image"] is None
    assert s.fingerprint() == s.with_(image=Path("elsewhere.png"), split="x").fingerprint() != s.with_(category="spatial").fingerprint()
    broken = s.with_(image=PICTURE[:50], mask=None)
    with pytest.raises(SampleError, match="s000: picture cannot be read") as e:
        broken.load_image()
    assert e.value.kind == "picture" and e.value.name == "s000"
    assert (s.with_(image=lambda: png(np.full((8, 8, 3), 5, np.uint8))).load_image() == 5).all()
    with pytest.raises(SampleError, match="granularity"):
        s.with_(granularity="pixel")
    with pytest.raises(SampleError, match="mask must be RLE"):
        s.with_(mask=np.eye(8))
    with pytest.raises(SampleError, match="name must be text"):
        s.with_(name="")
    assert (from_rle(s.mask) == s.load_mask()).all() and s.load_ignore() is None
