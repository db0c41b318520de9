// A picture with image tokens, points, edges and outlines over it; tells Python which token or point was chosen.
// Everything is drawn from the model's traits, so a hover or another opacity asks Python nothing.

const bytes = v => v ? new Uint8Array(v.buffer, v.byteOffset, v.byteLength).slice() : new Uint8Array(0);
const floats = v => new Float32Array(bytes(v).buffer);
const shorts = v => new Uint16Array(bytes(v).buffer);
const make = (tag, name, parent) => { const e = document.createElement(tag); e.className = name; parent?.append(e); return e; };
const number = { d: v => String(Math.round(v)), f: v => v.toFixed(2).replace("-", "\u2212"), p: v => (100 * v).toPrecision(3) + " %" };

// black or white under every line, so that it shows on any picture
const under = colour => { const [r, g, b] = [1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16)); return 0.3 * r + 0.59 * g + 0.11 * b > 153 ? "#000000" : "#ffffff"; };

function twice(c, width, colour, path, dash = []) {
  for (const [w, s, d] of [[width + 2, under(colour), []], [width, colour, dash]]) {
    c.lineWidth = w; c.strokeStyle = s; c.setLineDash(d.map(x => x * width)); c.beginPath(); path(); c.stroke();
  }
  c.setLineDash([]);
}

const shapes = {
  box: (c, x0, y0, x1, y1) => c.rect(x0, y0, x1 - x0, y1 - y0),
  ring: (c, x0, y0, x1, y1) => c.ellipse((x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2, 0, 0, 7),
  dot: (c, x0, y0, x1, y1) => shapes.ring(c, x0, y0, x1, y1),
  cross: (c, x0, y0, x1, y1) => { c.moveTo(x0, y0); c.lineTo(x1, y1); c.moveTo(x0, y1); c.lineTo(x1, y0); },
};

function stamp(c, shape, colour, x0, y0, x1, y1, width) {
  if (shape !== "dot") return twice(c, width, colour, () => shapes[shape](c, x0, y0, x1, y1));
  c.beginPath(); shapes.dot(c, x0, y0, x1, y1);
  c.fillStyle = colour; c.fill(); c.lineWidth = 1; c.strokeStyle = "#000000"; c.stroke();
}

function render({ model, el }) {
  const get = name => model.get(name);
  const root = make("div", "r2s-root", el), left = make("div", "r2s-stage", root), right = make("div", "r2s-side", root);
  const canvas = make("canvas", "r2s-picture", left), legend = make("ul", "r2s-legend", right), scale = make("div", "r2s-scale", right);
  const said = make("p", "r2s-readout", right), inset = make("canvas", "r2s-inset", right);
  const readout = `r2s-${Math.random().toString(36).slice(2)}`;
  canvas.tabIndex = 0; canvas.setAttribute("role", "application"); canvas.setAttribute("aria-describedby", readout);
  said.id = readout; said.setAttribute("aria-live", "polite"); inset.setAttribute("aria-hidden", "true"); inset.width = inset.height = 240;

  let image = null, items = [], hover = -1, pending = 0, drawn = 0, arrays = {};

  const load = async () => {
    const data = bytes(get("picture"));
    image = data.length ? await createImageBitmap(new Blob([data])) : null;
    redraw();
  };
  // boxes of what can be chosen: image tokens, or points with a margin around them
  const read = () => {
    const boxes = floats(get("boxes")), points = floats(get("points"));
    arrays = { boxes, points, values: floats(get("values")), shades: floats(get("point_values")), edges: shorts(get("edges")), facts: floats(get("fact_values")), lut: bytes(get("colours")) };
    const r = 0.5 + Math.max(...get("size_hw")) / 60;
    items = get("pick") === "points"
      ? Array.from({ length: points.length / 2 }, (_, i) => [points[2 * i] + .5 - r, points[2 * i + 1] + .5 - r, points[2 * i] + .5 + r, points[2 * i + 1] + .5 + r])
      : Array.from({ length: boxes.length / 4 }, (_, i) => Array.from(boxes.subarray(4 * i, 4 * i + 4)));
    if (hover >= items.length) hover = -1;
  };
  const shade = v => { const i = 3 * Math.round(255 * Math.min(1, Math.max(0, v))), l = arrays.lut; return `rgb(${l[i]},${l[i + 1]},${l[i + 2]})`; };

  function paint(c, k) { // k: canvas pixels per picture pixel
    const { boxes, values, points, shades, edges } = arrays, [H, W] = get("size_hw"), line = Math.max(1.2, c.canvas.width / 360);
    c.setTransform(1, 0, 0, 1, 0, 0); c.clearRect(0, 0, c.canvas.width, c.canvas.height);
    c.imageSmoothingEnabled = true; c.imageSmoothingQuality = "high";
    if (image) c.drawImage(image, 0, 0, W * k, H * k);
    c.globalAlpha = get("opacity");
    for (let t = 0; t < values.length; t++) {
      if (Number.isNaN(values[t])) continue;
      const [x0, y0, x1, y1] = boxes.subarray(4 * t, 4 * t + 4);
      const [a, b, d, e] = [x0, y0, x1, y1].map(v => Math.round(v * k)); // whole pixels: no seams between tokens
      c.fillStyle = shade(values[t] / (get("top") || 1)); c.fillRect(a, b, d - a, e - b);
    }
    c.globalAlpha = 1;
    for (const { polygons, colour, fill, dash } of get("outlines")) {
      const path = () => { for (const p of polygons) { p.forEach(([x, y], i) => c[i ? "lineTo" : "moveTo"]((x + .5) * k, (y + .5) * k)); c.closePath(); } };
      if (fill) { c.globalAlpha = fill; c.fillStyle = colour; c.beginPath(); path(); c.fill("evenodd"); c.globalAlpha = 1; }
      twice(c, 1.5 * line, colour, path, dash || []);
    }
    for (const { shape, colour, items: chosen } of get("marks")) for (const t of chosen) {
      const [x0, y0, x1, y1] = Array.from(boxes.subarray(4 * t, 4 * t + 4), v => v * k), inner = shape === "box" ? line / 2 : Math.min(x1 - x0, y1 - y0) / 3.5;
      stamp(c, shape, colour, x0 + inner, y0 + inner, x1 - inner, y1 - inner, line);
    }
    c.globalAlpha = Math.max(.05, Math.min(.6, 80 / edges.length)); c.lineWidth = line * .6; c.strokeStyle = "#ffffff"; // many edges, each one fainter
    for (let e = 0; e < edges.length; e += 2) {
      const [a, b] = [edges[e], edges[e + 1]];
      c.beginPath(); c.moveTo((points[2 * a] + .5) * k, (points[2 * a + 1] + .5) * k); c.lineTo((points[2 * b] + .5) * k, (points[2 * b + 1] + .5) * k); c.stroke();
    }
    c.globalAlpha = 1;
    const spots = rings => { for (const { shape, colour, xy, size } of get("spots")) if ((shape === "ring") === rings) for (const [x, y] of xy) spot(c, shape, colour, x, y, k, size || 1); };
    spots(true); // under the points that they surround
    for (let i = 0; i < points.length / 2; i++) spot(c, "dot", shade(shades[i] ?? 1), points[2 * i], points[2 * i + 1], k, 1);
    spots(false);
    for (const [i, colour] of [[hover, "#ffffff"], [get("selected"), get("accent")]]) if (items[i]) {
      const [x0, y0, x1, y1] = items[i].map(v => v * k);
      twice(c, 1.8 * line, colour, () => shapes[get("pick") === "points" ? "ring" : "box"](c, x0, y0, x1, y1));
    }
  }
  const spot = (c, shape, colour, x, y, k, size) => {
    const r = size * c.canvas.width / 110, [a, b] = [(x + .5) * k, (y + .5) * k];
    stamp(c, shape, colour, a - r, b - r, a + r, b + r, Math.max(1.2, c.canvas.width / 300));
  };

  function magnify(i) {
    const c = inset.getContext("2d"), box = items[i];
    inset.hidden = !box || !image;
    if (inset.hidden) return;
    const [H, W] = get("size_hw"), side = 3 * Math.max(box[2] - box[0], box[3] - box[1]), k = inset.width / side;
    const [left, top] = [(box[0] + box[2] - side) / 2, (box[1] + box[3] - side) / 2];
    c.setTransform(1, 0, 0, 1, 0, 0); c.clearRect(0, 0, 240, 240); c.imageSmoothingEnabled = false;
    c.setTransform(k, 0, 0, k, -left * k, -top * k); c.drawImage(image, 0, 0, W, H);
    c.setTransform(1, 0, 0, 1, 0, 0);
    twice(c, 2, get("accent"), () => c.rect((box[0] - left) * k, (box[1] - top) * k, (box[2] - box[0]) * k, (box[3] - box[1]) * k));
  }

  function tell(i) {
    const n = items.length, parts = [];
    if (items[i]) {
      get("facts").forEach(([name, kind], f) => { const v = arrays.facts[f * n + i]; if (!Number.isNaN(v)) parts.push(`${name} ${number[kind](v)}`); });
      if (get("pick") === "cells") for (const m of get("marks")) if (m.items.includes(i)) parts.push(m.label);
      const [x0, y0, x1, y1] = items[i].map(v => Math.round(v));
      parts.push(get("pick") === "points" ? `x ${arrays.points[2 * i]}, y ${arrays.points[2 * i + 1]}` : `x ${x0} to ${x1}, y ${y0} to ${y1}`);
    }
    said.textContent = parts.join(" \u00b7 ") || get("hint");
  }

  function keys() {
    legend.replaceChildren();
    const add = (shape, colour, text, dash) => {
      const li = make("li", "", legend), c = make("canvas", "r2s-key", li), g = c.getContext("2d");
      c.width = c.height = 40; c.setAttribute("aria-hidden", "true");
      if (shape === "line") twice(g, 5, colour, () => { g.moveTo(2, 20); g.lineTo(38, 20); }, dash || []);
      else stamp(g, shape, colour, 9, 9, 31, 31, 4);
      li.append(text);
    };
    for (const o of get("outlines")) if (o.label) add("line", o.colour, o.label, o.dash);
    for (const m of get("marks")) add(m.shape, m.colour, `${m.label} (${m.items.length})`);
    for (const s of get("spots")) add(s.shape, s.colour, s.xy.length > 1 ? `${s.label} (${s.xy.length})` : s.label);
    const stops = Array.from({ length: 9 }, (_, i) => shade(i / 8)).join(",");
    scale.hidden = !get("scale").length; scale.replaceChildren();
    if (!scale.hidden) {
      const [low, name, high] = get("scale");
      make("span", "", scale).textContent = low; make("span", "r2s-bar", scale).style.background = `linear-gradient(90deg,${stops})`; make("span", "", scale).textContent = `${high} ${name}`;
    }
  }

  function draw() {
    pending = 0;
    try {
      read();
      const [H, W] = get("size_hw"), ratio = window.devicePixelRatio || 1, shown = Math.min(get("width"), get("width") * 1.25 * W / H);
      canvas.style.width = `${shown}px`; canvas.style.aspectRatio = `${W} / ${H}`;
      const width = Math.max(1, Math.round(shown * ratio)), height = Math.max(1, Math.round(shown * ratio * H / W));
      if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
      canvas.setAttribute("aria-label", get("alt"));
      paint(canvas.getContext("2d"), canvas.width / W); keys();
      const i = hover >= 0 ? hover : get("selected");
      tell(i); magnify(i);
      root.classList.remove("r2s-failed");
    } catch (error) { root.classList.add("r2s-failed"); said.textContent = `Error: the picture could not be drawn: ${error.message}`; }
    root.dataset.drawn = ++drawn;
  }
  const redraw = () => { pending ||= requestAnimationFrame(draw); };

  const place = event => { const r = canvas.getBoundingClientRect(), [H, W] = get("size_hw"); return [(event.clientX - r.left) / r.width * W, (event.clientY - r.top) / r.height * H]; };
  const found = event => {
    const [x, y] = place(event);
    if (get("pick") === "points") {
      let best = -1, least = Infinity;
      items.forEach(([x0, y0, x1, y1], i) => { const d = Math.hypot(x - (x0 + x1) / 2, y - (y0 + y1) / 2); if (d < least && d < x1 - x0) { best = i; least = d; } });
      return best;
    }
    return items.findLastIndex(([x0, y0, x1, y1]) => x >= x0 && x < x1 && y >= y0 && y < y1);
  };
  const choose = i => { model.set("selected", i); model.save_changes(); redraw(); };
  const point = i => { if (i !== hover) { hover = i; redraw(); } };
  canvas.addEventListener("pointermove", e => point(found(e)));
  canvas.addEventListener("pointerleave", () => point(-1));
  canvas.addEventListener("click", e => { canvas.focus(); const i = found(e); if (i >= 0) choose(i === get("selected") ? -1 : i); });

  const centre = ([x0, y0, x1, y1]) => [(x0 + x1) / 2, (y0 + y1) / 2];
  const towards = (i, dx, dy) => { // the nearest one in a direction
    const [x, y] = centre(items[i]);
    let best = i, least = Infinity;
    items.forEach((box, j) => {
      const [a, b] = centre(box), along = (a - x) * dx + (b - y) * dy, across = Math.abs((a - x) * dy) + Math.abs((b - y) * dx);
      if (along > 1e-3 && across <= along && along + 3 * across < least) { best = j; least = along + 3 * across; }
    });
    return best;
  };
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", e => {
    const now = hover >= 0 ? hover : get("selected");
    if (arrows[e.key] && items.length) point(items[now] ? towards(now, ...arrows[e.key]) : 0);
    else if (e.key === "Home") point(0);
    else if (e.key === "End") point(items.length - 1);
    else if ((e.key === "Enter" || e.key === " ") && items[hover]) choose(hover);
    else if (e.key === "Escape") { hover = -1; choose(-1); }
    else return;
    e.preventDefault(); e.stopPropagation();
  });
  canvas.addEventListener("blur", () => point(-1));

  model.on("change:picture", load); model.on("change", redraw);
  load();
  return () => { model.off("change:picture", load); model.off("change", redraw); cancelAnimationFrame(pending); };
}

export default { render };
