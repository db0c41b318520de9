"Bad input, one line of the list after the other: a clear error, nothing half-written. Through Python and through the command line."
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from rea2seg.checkpoints import CheckpointError
from rea2seg.cli import main
from rea2seg.generators import load_generator
from rea2seg.images import ImageError
from rea2seg.pipeline import Rea2Seg
from rea2seg.records import CandidateSet, Grounding, Scores
from rea2seg.settings import SettingsError
from stacks import FOLDERS, LAYERS, OPEN, QUESTIONS, picture

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)

@pytest.fixture(scope="module")
def folders(tmp_path_factory): return {family: make(tmp_path_factory.mktemp(family) / "model") for family, make in FOLDERS.items()}

@pytest.fixture(params=["lens", "lisa"])
def family(request): return request.param

def load(folder, **changes): return Rea2Seg.from_profile("tiny", device="cpu", generator=folder, evaluator="attention", **dict(max_new_tokens=3) | LAYERS | OPEN | changes)

@pytest.fixture(scope="module")
def tiny(): return Rea2Seg.from_profile("tiny", device="cpu", evaluator="attention")

def content(folder): return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}

def run(capsys, *argv) -> tuple[int, str]: # exit status, what stands on stderr
    "The command line, in this process."
    capsys.readouterr()
    try: status = main([str(a) for a in argv])
    except SystemExit as e: status = e.code
    return status, capsys.readouterr().err

def refused(capsys, says: str, *argv, out: Path | None = None):
    "Status 2, one line that says why, no trace, nothing written."
    before = content(out) if out and out.is_dir() else None
    status, err = run(capsys, *argv)
    assert status == 2 and re.search(says, err), (status, err)
    assert "Traceback" not in err and len([line for line in err.splitlines() if not line.startswith("loaded profile")]) == 1, err
    if out: assert (content(out) if out.is_dir() else None) == before and not list(out.parent.glob(".*writing*")) + list(out.glob(".*"))

@pytest.fixture
def photo(tmp_path): Image.fromarray(picture()).save(tmp_path / "photo.png"); return tmp_path / "photo.png"

# ---- pictures -----------------------------------------------------------------------------------------------------------------

def blob(image, kind="PNG", **options):
    out = io.BytesIO(); (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options); return out.getvalue()

BAD = {"unreadable": (b"not a picture", "not a picture of a known format"), "truncated": (blob(picture(200, 300), "JPEG")[:3000], "cannot be read"),
       "zero bytes": (b"", r"is empty \(0 bytes\)"), "animated": (blob(picture(), "GIF", save_all=True, append_images=[Image.fromarray(255 - picture())]), "animated or has pages"),
       "over the limit": (b"P6 20000 20000 255\n", "the limit is|exceeds limit")}

@pytest.mark.parametrize("what", BAD)
def test_pictures_that_are_refused(tiny, tmp_path, capsys, what):
    path, says = tmp_path / "bad.png", BAD[what][1]; path.write_bytes(BAD[what][0])
    with pytest.raises(ImageError, match=says) as e: tiny.segment(path, "the red cube")
    assert "bad.png" in str(e.value)
    refused(capsys, "rea2seg: .*bad.png.*(" + says + ")", "segment", path, "the red cube", "--out", tmp_path / "out", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()

GOOD = {"cmyk": lambda p: Image.fromarray(p).convert("CMYK"), "16 bits": lambda p: Image.fromarray(p[..., 0].astype(np.uint16) * 257), "palette": lambda p: Image.fromarray(p).quantize(64),
        "one pixel": lambda p: Image.fromarray(p[:1, :1]), "grey": lambda p: Image.fromarray(p[..., 0]), "transparent": lambda p: Image.fromarray(np.dstack([p, p[..., 0]]))}

@pytest.mark.parametrize("kind", GOOD)
def test_pictures_of_other_modes_are_segmented(tiny, tmp_path, kind):
    image = GOOD[kind](picture())
    path = tmp_path / "some.tiff"; image.save(path)
    assert tiny.segment(path, "the red cube").mask.shape == image.size[::-1]

def test_missing_pictures(tmp_path, capsys):
    for where, says in ((tmp_path / "none.png", "is not a file"), (tmp_path, "is a folder"), ("http://example.org/x.png", "download the picture first")):
        refused(capsys, says, "segment", where, "the red cube", "--out", tmp_path / "out", out=tmp_path / "out")

# ---- questions ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("question, says", [("", "question is empty"), (" \n\t", "question is empty"), ("cube and sphere " * 3000, "too long|context is"), (None, "must be text"), (b"x", "must be text")])
def test_questions_that_are_refused(folders, family, tiny, question, says):
    for model in (tiny, load(folders[family])):
        with pytest.raises(ValueError, match=says): model.segment(picture(), question)
        with pytest.raises(ValueError, match=says): model.segment_many(picture(), ["the red cube", question])

def test_questions_that_are_refused_by_the_command(photo, tmp_path, capsys):
    refused(capsys, "question is empty", "segment", photo, " ", "--out", tmp_path / "out", out=tmp_path / "out")
    refused(capsys, "too long|context is", "segment", photo, "cube " * 5000, "--evaluator", "attention", "--out", tmp_path / "out", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()

LENS_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
LISA_SPECIAL = ["[SEG]", "<im_start>", "<im_end>", "<image>", "<s>", "</s>", "<unk>"]

@pytest.fixture(scope="module")
def lens(folders): return load_generator(folders["lens"])
@pytest.fixture(scope="module")
def lisa(folders): return load_generator(folders["lisa"])

@given(parts=st.lists(st.sampled_from([*LENS_SPECIAL, "the cube", " ", "\n", "<|", "|>"]) | st.text(max_size=5), min_size=1, max_size=8))
@hypothesis_settings(max_examples=100, deadline=None)
def test_special_tokens_in_a_question_are_text_for_lens(lens, parts):
    "The ids of the question are those of its plain characters; the ids around it do not change."
    question = "".join(parts).encode("utf-8", "ignore").decode().strip()
    if not question: return
    special = set(lens.tokenizer.added.values())
    _, plain = lens.prompt_ids("x", 10); _, rest = lens.prompt_ids(question, 10)
    assert [i for i in rest if i in special] == [i for i in plain if i in special]
    wording = lens.prompts["question"].replace("{question}", question)
    text = lens.tokenizer.plain.encode(wording, add_special_tokens=False).ids
    assert any(rest[i:i + len(text)] == text for i in range(len(rest) - len(text) + 1))
    assert not special & set(text)

@given(parts=st.lists(st.sampled_from([*LISA_SPECIAL, "the car", " ", "\n"]) | st.text(max_size=5), min_size=1, max_size=8))
@hypothesis_settings(max_examples=100, deadline=None)
def test_special_tokens_in_a_question_are_text_for_lisa(lisa, parts):
    from rea2seg.lisa_prompt import IMAGE_ID, ask
    question = "".join(parts).encode("utf-8", "ignore").decode().strip()
    if not question: return
    special = {lisa.tokens.seg, lisa.tokens.bos, lisa.tokens.eos, lisa.tokens.pieces.unk, IMAGE_ID, *lisa.tokens.added.values()}
    plain, ids = lisa.prompt_ids(ask("x.")), lisa.prompt_ids(ask(question))
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    text = lisa.tokens.pieces.encode(f"\n{ask(question)} ASSISTANT:".lstrip())
    assert ids[-len(text):] == text

def test_special_tokens_go_the_whole_way(folders, family, tiny):
    for model, questions in ((tiny, ["".join(LENS_SPECIAL + LISA_SPECIAL)]), (load(folders[family], seed_points=4), [f"{s} the cube{s}" for s in LENS_SPECIAL + LISA_SPECIAL])):
        for result in model.segment_many(picture(), questions): assert len(result.candidates)

# ---- checkpoints --------------------------------------------------------------------------------------------------------------

KEYS = dict(lens="model.layers.1.mlp.up_proj.weight", lisa="model.layers.1.mlp.up_proj.weight")
DAMAGE = {"missing": (lambda s, k: s.pop(k), "1 missing: {key}"), "surplus": (lambda s, k: s.update({k + ".more": torch.ones(2)}), "1 unexpected: {key}.more"),
          "mis-shaped": (lambda s, k: s.update({k: torch.ones(3, 5)}), r"1 wrong shape: {key} \[3, 5\] for \["), "NaN": (lambda s, k: s[k].fill_(torch.nan), "1 NaN or infinite: {key}")}

@pytest.fixture
def copy(folders, family, tmp_path):
    import shutil
    return shutil.copytree(folders[family], tmp_path / "copy")

@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_checkpoints_are_told_by_key(copy, family, what, photo, capsys, tmp_path):
    change, says = DAMAGE[what]
    state = load_file(copy / "model.safetensors"); change(state, KEYS[family]); save_file(state, copy / "model.safetensors")
    says = says.format(key=re.escape(KEYS[family]))
    with pytest.raises(CheckpointError, match=says): load(copy)
    refused(capsys, says, "segment", photo, "the red cube", "--generator", copy, "--evaluator", "attention", "--out", tmp_path / "out", out=tmp_path / "out")

class Evil:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return open, (str(self.mark), "w")

def test_code_in_a_checkpoint_is_not_run(copy, photo, capsys, tmp_path):
    state = load_file(copy / "model.safetensors"); (copy / "model.safetensors").unlink()
    torch.save(state | {"model.norm.weight": Evil(tmp_path / "ran")}, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="refused"): load(copy)
    refused(capsys, "wants to run code, refused", "segment", photo, "the red cube", "--generator", copy, "--evaluator", "attention", "--out", tmp_path / "out", out=tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    with (copy / "pytorch_model.bin").open("rb") as f: torch.load(f, weights_only=False) # the bait is alive
    assert (tmp_path / "ran").exists()

def test_checkpoints_of_nothing(tmp_path, photo, capsys):
    (tmp_path / "empty").mkdir(); (tmp_path / "json").mkdir(); (tmp_path / "json" / "config.json").write_text("{")
    for where, says in ((tmp_path / "empty", "config.json"), (tmp_path / "json", "is not JSON"), (tmp_path / "none", "neither a folder"), (photo, "is a file; a checkpoint is a folder"),
                        ("embedded:nothing", r"no weights called 'nothing'; it has .*generator")):
        with pytest.raises(CheckpointError, match=says): Rea2Seg.from_profile("tiny", generator=where, evaluator="attention")
        refused(capsys, says, "segment", photo, "the red cube", "--generator", where, "--evaluator", "attention", "--out", tmp_path / "out", out=tmp_path / "out")

@pytest.mark.parametrize("weights", ["lm_head", "text", "sam"])
def test_nan_that_appears_on_the_way(folders, family, weights, tmp_path):
    "Weights that went bad after loading (training, half precision): an error, never a mask."
    model = load(folders[family]); g = model.generator
    broken = {"lm_head": None, "text": g.model.get_parameter("model.layers.2.mlp.down_proj.weight"), "sam": g.sam.parts.no_mask.weight}[weights]
    if weights == "lm_head": broken = g.model.lm_head.weight if family == "lisa" else g.model.get_parameter("proj_to_sam.2.bias")
    with torch.no_grad(): broken.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"): model.segment(picture(), QUESTIONS[0])

def test_nan_scores_and_logits_are_refused_by_the_records():
    nan = torch.tensor([float("nan"), .5])
    with pytest.raises(ValueError, match="scores must lie in"): Scores(nan)
    found = CandidateSet(torch.zeros(2, 4, 4, dtype=torch.bool), ("amg", "amg"), torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="NaN"): found.ranked(nan)
    good = dict(prompt_embed=torch.zeros(1, 1, 8), low_res_masks=torch.zeros(1, 1, 4, 4), attention_layers=torch.zeros(2, 4), logits=torch.zeros(8, 8), token_boxes_xyxy=torch.zeros(4, 4), grid_hw=(2, 2))
    for name in ("prompt_embed", "logits", "attention_layers"):
        with pytest.raises(ValueError, match=f"Grounding.{name} has NaN"): Grounding(**good | {name: torch.full_like(good[name], torch.nan)})

# ---- nothing survives -----------------------------------------------------------------------------------------------------------

def test_no_seed_survives(folders, family, monkeypatch):
    "A processor that crops may leave every attended token outside the picture."
    from dataclasses import replace
    model = load(folders[family]); g = model.generator; real = g.ground_many
    monkeypatch.setattr(g, "ground_many", lambda *a, **k: [replace(one, token_boxes_xyxy=one.token_boxes_xyxy + 9999) for one in real(*a, **k)])
    result = model.segment(picture(), QUESTIONS[0])
    assert len(result.seeds) == 0 and set(result.candidates.sources) <= {"multimask", "initial"} and any("no seed points" in n for n in result.notes)
    result.sheet(); json.dumps(result.to_dict())

def test_no_core(folders, family):
    result = load(folders[family], similarity=1.0).segment(picture(), QUESTIONS[0])
    assert "kcore" not in result.candidates.sources and any("no semantic-level candidates" in n for n in result.notes)

def test_no_candidate_passes(folders, family):
    result = load(folders[family], predicted_iou=1.0, stability=1.0).segment(picture(), QUESTIONS[0])
    assert "amg" not in result.candidates.sources and any("passes predicted IoU 1.0 and stability 1.0" in n for n in result.notes)

def test_nothing_at_all_is_the_initial_mask(folders, family, tmp_path):
    model = load(folders[family], similarity=1.0, predicted_iou=1.0, stability=1.0, multimask_candidates=0)
    result = model.segment(picture(), QUESTIONS[0])
    assert result.candidates.sources == ("initial",) and np.array_equal(result.mask, result.initial) and any("initial mask stands in" in n for n in result.notes)
    kept = json.loads((result.save(tmp_path) / "segmentation.json").read_text())
    assert kept["notes"] == list(result.notes) and kept["mask"] == kept["initial"]

@pytest.mark.parametrize("changes", [dict(multimask_candidates=0), dict(kcore_candidates=0), dict(amg_candidates=0), dict(seed_points=1), dict(max_candidates=1), dict(points_per_batch=1),
                                     dict(min_region_area=50), dict(top_tokens=10**6), dict(seed_points=10**4, points_per_batch=10**4, amg_candidates=1)], ids=str)
def test_extreme_settings(folders, changes):
    result = load(folders["lisa"], **changes).segment(picture(24, 24), QUESTIONS[0])
    for part in ("multimask", "kcore", "amg"): assert result.candidates.sources.count(part) <= changes.get(f"{part}_candidates", 9)
    assert len(result.candidates) <= changes.get("max_candidates", 15)

# ---- where results go -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two(tiny): return list(tiny.segment_many(picture(), QUESTIONS[:2]))

def test_folders_that_cannot_be(two, tmp_path, photo, capsys):
    for where in (photo, photo / "inside"):
        with pytest.raises(OSError, match="photo.png"): two[0].save(where)
        refused(capsys, "photo.png", "segment", photo, "the red cube", "--evaluator", "attention", "--out", where)
    assert Image.open(photo).size == (80, 48) and [p.name for p in tmp_path.iterdir()] == ["photo.png"]

@pytest.mark.parametrize("name", ["mask.png", "picture.png", "sheet.png", "segmentation.json"])
def test_full_disk_leaves_the_former_results_whole(two, tmp_path, monkeypatch, name):
    two[0].save(tmp_path / "out"); before = content(tmp_path / "out")
    if name == "segmentation.json": monkeypatch.setattr(Path, "write_text", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    elif name == "mask.png": monkeypatch.setattr(Image.Image, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    else:
        from matplotlib.figure import Figure
        real = Figure.savefig
        def full(self, where, *a, **k):
            if Path(where).name == name: Path(where).write_bytes(b"half a pic"); raise OSError(28, "No space left on device")
            return real(self, where, *a, **k)
        monkeypatch.setattr(Figure, "savefig", full)
    for folder in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"): two[1].save(folder)
    assert content(tmp_path / "out") == before and content(tmp_path / "new") == {} and not list((tmp_path / "out").glob(".*"))

def test_a_folder_in_the_way_of_a_file(two, tmp_path):
    two[0].save(tmp_path); before = content(tmp_path)
    (tmp_path / "sheet.png").unlink(); (tmp_path / "sheet.png").mkdir(); del before[Path("sheet.png")]
    with pytest.raises(OSError, match="sheet.png is a folder"): two[1].save(tmp_path)
    assert content(tmp_path) == before

def test_real_write_limit_through_the_command(tmp_path, photo, two):
    "The kernel refuses to write more than 20 kB to a file, as a full disk would."
    out = tmp_path / "out"; two[0].save(out); before = content(out)
    code = ("import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import rea2seg.pipeline; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
            "from rea2seg.cli import main; sys.exit(main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", code, "segment", str(photo), "the blue sphere", "--evaluator", "attention", "--device", "cpu", "--out", str(out)],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}, timeout=120)
    assert done.returncode == 2 and "File too large" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert content(out) == before

# ---- names ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, says", [
    (dict(profile="lense"), r"no section \[lense\]; it has .*lens.*tiny"), (dict(profile="world.scenes"), "lacks|unknown"), (dict(dtype="float8"), "dtype must be one of float32, bfloat16, float16, got 'float8'"),
    (dict(dtype=torch.int8), "dtype must be one of"), (dict(device="gpu"), "no device is called 'gpu'"), (dict(group=3), "no setting is called group"),
    (dict(group_size=0), "group_size must be at least 1"), (dict(group_size="3"), "group_size must be int, got '3'"), (dict(mask_view="black"), "mask_view must be one of binary"),
    (dict(similarity=float("nan")), "similarity must be finite"), (dict(seed=-1), "seed must not be negative"), (dict(reasoning=1), "reasoning must be bool"), (dict(top_tokens=True), "top_tokens must be int"),
    (dict(evaluator="no/such-evaluator/at all"), "neither a folder"), (dict(evaluator="embedded:none"), "no weights called 'none'")], ids=str)
def test_unknown_names_and_values(options, says):
    start = time.perf_counter()
    with pytest.raises((SettingsError, CheckpointError, ValueError), match=says): Rea2Seg.from_profile(**dict(evaluator="attention") | options)
    assert time.perf_counter() - start < 2 # before anything large is read

@pytest.mark.parametrize("options, says", [(["--profile", "lense"], r"no section \[lense\]"), (["--dtype", "float8"], "dtype must be one of"), (["--device", "gpu"], "no device is called 'gpu'"),
    (["--set", "group=3"], "no setting is called group"), (["--set", "group_size=three"], "group_size"), (["--set", "group_size"], "NAME=VALUE"), (["--set", "predicted_iou=2"], r"must lie in \[0, 1\]"),
    (["--set", "last_layer=99"], "model with 10 layers"), (["--evaluator", "embedded:none"], "no weights called 'none'"), (["--evaluator", "oracle"], "ground_truth")], ids=str)
def test_unknown_names_on_the_command_line(photo, tmp_path, capsys, options, says):
    refused(capsys, says, "segment", photo, "the red cube", "--evaluator", "attention", "--out", tmp_path / "out", *options, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()

def test_device_that_is_not_here(photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(capsys, "sees no CUDA device", "segment", photo, "the red cube", "--device", "cuda", "--out", tmp_path / "out", out=tmp_path / "out")

def test_hub_id_without_a_network(photo, tmp_path):
    "In a process of its own: the hub client reads its environment once. No waiting, one line."
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "rea2seg.cli", "segment", str(photo), "the red cube", "--profile", "lens", "--device", "cpu", "--out", str(tmp_path / "out")],
                          capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 2 and re.search("(LENS_ReasonSeg_CoT|Internvl3_Scorer_8B)' is not a folder here", done.stderr) and "pass the folder" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert time.perf_counter() - start < 60 and not (tmp_path / "out").exists()

def test_hub_id_whose_repository_is_unreachable(monkeypatch):
    import rea2seg.checkpoints as module
    def offline(*a, **k): raise OSError("no route to host")
    for name in ("HfApi", "snapshot_download"): monkeypatch.setattr(module, name, offline)
    with pytest.raises(CheckpointError, match="'no-one/nothing' is not a folder here.*no route to host"): Rea2Seg.from_profile("tiny", generator="no-one/nothing", evaluator="attention")

def test_sam_of_an_impossible_shape(folders, tmp_path):
    "Hiera pools inside windows where a stage opens; a block without a window there would divide by zero."
    import shutil
    folder = shutil.copytree(folders["lens"], tmp_path / "copy")
    extra = json.loads((folder / "rea2seg.json").read_text()); extra["sam"]["global_att_blocks"] = [2]
    (folder / "rea2seg.json").write_text(json.dumps(extra))
    with pytest.raises(CheckpointError, match="global_att_blocks: 2 would open a stage"): load(folder)

def test_read_only_pictures_are_quiet(folders, family):
    "What Pillow and memory maps hand out is read-only; torch complains about such arrays when they reach it uncopied."
    import warnings
    model, image = load(folders[family]), picture(); image.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generator.sam.encode(image); model.segment(image, QUESTIONS[0])
        model.generator.sam.encode(np.asarray(Image.fromarray(picture(*[model.generator.sam.side] * 2)))) # nothing to resize
