"""The evaluator behind a server, tried against a small server on the loopback that misbehaves in every known way."""
import base64
import io
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from rea2seg.evaluator import load_evaluator
from rea2seg.evaluator_api import ApiError, ApiEvaluator, RateLimit, read_scores
from rea2seg.settings import Settings

IMAGE = (np.mgrid[:20, :30].sum(0)[..., None] * np.array([3, 4, 5])).astype(np.uint8)


def stripes(n): return torch.stack([torch.arange(30).expand(20, 30) < 30 * (k + 1) // (n + 1) for k in range(n)]) if n else torch.zeros(0, 20, 30, dtype=torch.bool)


def shown(body):
    "Pictures in a request, as arrays."
    parts = body["messages"][1]["content"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(p["image_url"]["url"].split(",")[1])))) for p in parts if p["type"] == "image_url"]


def honest(body):
    "An evaluator that reports how much of the picture each mask covers."
    return "Thinking of it [1].\n" + json.dumps({"iou": [round(float((m > 127).mean()), 2) for m in shown(body)[1:]]})


class Server:
    "Answers each request by the next script entry, the last one for good: a status, a text, or a misbehaviour."
    def __init__(self, *script):
        self.script, self.bodies, self.headers, self.lock = list(script), [], [], threading.Lock()
        outer = self
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *a): pass
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.bodies.append(body); outer.headers.append(dict(self.headers))
                    act = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                outer.act(self, body, act)
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)

    def act(self, h, body, act):
        if act == "cut":
            h.connection.shutdown(socket.SHUT_RDWR); h.close_connection = True; return
        if act == "half":
            h.send_response(200); h.send_header("Content-Length", "1000"); h.end_headers(); h.wfile.write(b'{"choices": ['); h.close_connection = True; return
        if act == "slow": time.sleep(1.0); return
        if act == "drip":
            h.send_response(200); h.end_headers()
            try:
                for _ in range(30): h.wfile.write(b" "); h.wfile.flush(); time.sleep(0.1)
            except OSError: pass
            return
        status, headers, payload = 200, {}, None
        if isinstance(act, tuple): status, headers = act; payload = b"busy"
        elif act == "garbage": payload = b"<html>not json</html>"
        elif act == "shape": payload = b'{"choices": []}'
        else:
            text = act(body) if callable(act) else act
            payload = json.dumps({"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}).encode()
        h.send_response(status)
        for k, v in headers.items(): h.send_header(k, v)
        h.send_header("Content-Length", str(len(payload))); h.end_headers(); h.wfile.write(payload)

    def __enter__(self): self.thread.start(); return self
    def __exit__(self, *a): self.http.shutdown(); self.http.server_close(); self.thread.join(5)
    @property
    def url(self): return f"http://127.0.0.1:{self.http.server_port}/v1"


def evaluator(server, waits=None, profile="lens", cache=None, settings=None, **changes):
    s = Settings.load(profile, prompt="full", **(settings or {}))
    changes = dict(timeout=0.5, retries=3, backoff=0.01, longest_wait=30.0, per_minute=0.0, parallel=3, price_in=2.0, price_out=10.0) | changes
    return ApiEvaluator.load(s, url=server.url, model="scorer", cache=cache, sleep=(waits.append if waits is not None else lambda t: None), **changes)


@pytest.mark.parametrize("n", [0, 1, 5, 12, 200])
def test_scores_stay_with_their_masks(n):
    with Server(honest) as server:
        masks = stripes(n)
        got = evaluator(server).score(IMAGE, "how wide?", masks)
        assert len(server.bodies) == -(-n // 5) and len(got.ious) == n
        torch.testing.assert_close(got.ious, masks.float().mean((1, 2)) if n else torch.zeros(0), atol=0.0051, rtol=0)
        if n: assert got.usage == {"calls": -(-n // 5), "cached": 0, "prompt_tokens": 100 * -(-n // 5), "completion_tokens": 10 * -(-n // 5), "cost": pytest.approx(-(-n // 5) * 3e-4)}


def test_what_is_sent():
    with Server(honest) as server:
        evaluator(server, settings=dict(question_place="repeated", mask_view="overlay")).score(IMAGE, "which <|im_end|> one?", stripes(3))
        body = server.bodies[0]
        assert body["model"] == "scorer" and [m["role"] for m in body["messages"]] == ["system", "user"]
        pictures = shown(body)
        assert len(pictures) == 4 and np.array_equal(pictures[0], IMAGE) and all(p.shape == IMAGE.shape for p in pictures)
        text = json.dumps(body["messages"][1]["content"])
        assert text.count("which <|im_end|> one?") == 4 and text.count("<|im_") == 4 and "assistant" not in text and body["messages"][1]["content"][0]["text"] == "Image-1: "


@pytest.mark.parametrize("fault", ["slow", "drip", "cut", "half", "garbage", "shape", "I cannot say.", '{"iou": [0.5]}', '{"iou": [0.5, 0.5, 2.0]}', "", (429, {}), (503, {}), (500, {})], ids=str)
def test_a_fault_is_tried_again(fault):
    with Server(fault, honest) as server:
        got = evaluator(server).score(IMAGE, "q", stripes(3))
        assert got.usage["calls"] == 2 and len(server.bodies) == 2
        torch.testing.assert_close(got.ious, stripes(3).float().mean((1, 2)), atol=0.0051, rtol=0)


@pytest.mark.parametrize("fault,says", [("garbage", "JSON"), ('{"iou": [0.5]}', "expected 3 scores"), ((429, {}), "429"), ("cut", "Connection"), ("slow", "[Tt]imeout|timed out")], ids=str)
def test_a_lasting_fault_is_an_error_with_its_reason(fault, says):
    with Server(fault) as server:
        with pytest.raises(ApiError, match=says): evaluator(server, retries=1).score(IMAGE, "q", stripes(3))
        assert len(server.bodies) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_final(status):
    with Server((status, {})) as server:
        with pytest.raises(ApiError, match=f"status {status}.*busy"): evaluator(server).score(IMAGE, "q", stripes(3))
        assert len(server.bodies) == 1


def test_nobody_listens():
    with Server(honest) as server: ev = evaluator(server, retries=1)
    with pytest.raises(ApiError, match="2 tries"): ev.score(IMAGE, "q", stripes(2))


def test_waits_grow_and_retry_after_is_obeyed():
    waits = []
    with Server((500, {}), (500, {}), (500, {}), honest) as server: evaluator(server, waits, backoff=1.0).score(IMAGE, "q", stripes(2))
    assert len(waits) == 3 and all(0.5 * 2 ** k <= w <= 2 ** k for k, w in enumerate(waits))
    waits = []
    with Server((429, {"Retry-After": "7"}), (429, {"Retry-After": "900"}), (429, {"Retry-After": "soon"}), honest) as server: evaluator(server, waits, backoff=1.0).score(IMAGE, "q", stripes(2))
    assert waits[:2] == [7.0, 30.0] and 2 <= waits[2] <= 4            # 900 s is more than longest_wait
    from email.utils import formatdate
    waits = []
    with Server((503, {"Retry-After": formatdate(time.time() + 20, usegmt=True)}), honest) as server: evaluator(server, waits).score(IMAGE, "q", stripes(2))
    assert 17 < waits[0] <= 20


def test_rate_limit():
    waits, limit = [], RateLimit(60)
    for _ in range(4): limit(waits.append)
    assert len(waits) == 3 and waits == sorted(waits) and 2.5 < waits[-1] <= 3      # nobody really slept


def test_cache(tmp_path):
    with Server(honest) as server:
        ev = evaluator(server, cache=tmp_path)
        first = ev.score(IMAGE, "q", stripes(12))
        again = evaluator(server, cache=tmp_path).score(IMAGE, "q", stripes(12))
        assert len(server.bodies) == 3 and torch.equal(first.ious, again.ious) and first.raw == again.raw
        assert again.usage == {"calls": 0, "cached": 3, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}
        ev.score(IMAGE, "another q", stripes(2)); ev.score(255 - IMAGE, "q", stripes(2)); evaluator(server, cache=tmp_path, settings=dict(mask_view="cutout")).score(IMAGE, "q", stripes(2))
        assert len(server.bodies) == 6
        files = sorted(tmp_path.rglob("*.json"))
        assert len(files) == 6 and not list(tmp_path.rglob("*.tmp"))
        for f in files: f.write_text(f.read_text()[:20])                 # damaged since: asked again, not believed
        assert torch.equal(evaluator(server, cache=tmp_path).score(IMAGE, "q", stripes(12)).ious, first.ious) and len(server.bodies) == 9


def test_a_killed_run_asks_for_nothing_twice(tmp_path):
    with Server(honest, honest, (400, {})) as server:
        with pytest.raises(ApiError): evaluator(server, cache=tmp_path, parallel=1).score(IMAGE, "q", stripes(12))
        assert len(list(tmp_path.rglob("*.json"))) == 2
        server.script = [honest]
        got = evaluator(server, cache=tmp_path, parallel=1).score(IMAGE, "q", stripes(12))
        assert got.usage["cached"] == 2 and got.usage["calls"] == 1


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("A_TEST_KEY", "abc")
    with Server(honest) as server:
        evaluator(server, key_variable="A_TEST_KEY").score(IMAGE, "q", stripes(1))
        evaluator(server, key_variable="NO_SUCH_KEY").score(IMAGE, "q", stripes(1))
    assert server.headers[0]["Authorization"] == "Bearer abc" and "Authorization" not in server.headers[1]


def test_large_pictures_are_made_smaller():
    with Server(honest) as server:
        evaluator(server, longest_side=10).score(IMAGE, "q", stripes(1))
        assert [p.shape[:2] for p in shown(server.bodies[0])] == [(7, 10)] * 2


def test_bad_input_never_reaches_the_server():
    with Server(honest) as server:
        ev = evaluator(server)
        with pytest.raises(ValueError, match="masks are 20x29"): ev.score(IMAGE, "q", stripes(2)[:, :, 1:])
        with pytest.raises(TypeError, match="bool"): ev.score(IMAGE, "q", stripes(2).float())
        assert not server.bodies


def test_loading():
    ev = load_evaluator("api", Settings.load("lens"), url="http://127.0.0.1:1/v1", model="m")
    assert ev.kind == "api" and ev.options.model == "m"
    with pytest.raises(ValueError, match="no setting is called temperature"): load_evaluator("api", Settings.load("lens"), temperature=1)


@pytest.mark.parametrize("text,n,want", [('{"iou": [0.1, 1, 0.00]}', 3, [0.1, 1.0, 0.0]), ("first [0.2, 0.3], better [0.4, 0.5]", 2, [0.4, 0.5]), ("IoU: 0.25 .5", 2, [0.25, 0.5]),
                                         ("[0.7]", 1, [0.7]), ("[1, 2]\nIoU 0.5 0.5", 2, None), ("[0.5, 0.5, 0.5]", 2, None), ("[5e-1, 0.5]", 2, None), ("50% 50%", 2, None)])
def test_read_scores(text, n, want):
    if want is None:
        with pytest.raises(ValueError): read_scores(text, n)
    else: assert read_scores(text, n)[0] == want
