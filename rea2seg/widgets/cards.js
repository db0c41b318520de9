// A row of small pictures with captions; one of them can be chosen, by click or by keyboard.

const make = (tag, name, parent, text) => { const e = document.createElement(tag); e.className = name; if (text !== undefined) e.textContent = text; parent?.append(e); return e; };

function render({ model, el }) {
  const root = make("div", "r2s-root r2s-cards", el);
  let buttons = [], urls = [];

  const mark = () => buttons.forEach((b, i) => {
    const on = i === model.get("selected");
    b.setAttribute("aria-pressed", on); b.tabIndex = on || (i === 0 && model.get("selected") < 0) ? 0 : -1;
  });
  const choose = i => { model.set("selected", i); model.save_changes(); mark(); };
  const fill = () => {
    urls.forEach(URL.revokeObjectURL); urls = []; root.replaceChildren();
    root.setAttribute("role", "group"); root.setAttribute("aria-label", model.get("alt"));
    root.style.setProperty("--r2s-card", `${model.get("width")}px`);
    buttons = model.get("cards").map(({ title, lines, colour, picture }, i) => {
      const b = make("button", "r2s-card", root), img = make("img", "", b);
      b.type = "button"; b.style.setProperty("--r2s-colour", colour || "transparent");
      urls.push(URL.createObjectURL(new Blob([new Uint8Array(picture.buffer, picture.byteOffset, picture.byteLength).slice()])));
      img.src = urls.at(-1); img.alt = "";
      make("strong", "", b, title);
      for (const line of lines) make("span", "", b, line);
      b.addEventListener("click", () => choose(i));
      return b;
    });
    mark(); root.dataset.cards = buttons.length;
  };
  root.addEventListener("keydown", e => {
    const at = buttons.indexOf(document.activeElement);
    if (at < 0) return;
    const columns = buttons.findIndex(b => b.offsetTop > buttons[0].offsetTop), step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[e.key];
    const to = e.key === "Home" ? 0 : e.key === "End" ? buttons.length - 1 : step ? at + step : -1;
    if (step === undefined && to < 0) return;
    e.preventDefault(); e.stopPropagation();
    if (buttons[to]) { buttons[to].focus(); choose(to); }
  });
  model.on("change:cards", fill); model.on("change:selected", mark);
  fill();
  return () => { model.off("change:cards", fill); model.off("change:selected", mark); urls.forEach(URL.revokeObjectURL); };
}

export default { render };
