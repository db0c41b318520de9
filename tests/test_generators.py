"The generators' loader and what both families share."
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

from rea2seg.checkpoints import CheckpointError
from rea2seg.generators import Generator, check_image, check_question, family_of, load_generator, sam_description, split_reasoning
from rea2seg.records import ImageEmbedding

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"

def fake(folder, keys, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config)); save_file({k: torch.ones(2) for k in keys}, folder / "model.safetensors")
    return folder

@pytest.mark.parametrize("keys, config, says", [
    (["encoder.weight"], dict(model_type="bert"), "no known generator family .*'bert'"),
    (["learnable_query", "model.text_hidden_fcs.0.0.weight"], dict(model_type="llava"), "two families, lens and lisa"),
    (["lm_head.weight"], dict(model_type="qwen2_5_vl"), "no known generator family"),
])
def test_unknown_families(tmp_path, keys, config, says):
    with pytest.raises(CheckpointError, match=says): load_generator(fake(tmp_path / "m", keys, **config))

def test_nothing_to_load(tmp_path):
    with pytest.raises(CheckpointError, match="neither a folder"): load_generator("no/such/model")
    with pytest.raises(CheckpointError, match="config.json"): load_generator(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights"): load_generator(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="JSON object"): load_generator(tmp_path)
    for dtype in ("bfloat16", torch.int8):
        with pytest.raises(ValueError, match="float dtype"): load_generator(tmp_path, dtype=dtype)

def test_code_in_a_checkpoint_is_never_run(tmp_path):
    folder = fake(tmp_path / "m", ["learnable_query", "proj_to_sam.0.bias"], model_type="qwen2_vl", auto_map={"AutoModel": "evil.Evil"})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CheckpointError): load_generator(folder)
    assert not (tmp_path / "ran").exists()

@pytest.mark.parametrize("name, family", [("lens-tiny-a", "lens"), ("lisa-tiny-a", "lisa"), ("sesame-tiny-a", "lisa")])
def test_families_of_the_recorded_checkpoints(name, family):
    if not (PARITY / name).is_dir(): pytest.skip(f"the recorded reference shared/parity/{name} is not on this machine")
    meta = json.loads((PARITY / name / "meta.json").read_text())
    extra = {"clip": PARITY / name / "clip-tiny"} if (PARITY / name / "clip-tiny").is_dir() else {}
    generator = load_generator(PARITY / name, sam_config=meta.get("sam2_tiny_trunk") or meta["sam_vit"], layers=[1], **extra)
    assert generator.family == family and generator.layers == (1,) and generator.sam.family == {"lens": "sam2", "lisa": "sam"}[family]

def test_family_by_weights():
    assert family_of({}, iter(["learnable_query", "proj_to_sam.0.weight"]), "x") == "lens"
    assert family_of({}, ["base_model.model.model.visual_model.image_encoder.pos_embed"], "x") == "lisa"

def test_sam_descriptions():
    trunk = {"embed_dim": 8, "stages": [1, 1, 1]}
    for written in (trunk, {"sam": trunk}, {"sam2_tiny_trunk": trunk}, {"sam": trunk, "direct": True}, trunk | {"prompt": {}}): assert sam_description(written) == trunk
    assert sam_description({"sam": {"dim": 3}}, trunk) == trunk and sam_description({}, {"sam": trunk}) == trunk # the argument wins
    assert sam_description({"direct": True}) is None and sam_description({}) is None

@given(st.text(), st.text(), st.text())
@settings(max_examples=60, deadline=None)
def test_reasoning_comes_out_whole(before, inside, after):
    if any("<" in t for t in (before, inside, after)): return
    answer, reasoning, notes = split_reasoning(f"{before}<think>{inside}</think>{after}")
    assert answer == (before + after).strip() and (reasoning or "") == inside.strip() and not notes

def test_reasoning_corners():
    assert split_reasoning("<think>a</think>x<think>b</think><answer> y </answer>z") == ("y", "a\n\nb", ())
    assert split_reasoning("<think></think>") == ("", None, ())
    assert split_reasoning("<answer>[1, 2") == ("[1, 2", None, ())
    assert split_reasoning("x <think> never ends")[1:] == ("never ends", ("the reasoning was not finished",))

def test_inputs_are_checked():
    assert check_question("  where?\n") == "where?"
    for bad, says in ((" ", "empty"), (None, "got NoneType"), (3, "got int")):
        with pytest.raises(ValueError, match=says): check_question(bad)
    for bad in (np.zeros((2, 2, 4), np.uint8), np.zeros((0, 2, 3), np.uint8), torch.zeros(2, 2, 3, dtype=torch.uint8), "a.png"):
        with pytest.raises(ValueError, match=r"uint8\[H,W,3\]"): check_image(bad)

def test_the_shared_half():
    class Echo(Generator):
        class sam:
            @staticmethod
            def encode(image): return ImageEmbedding(torch.zeros(1, 4, 2, 2), (), image.shape[:2], (32, 32), 32)
        def ground_many(self, image, questions, **kw): return [(q, self.embed_image(image, kw["embedding"]).orig_hw, kw) for q in questions]
    image, echo = np.zeros((5, 7, 3), np.uint8), Echo()
    question, size, kw = echo.ground(image, "where?", reasoning=True, max_new_tokens=3)
    assert (question, size, kw["reasoning"], kw["max_new_tokens"]) == ("where?", (5, 7), True, 3)
    with pytest.raises(ValueError, match="belongs to a picture of"): echo.embed_image(image, Echo.sam.encode(image[:2]))
    with pytest.raises(NotImplementedError): Generator().ground(image, "x")
    with pytest.raises(NotImplementedError): Generator().ground_tensors()
