"""The widgets as a reader meets them: JupyterLab as `make lab` starts it, its notebook in a real browser, by mouse and by keyboard.

Needs Debian's Chromium (`apt-get install chromium`) and is skipped without one. `REA2SEG_KEEP=1 pytest tests/test_browser.py` renews figures/explore_*.png.
"""
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
from PIL import Image

from rea2seg.widgets import explore_attention
from vision_language import build

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
PATIENCE = 600 # seconds: a busy machine may take its time, a dead page never comes
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'rea2seg[dev]'")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium")

def lab_command() -> list[str]:
    "What `make lab` runs, with this Python's jupyter."
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))} # these tests may themselves run under make, which then says more
    said = subprocess.run(["make", "-n", "--no-print-directory", "lab"], cwd=ROOT, env=own, capture_output=True, text=True, check=True).stdout.splitlines()
    words = shlex.split(next(line for line in said if "/jupyter " in line))
    at = next(i for i, w in enumerate(words) if w.endswith("/jupyter"))
    words[at] = str(Path(sys.executable).parent / "jupyter")
    return words

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab of its own, in a folder of its own, on a free port; gone afterwards with all its kernels."
    home = tmp_path_factory.mktemp("lab")
    (home / "nbs").mkdir(); shutil.copy(ROOT / "nbs" / "07_explore.ipynb", home / "nbs")
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"; settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    own = {f"JUPYTER_{n}_DIR": str(home / n.lower()) for n in ("CONFIG", "RUNTIME")} | {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    env = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")} | own | dict(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", HF_HUB_OFFLINE="1")
    log = open(home / "log", "w")
    process = subprocess.Popen([*lab_command(), "--no-browser", f"--port={port}", "--allow-root"], cwd=home, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.time() + PATIENCE
        while not (files := list((home / "runtime").glob("jpserver-*.json"))):
            assert process.poll() is None and time.time() < end, (home / "log").read_text()[-3000:]
            time.sleep(.2)
        server = json.loads(files[0].read_text()) | {"process": process, "folder": home / "nbs"}
        while True: # the file is written a moment before the door opens
            try: urllib.request.urlopen(f"{server['url']}api?token={server['token']}"); break
            except OSError: assert time.time() < end; time.sleep(.2)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try: process.wait(30)
        except subprocess.TimeoutExpired: pass
        try: os.killpg(process.pid, signal.SIGKILL) # kernels that were left
        except ProcessLookupError: pass
        log.close()
    with socket.socket() as s: assert s.connect_ex(("127.0.0.1", server["port"])), "the server is gone"

@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()

def opened(browser, lab, notebook):
    "A notebook in JupyterLab; `page.asked` holds every address that the page asked for."
    page = browser.new_page(viewport={"width": 1180, "height": 1500})
    page.set_default_timeout(1000 * PATIENCE)
    page.asked = []
    page.on("request", lambda r: page.asked.append(r.url))
    page.goto(f"{lab['url']}lab/tree/{notebook}?token={lab['token']}")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    return page

@pytest.fixture(scope="module")
def page(browser, lab):
    "The study notebook, run to its end."
    page = opened(browser, lab, "07_explore.ipynb")
    page.keyboard.press("Control+B") # the list of files makes room
    page.wait_for_selector(".jp-NotebookPanel-toolbar")
    run_all(page)
    failed = "[data-mime-type='application/vnd.jupyter.error']"
    page.wait_for_function(f"""document.querySelector("{failed}") || document.querySelectorAll('.r2s-root[data-drawn]').length === 3 && document.querySelectorAll('.r2s-cards[data-cards]').length >= 2""")
    assert not page.locator(failed).count(), page.locator(failed).first.inner_text()
    page.get_by_text("| Idle").wait_for()
    return page

def run_all(page):
    "By the menu, which does nothing while the page or the kernel's connection is still opening: pressed until the first cell, which takes no time, is done."
    page.get_by_text("| Idle").wait_for()
    for _ in range(PATIENCE // 20):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try: return page.wait_for_function("[...document.querySelectorAll('.jp-InputPrompt')].some(p => /\\[\\d+\\]/.test(p.textContent))", timeout=20_000)
        except playwright.TimeoutError: continue
    raise AssertionError("JupyterLab runs no cell")

def output(page, n): return page.locator(".jp-OutputArea-output:has(.r2s-picture)").nth(n)
def canvas(page, n):
    found = output(page, n).locator(".r2s-picture"); found.scroll_into_view_if_needed()
    return found
def pixels(page, n): return canvas(page, n).evaluate("c => c.toDataURL()")
def said(page, n): return output(page, n).locator(".r2s-readout").inner_text()
def handle(page, n, name): return output(page, n).locator(".widget-slider", has=page.locator(f"label:text-is('{name}')")).locator(".noUi-handle").first

def changes(page, n, act):
    "The picture before and after; waits until it is another one."
    before = pixels(page, n)
    act()
    page.wait_for_function("([i, before]) => document.querySelectorAll('.r2s-picture')[i].toDataURL() !== before", arg=[n, before])
    return before, pixels(page, n)

def click_at(page, n, x, y):
    box = canvas(page, n).bounding_box()
    page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
    page.mouse.move(5, 5)

def keep(page, n, name):
    "A screenshot, checked to show something; kept in figures/ where that is asked for."
    page.mouse.move(5, 5)
    data = output(page, n).screenshot()
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    assert len(set(picture.resize((80, 80)).get_flattened_data() if hasattr(picture, "get_flattened_data") else picture.resize((80, 80)).getdata())) > 100
    if os.environ.get("REA2SEG_KEEP"): picture.save(ROOT / "figures" / f"explore_{name}.png", optimize=True)

def listens(process): return {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}

def test_lab_listens_on_loopback_alone_and_asks_for_its_token(lab):
    process = psutil.Process(lab["process"].pid)
    listening = listens(process)
    for child in process.children(recursive=True):
        try: listening |= listens(child)
        except psutil.NoSuchProcess: continue # a helper that came to its end since the list was made listens to nobody
    assert listening == {"127.0.0.1"} and lab["url"].startswith("http://127.0.0.1:") and len(lab["token"]) >= 32
    for token, code in (("", 403), ("?token=wrong", 403), (f"?token={lab['token']}", 200)):
        try: got = urllib.request.urlopen(f"{lab['url']}api/contents{token}").status
        except urllib.error.HTTPError as e: got = e.code
        assert got == code, token

def test_the_notebook_shows_its_widgets_without_a_network(page):
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert page.locator(".r2s-failed, .r2s-error").count() == 0
    outside = [u for u in page.asked if not u.startswith(("data:", "blob:", "http://127.0.0.1:", "ws://127.0.0.1:"))]
    assert len(page.asked) > 20 and not outside
    for n, name in enumerate(("attention", "kcore", "gallery")): keep(page, n, f"{name}_light")

def contrast(page, n):
    "WCAG contrast of the widget's text on what is behind it."
    return page.evaluate("""i => { const el = document.querySelectorAll('.r2s-readout')[i], rgb = s => s.match(/[\\d.]+/g).map(Number);
        let back = el; while (back && (rgb(getComputedStyle(back).backgroundColor)[3] ?? 1) === 0) back = back.parentElement;
        const lum = s => { const [r, g, b] = rgb(s).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
        const a = lum(getComputedStyle(el).color), b = lum(getComputedStyle(back).backgroundColor);
        return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), b]; }""", n)

def test_text_follows_the_theme(page):
    for n in range(3): ratio, light = contrast(page, n); assert ratio > 7 and light > .8
    theme(page, "JupyterLab Dark", "false")
    for n in range(3): ratio, light = contrast(page, n); assert ratio > 7 and light < .05
    for n, name in enumerate(("attention", "kcore", "gallery")): keep(page, n, f"{name}_dark")
    theme(page, "JupyterLab Light", "true")

def theme(page, name, light):
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    page.get_by_text("Theme", exact=True).hover()
    page.get_by_text(name, exact=True).click()
    page.wait_for_function("light => document.body.dataset.jpThemeLight === light", arg=light)
    page.wait_for_timeout(1000) # styles arrive a moment later

def test_a_slider_changes_the_picture(page):
    legend = output(page, 0).locator(".r2s-legend") # its text_content: what is out of view is not rendered
    kept = lambda: int(re.search(r"kept by the rerank, k2 \((\d+)\)", legend.text_content())[1])
    layers = output(page, 0).locator(".widget-slider", has=page.locator("label:text-is('layers')")).locator(".widget-readout")
    many, range_ = kept(), layers.text_content()
    changes(page, 0, lambda: (handle(page, 0, "k2").focus(), page.keyboard.press("ArrowLeft")))
    assert kept() == many - 1
    changes(page, 0, lambda: (handle(page, 0, "layers").focus(), page.keyboard.press("ArrowLeft")))
    assert layers.text_content() != range_
    changes(page, 0, lambda: (handle(page, 0, "opacity").focus(), page.keyboard.press("ArrowRight")))
    back, _ = changes(page, 0, lambda: (handle(page, 0, "layers").focus(), page.keyboard.press("ArrowRight")))
    output(page, 0).get_by_label("colours without the dropped tokens").check()
    assert back != pixels(page, 0)

def test_a_slider_answers_quickly(page):
    "From the key to the drawn picture; printed, and bounded loosely because the machine may be busy."
    handle(page, 0, "layers").focus()
    took = []
    for key in ("ArrowLeft", "ArrowLeft", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight"):
        page.evaluate("""() => { const root = document.querySelector('.r2s-root:has(.r2s-picture)'), values = root.querySelector('.r2s-scale');
            window.r2sTook = 0; const start = performance.now(), seen = new MutationObserver(() => { window.r2sTook = performance.now() - start; seen.disconnect(); });
            seen.observe(root, { attributes: true, attributeFilter: ['data-drawn'] }); }""")
        page.keyboard.press(key)
        page.wait_for_function("window.r2sTook > 0"); took.append(page.evaluate("window.r2sTook"))
        page.wait_for_timeout(150)
    print(f"key to picture: median {statistics.median(took):.0f} ms of {len(took)}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    assert statistics.median(took) < 3000

def test_a_token_is_pointed_at_and_chosen(page):
    changes(page, 0, lambda: click_at(page, 0, 0.53, 0.53))
    text = said(page, 0)
    assert "token 136" in text and "row 8" in text and "column 8" in text and "attention" in text and "x 128 to 144, y 128 to 144" in text
    assert output(page, 0).locator(".r2s-inset").is_visible()
    box = canvas(page, 0).bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    page.wait_for_function("document.querySelectorAll('.r2s-readout')[0].textContent.startsWith('token 0 ')")
    page.mouse.move(5, 5)
    page.wait_for_function("document.querySelectorAll('.r2s-readout')[0].textContent.startsWith('token 136 ')")

def test_tokens_are_walked_through_with_the_keyboard(page):
    picture = canvas(page, 0)
    output(page, 0).get_by_label("colours without the dropped tokens").focus(); page.keyboard.press("Tab") # the picture comes next
    assert picture.evaluate("c => document.activeElement === c && getComputedStyle(c).outlineStyle") == "solid"
    start = said(page, 0)
    page.keyboard.press("Escape"); page.keyboard.press("Home")
    page.wait_for_function("document.querySelectorAll('.r2s-readout')[0].textContent.startsWith('token 0 ')")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"): page.keyboard.press(key)
    page.wait_for_function("document.querySelectorAll('.r2s-readout')[0].textContent.startsWith('token 17 ')")
    page.keyboard.press("Enter"); picture.evaluate("c => c.blur()")
    page.wait_for_timeout(300)
    assert said(page, 0).startswith("token 17 ") and start != said(page, 0), "it was chosen, so it stays when the focus leaves"

def test_seed_points_are_chosen_and_python_answers(page):
    legend = output(page, 1).locator(".r2s-scale")
    canvas(page, 1).focus()
    before = legend.inner_text()
    page.keyboard.press("End"); page.keyboard.press("Enter")
    page.wait_for_function("before => document.querySelectorAll('.r2s-scale')[1].innerText !== before", arg=before)
    assert "similarity to point" in legend.inner_text()
    changes(page, 1, lambda: (handle(page, 1, "tau").focus(), page.keyboard.press("End")))
    page.wait_for_function("document.querySelectorAll('.r2s-cards')[0].dataset.cards === '0'")
    assert "no semantic-level candidates" in output(page, 1).inner_text()

def test_candidates_are_enlarged_by_click_and_by_key(page):
    cards = output(page, 2).locator(".r2s-card")
    changes(page, 2, lambda: cards.nth(3).click())
    assert cards.nth(3).get_attribute("aria-pressed") == "true" and "candidate 4" in output(page, 2).locator(".r2s-legend").inner_text()
    changes(page, 2, lambda: (cards.nth(3).focus(), page.keyboard.press("ArrowRight")))
    assert cards.nth(4).get_attribute("aria-pressed") == "true" and cards.nth(3).get_attribute("aria-pressed") == "false"

def test_an_error_appears_in_the_widget(page):
    question = output(page, 0).locator("input[type=text]")
    asked = question.input_value()
    question.fill("  "); question.press("Enter")
    alert = output(page, 0).get_by_role("alert"); alert.wait_for()
    assert "the question is empty" in alert.inner_text() and page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    question.fill(asked); question.press("Enter")
    alert.wait_for(state="detached")

def test_an_untrusted_notebook_shows_the_static_picture(lab, browser):
    "What came from elsewhere runs nothing: the PNG beside the widget is shown."
    model, processor = build("llava")
    widget = explore_attention(model, processor, np.full((60, 80, 3), 128, np.uint8), "the cube", new_tokens=0)
    shown = nbformat.v4.new_output("execute_result", widget._repr_mimebundle_(), execution_count=1)
    cell = nbformat.v4.new_code_cell("look", outputs=[shown], execution_count=1)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), lab["folder"] / "received.ipynb")
    other = opened(browser, lab, "received.ipynb")
    picture = other.locator(".jp-RenderedImage img"); picture.wait_for()
    assert picture.evaluate("i => i.decode().then(() => i.naturalWidth)") > 300 and other.locator(".r2s-root").count() == 0
