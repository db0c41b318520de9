"""Checkpoints: every layout is read, code is never run, every misfit is named."""
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn

from rea2seg import checkpoints
from rea2seg.checkpoints import CheckpointError, load_strict, read_file, read_json, read_state, resolve

A, B = torch.arange(6.).view(2, 3), torch.ones(4, dtype=torch.bfloat16)

def index(folder, name, **where): (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": where}))

# ---------------------------------------------------------------- layouts

def one_safetensors(d): save_file({"a": A, "b": B}, d / "model.safetensors")
def other_name(d): save_file({"a": A, "b": B}, d / "weights.safetensors")
def one_bin(d): torch.save({"a": A, "b": B}, d / "pytorch_model.bin")
def old_bin(d): torch.save({"a": A, "b": B}, d / "pytorch_model.bin", _use_new_zipfile_serialization=False)
def wrapped_pt(d): torch.save({"model": {"a": A, "b": B}, "epoch": 3}, d / "sam2_hiera_large.pt")
def indexed(d):
    save_file({"a": A, "stale": A + 1}, d / "model-00001-of-00002.safetensors"); save_file({"b": B}, d / "model-00002-of-00002.safetensors")
    index(d, "model.safetensors.index.json", a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors")
def indexed_bin(d):
    torch.save({"a": A}, d / "pytorch_model-00001-of-00002.bin"); torch.save({"b": B}, d / "pytorch_model-00002-of-00002.bin")
    index(d, "pytorch_model.bin.index.json", a="pytorch_model-00001-of-00002.bin", b="pytorch_model-00002-of-00002.bin")
def no_index(d):
    torch.save({"a": A}, d / "pytorch_model-00001-of-00002.bin"); torch.save({"b": B}, d / "pytorch_model-00002-of-00002.bin")
def both_kinds(d): one_safetensors(d); torch.save({"poison": A}, d / "pytorch_model.bin")

@pytest.mark.parametrize("layout", [one_safetensors, other_name, one_bin, old_bin, wrapped_pt, indexed, indexed_bin, no_index, both_kinds])
def test_layouts(tmp_path, layout):
    layout(tmp_path)
    state = read_state(tmp_path)
    assert set(state) == {"a", "b"} and torch.equal(state["a"], A) and torch.equal(state["b"], B) and state["b"].dtype == torch.bfloat16
    assert {v.dtype for v in read_state(str(tmp_path), torch.float16).values()} == {torch.float16}

def test_integers_keep_their_dtype(tmp_path):
    save_file({"n": torch.arange(3), "x": A}, tmp_path / "model.safetensors")
    assert read_state(tmp_path, torch.bfloat16)["n"].dtype == torch.int64

@settings(max_examples=25, deadline=None)
@given(owner=st.lists(st.integers(1, 4), min_size=1, max_size=12), pickled=st.booleans())
def test_any_sharding_is_put_together(tmp_path_factory, owner, pickled):
    d, stem, end = tmp_path_factory.mktemp("shards"), *(("pytorch_model", ".bin") if pickled else ("model", ".safetensors"))
    full = {f"k{i}": torch.full((i + 1,), float(i)) for i in range(len(owner))}
    where = {k: f"{stem}-{o:05d}-of-00004{end}" for k, o in zip(full, owner)}
    for name in set(where.values()): (torch.save if pickled else save_file)({k: v for k, v in full.items() if where[k] == name}, d / name)
    index(d, f"{stem}{end}.index.json", **where)
    state = read_state(d)
    assert state.keys() == full.keys() and all(torch.equal(state[k], v) for k, v in full.items())
    lost = where["k0"]; (d / lost).unlink()
    with pytest.raises(CheckpointError, match=lost): read_state(d)

# ---------------------------------------------------------------- what must not be believed

class Runs:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f"touch {self.path}",)

class Evals:
    def __init__(self, path): self.path = path
    def __reduce__(self): return eval, (f"open({str(self.path)!r}, 'w')",)

@pytest.mark.parametrize("evil", [Runs, Evals])
@pytest.mark.parametrize("shape", [lambda e: e, lambda e: {"a": A, "b": e}, lambda e: {"model": {"a": A}, "optimizer": [e]}])
@pytest.mark.parametrize("how", ["zip", "old", "plain"])
def test_a_pickle_with_code_is_refused_and_does_nothing(tmp_path, evil, shape, how):
    trace, file = tmp_path / "it_ran", tmp_path / "pytorch_model.bin"
    if how == "plain": file.write_bytes(pickle.dumps(shape(evil(trace))))
    else: torch.save(shape(evil(trace)), file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match="pytorch_model.bin"): read_state(tmp_path)
    assert not trace.exists()

def test_code_in_a_shard_is_refused(tmp_path):
    indexed_bin(tmp_path)
    torch.save({"b": Runs(tmp_path / "it_ran")}, tmp_path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError, match="00002-of-00002.bin is a damaged pickle or one that wants to run code, refused"): read_state(tmp_path)
    assert not (tmp_path / "it_ran").exists()

@pytest.mark.parametrize("value", [[A], {"a": 3}, {"a": {"deep": A}, "b": B}, {}, {1: A}, "text"])
def test_a_pickle_that_is_no_state_dict(tmp_path, value):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="x.pt holds"): read_file(tmp_path / "x.pt")

@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_files(tmp_path, name):
    file = tmp_path / name
    one_safetensors(tmp_path) if name.startswith("model") else one_bin(tmp_path)
    whole = file.read_bytes()
    for broken, message in ((b"", "is empty"), (whole[:len(whole) // 2], name), (whole[:9], name), (b"\0" * 64, name), (b"\xff" * 64, name), (b"<html>404</html>", name),
                            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer")):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=message): read_state(tmp_path)

def test_broken_indices(tmp_path):
    indexed(tmp_path)
    file = tmp_path / "model.safetensors.index.json"
    for text, message in (("{", "is not JSON"), ("[]", "must hold a JSON object"), ("{}", "no weight_map"), ('{"weight_map": {"a": 3}}', "no weight_map"),
                          ('{"weight_map": {"a": "../secret.safetensors"}}', "points outside"), ('{"weight_map": {"a": "/etc/passwd"}}', "points outside"),
                          ('{"weight_map": {"a": "model-00009-of-00009.safetensors"}}', "lacks model-00009-of-00009.safetensors"),
                          ('{"weight_map": {"gone": "model-00001-of-00002.safetensors"}}', "lacks gone, which the index promises")):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=message): read_state(tmp_path)

def test_missing_weights_are_told(tmp_path):
    with pytest.raises(CheckpointError, match="has no weights"): read_state(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"): read_state(tmp_path / "no")
    no_index(tmp_path); (tmp_path / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="lacks pytorch_model-00001-of-00002.bin"): read_state(tmp_path)
    no_index(tmp_path); torch.save({"a": A}, tmp_path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError, match="holds a in two files"): read_state(tmp_path)

def test_several_loose_files_are_not_guessed_at(tmp_path):
    for name in "xy": save_file({"a": A}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="several weight files: x.safetensors, y.safetensors"): read_state(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="weights are"): read_file(tmp_path / "x.gguf")

def test_json(tmp_path):
    assert read_json(tmp_path, "rea2seg.json", required=False) == {}
    with pytest.raises(CheckpointError, match="has no config.json"): read_json(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="is not JSON"): read_json(tmp_path)

# ---------------------------------------------------------------- names

def test_resolve(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path and resolve(str(tmp_path)) == tmp_path
    (tmp_path / "file.pt").touch()
    with pytest.raises(CheckpointError, match="is a file"): resolve(tmp_path / "file.pt")
    for name in ("", "one", "a/b/c", "../up", "/no/such", "https://x/y", "a b/c", "embedded:", "embedded:..", "embedded:nope"):
        with pytest.raises(CheckpointError): resolve(name)
    monkeypatch.setattr(checkpoints, "package_files", lambda name: tmp_path)
    (tmp_path / "weights" / "generator").mkdir(parents=True)
    assert resolve("embedded:generator") == tmp_path / "weights" / "generator"
    with pytest.raises(CheckpointError, match="it has generator"): resolve("embedded:other")

@pytest.mark.parametrize("files, kind", [(["model.safetensors", "pytorch_model.bin", "run.py"], "*.safetensors"), (["pytorch_model-00001-of-00002.bin", "a.pt"], "*.bin"), (["sam2.pt"], "*.pt")])
def test_the_hub_gives_data_only(tmp_path, monkeypatch, files, kind):
    asked = {}
    class Api:
        def list_repo_files(self, name, revision=None): return files
    monkeypatch.setattr(checkpoints, "HfApi", Api)
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda name, **how: asked.update(name=name, **how) or str(tmp_path))
    assert resolve("owner/model", revision="abc") == tmp_path
    assert asked["name"] == "owner/model" and asked["revision"] == "abc" and kind in asked["allow_patterns"]
    weights = {"*.safetensors", "*.bin", "*.pt"} & set(asked["allow_patterns"])
    assert weights == {kind} and not any(p.endswith((".py", "/*", "*")) for p in asked["allow_patterns"])

def test_without_a_network(tmp_path, monkeypatch):
    class Api:
        def list_repo_files(self, name, revision=None): raise OSError("no route")
    monkeypatch.setattr(checkpoints, "HfApi", Api)
    def offline(name, local_files_only=False, **_):
        raise OSError("nothing cached")
    monkeypatch.setattr(checkpoints, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="'owner/model' is not a folder here.*no route.*pass the folder"): resolve("owner/model")
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda name, local_files_only=False, **_: str(tmp_path) if local_files_only else offline(name))
    assert resolve("owner/model") == tmp_path # the cache serves

# ---------------------------------------------------------------- fitting

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Embedding(4, 2)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))

def good(): return {k: torch.randn_like(v) if v.is_floating_point() else v + 7 for k, v in Net().state_dict().items()}

def test_loads_exactly():
    net, state = Net(), good()
    assert load_strict(net, state, "here") == [] and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    with torch.device("meta"): ghost = Net()
    load_strict(ghost, state, "here")
    assert not any(p.is_meta for p in ghost.parameters()) and torch.equal(ghost.a.weight, state["a.weight"])
    load_strict(net.half(), state, "here")
    assert net.a.weight.dtype == torch.float16

@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("a.bias"), "1 missing: a.bias"), (lambda s: s.update(c=A), "1 unexpected: c"), (lambda s: s.update({"a.weight": A.T}), r"1 wrong shape: a.weight \[3, 2\] for \[2, 3\]"),
    (lambda s: s.update({"a.weight": torch.ones(2, 3, dtype=torch.uint8)}), "1 wrong kind: a.weight torch.uint8 for torch.float32"), (lambda s: s.update(steps=torch.ones(1)), "wrong kind: steps"),
    (lambda s: s["b.weight"].__setitem__((0, 0), float("nan")), "1 NaN or infinite: b.weight"), (lambda s: s["b.weight"].__setitem__((0, 0), float("inf")), "1 NaN or infinite: b.weight")])
def test_misfits_are_named_and_nothing_is_loaded(change, message):
    net, state = Net(), good()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    change(state)
    with pytest.raises(CheckpointError, match=f"here does not fit Net: .*{message}"): load_strict(net, state, "here")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

def test_all_misfits_stand_in_one_short_message():
    state = good() | {f"extra.{i}": A for i in range(50)} | {"a.weight": A.T}
    del state["a.bias"], state["b.weight"]
    with pytest.raises(CheckpointError) as e: load_strict(Net(), state, "here")
    text = str(e.value)
    assert "2 missing: a.bias, b.weight" in text and "50 unexpected: extra.0" in text and "and 42 more" in text and "1 wrong shape: a.weight" in text and len(text) < 500

def test_patterns():
    state = good() | {"rotary.0.inv_freq": A, "memory.x": A}
    del state["b.weight"]
    assert load_strict(Net(), state, "here", optional=("b.*",), ignore=("*.inv_freq", "memory.*")) == ["b.weight"]
    with pytest.raises(CheckpointError, match="1 missing: b.weight; 1 unexpected: memory.x"): load_strict(Net(), state, "here", ignore=("*.inv_freq",))
    with pytest.raises(CheckpointError, match="missing: a.weight"): load_strict(Net(), {k: v for k, v in good().items() if k != "a.weight"}, "here", ignore=("a.*",), optional=("b.*",))

def test_large_finite_sums_are_not_infinite():
    net = nn.Linear(64, 64, bias=False)
    load_strict(net, {"weight": torch.full((64, 64), 3e38)}, "here") # the sum overflows, the weights do not

def test_read_and_fit_from_a_path(tmp_path: Path):
    save_file(good(), tmp_path / "model.safetensors")
    load_strict(Net(), read_state(tmp_path), tmp_path)
