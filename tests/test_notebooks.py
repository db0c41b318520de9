"The package is what the notebooks say, and the notebooks read as they should."
import ast
import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from rea2seg import Rea2Seg
from rea2seg.demo import demo_sample

ROOT = Path(__file__).resolve().parents[1]
API, STUDY = sorted((ROOT / "nbs" / "api").glob("*.ipynb")), sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
HEADS = 3 # notebook cells before which title, summary and default_exp must have come

def cells(path: Path) -> list[dict]: return json.loads(path.read_text(encoding="utf-8"))["cells"]
def text(cell: dict) -> str: return "".join(cell["source"])
def code(path: Path) -> list[str]: return [text(c) for c in cells(path) if c["cell_type"] == "code"]
def directives(source: str) -> list[str]: return [m[1].strip() for m in re.finditer(r"^#\|\s*(.+)$", source, re.M)]
def exports(path: Path) -> str | None: return next((d.split()[1] for s in code(path) for d in directives(s) if d.startswith("default_exp ")), None)

@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    "All api notebooks exported into a folder of its own, laid out as in the repository so that the paths in the comments are equal."
    import os
    import shutil
    from nbdev.export import nb_export
    root = tmp_path_factory.mktemp("export")
    shutil.copytree(ROOT / "nbs" / "api", root / "nbs" / "api", ignore=shutil.ignore_patterns(".*")); shutil.copy(ROOT / "pyproject.toml", root)
    lib = root / "rea2seg"; lib.mkdir()
    for name in ("data", "scenes", "train", "study", "widgets"): (lib / name).mkdir()
    before = Path.cwd(); os.chdir(root)
    try:
        for path in sorted((root / "nbs" / "api").glob("*.ipynb")): nb_export(path.relative_to(root).as_posix(), lib_path="rea2seg")
    finally: os.chdir(before)
    return lib

def test_modules_are_the_exported_notebooks(exported):
    committed = {p.relative_to(ROOT / "rea2seg") for p in (ROOT / "rea2seg").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")}
    fresh = {p.relative_to(exported) for p in exported.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")}
    assert committed == fresh
    stale = [str(p) for p in sorted(fresh) if (exported / p).read_text(encoding="utf-8") != (ROOT / "rea2seg" / p).read_text(encoding="utf-8")]
    assert not stale, f"export the notebooks again, these modules differ: {', '.join(stale)}"

def test_an_edited_module_would_be_noticed(exported):
    "The comparison above is no formality: the exported text carries the notebook's code."
    assert "def load_image(" in (exported / "images.py").read_text(encoding="utf-8") and "nbs/api/images.ipynb" in (exported / "images.py").read_text(encoding="utf-8")

def test_every_module_has_one_notebook():
    names = [exports(p) for p in API]
    assert None not in names and len(set(names)) == len(names)

@pytest.mark.parametrize("path", API, ids=lambda p: p.stem)
def test_api_notebook(path):
    "Title, summary, then what it exports to; named like its module; ready for a clean diff."
    own = cells(path)
    head = text(own[0])
    assert own[0]["cell_type"] == "markdown" and re.match(r"# \S", head), "the first cell is the title"
    assert len(re.findall(r"^> .+$", head, re.M)) == 1, "one line of summary as a quote under the title"
    name = exports(path)
    assert name and path.stem == name.replace(".", "_")
    first = next(i for i, c in enumerate(own) if c["cell_type"] == "code")
    assert text(own[first]).strip() == f"#| default_exp {name}" and first <= HEADS
    imports = [s for s in code(path) if any(d.startswith("export") for d in directives(s)) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(s).body) and ast.parse(s).body]
    assert len(imports) <= 1, "one exported import cell"
    for c in own:
        if c["cell_type"] == "code": assert c["execution_count"] is None, "cleaned"
        assert set(c["metadata"]) <= {"tags"} and text(c).strip()

@pytest.mark.parametrize("path", API, ids=lambda p: p.stem)
def test_api_notebook_imports_nothing_up_and_nothing_by_star(path):
    for source in code(path):
        if "export" not in " ".join(directives(source)): continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom): assert all(a.name != "*" for a in node.names), f"{path.stem}: from {node.module} import *"

def test_modules_are_documented():
    "Every public function and class of the package says in one line what it is; entries of a registry (decorated) are named by it."
    silent = []
    for path in sorted((ROOT / "rea2seg").rglob("*.py")):
        if path.name.startswith("_"): continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in public and not node.decorator_list and len(node.body) > 1 and not ast.get_docstring(node): silent.append(f"{path.stem}.{node.name}")
    assert not silent, silent

@pytest.mark.parametrize("path", STUDY, ids=lambda p: p.stem)
def test_study_notebook(path):
    "Runs under papermill alone: skipped by the cells' test, parameters of plain scalars, nothing exported."
    own = cells(path)
    assert own[0]["cell_type"] in ("markdown", "raw") and re.search(r"^skip_exec: *true$|^- skip_exec: *true$", "\n".join(text(c) for c in own[:2]), re.M), "skip_exec: true in the title cell"
    tagged = [c for c in own if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "one cell tagged parameters"
    for node in ast.parse(text(tagged[0])).body:
        assert isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(ast.literal_eval(node.value), (int, float, str, bool, type(None))), "parameters are plain scalars"
    assert not any(d.startswith(("export", "default_exp")) for s in code(path) for d in directives(s))

def test_study_notebooks_are_numbered_in_order():
    numbers = [int(p.name[:2]) for p in STUDY]
    assert len(set(numbers)) == len(numbers)

def test_pinned_packages_run_on_the_oldest_python_we_name():
    "Debian 12 has 3.11.2; a pin that wants 3.11.5 makes the one-command install fail there."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    oldest = project.removeprefix(">=") + ".0"
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    installed = {canonicalize_name(d.metadata["Name"]): d for d in metadata.distributions()}
    wants = {name: installed[canonicalize_name(name)].metadata["Requires-Python"] for name, version in pins.items()
             if canonicalize_name(name) in installed and installed[canonicalize_name(name)].version == version}
    assert len(wants) > 50 and not {n: w for n, w in wants.items() if w and oldest not in SpecifierSet(w)}


def test_the_quick_start_prints_what_the_readme_shows():
    said = re.search(r"(\d+) candidates; selected: (\w+) score ([\d.]+) \((\d+), (\d+)\) (\d+) pixels", (ROOT / "README.md").read_text())
    sample = demo_sample()
    seg = Rea2Seg.from_profile("tiny").segment(sample.load_image(), sample.question)
    assert sample.question in (ROOT / "README.md").read_text()
    assert (len(seg.candidates), seg.candidates.sources[0], seg.mask.shape) == (int(said[1]), said[2], (int(said[4]), int(said[5])))
    assert abs(seg.score - float(said[3])) < 0.011 and abs(int(seg.mask.sum()) - int(said[6])) <= 0.02 * int(said[6])
