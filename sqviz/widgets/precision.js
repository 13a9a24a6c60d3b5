// precision.js: PrecisionView. A block (precision_block.js), what is known of one operator, all layers (precision_strip.js).

const MEANINGS = {
  local: ["Its own output", "mean over tokens of ‖ŷ − y‖² / ‖y‖²"],
  in_block: ["What the block adds to the residual stream", "mean over tokens of ‖ŷ − y‖² / ‖y − x‖²"],
  in_model: ["The next token, this block only", "KL(p ‖ p̂) in nats"],
  everywhere: ["The next token, all blocks", "KL(p ‖ p̂) in nats"],
};

function pmTable(caption, head, rows) {
  const make = (tag, text, kind = "") => Object.assign(document.createElement(tag), { textContent: text, className: kind });
  const table = document.createElement("table");
  table.append(make("caption", caption));
  const top = table.createTHead().insertRow();
  for (const text of head) top.append(make("th", text));
  const body = table.createTBody();
  for (const cells of rows) {
    const row = body.insertRow();
    cells.forEach((text, at) => row.append(make("td", text, at === cells.length - 1 ? "number" : "")));
  }
  return table;
}

function explain(about, one, index, meta) {
  const line = (text, kind = "sqviz-note") => Object.assign(document.createElement("div"), { textContent: text, className: kind });
  const title = Object.assign(document.createElement("h4"), { textContent: `${one.title} · ${one.precision}` });
  const parts = [title, line(`${one.name}, block ${index}`)];
  if (!one.quantised) parts.push(line(`Stays in 16 bit: ${one.reason}.`, ""));
  const operands = one.operands.map(([label, granularity, steps, largest]) => {
    const size = largest === null ? "–" : number(largest);
    return one.quantised ? [label, granularity || "16 bit", steps || "–", size] : [label, size];
  });
  if (one.largest !== null) operands.push(one.quantised ? ["result", "16 bit", "–", number(one.largest)] : ["result", number(one.largest)]);
  if (operands.length) {
    const head = one.quantised ? ["", "a step", "steps in a segment", "largest magnitude"] : ["", "largest magnitude"];
    parts.push(pmTable("What it reads and makes", head, operands));
  }
  const caption = one.quantised ? "Error when it alone is quantised" : "Error if its result were handed on in INT8";
  const rows = Object.entries(MEANINGS).map(([key, [what, how]]) => [what, how, one[key] === null ? "not measured" : number(one[key])]);
  parts.push(pmTable(caption, ["of", "measured as", "error"], rows));
  if (meta.together !== null) parts.push(line(`Everything in integers together: KL ${number(meta.together)} nats.`));
  about.replaceChildren(...parts);
}

function render({ model, el }) {
  const root = startView(el, model);
  const meta = model.get("meta");
  const add = (parent, tag, className, textContent = "") => {
    const element = Object.assign(document.createElement(tag), { className, textContent });
    parent.append(element);
    return element;
  };
  add(root, "div", "sqviz-title", model.get("title"));
  add(root, "div", "sqviz-note", meta.note);
  const tooltip = makeTooltip(root);
  const set = (changes) => {
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    model.save_changes();
  };
  const last = meta.blocks.length - 1;
  const to = (index) => set({ block: Math.min(last, Math.max(0, index)) });
  const step = (by) => to(model.get("block") + by);
  const bar = add(root, "div", "sqviz-bar");
  const before = addButton(bar, "←", "Previous block (left arrow)", () => step(-1));
  const block = addSelect(bar, "Block", meta.blocks.map((_, index) => [String(index), String(index)]), String(model.get("block")), (value) => to(Number(value)));
  const after = addButton(bar, "→", "Next block (right arrow)", () => step(1));
  const measure = addSelect(bar, "Error of", meta.measures, model.get("measure"), (value) => set({ measure: value }));
  addButton(bar, "PNG", "Save the picture of all blocks", () => savePicture(strip.canvas, "precision"));
  const legend = add(root, "div", "pm-legend");
  add(legend, "span", "pm-int", "computes in integers");
  add(legend, "span", "", "stays in 16 bit; in brackets what INT8 would cost");
  add(legend, "div", "", "data flows downwards");
  const both = add(root, "div", "pm");
  const left = add(both, "div", "");
  const about = add(both, "div", "pm-about");
  about.setAttribute("aria-live", "polite");
  const diagram = makeBlock(left, tooltip, { choose: (name) => set({ operator: name }), step });
  const below = add(root, "div", "");
  const what = add(below, "div", "sqviz-note");
  const strip = makeStrip(below, tooltip, meta, {
    block: () => model.get("block"), operator: () => model.get("operator"), measure: () => model.get("measure"),
    choose: (index, name) => set({ block: index, operator: name }),
  });

  const show = () => {
    const index = model.get("block");
    const operators = meta.blocks[index];
    const one = operators.find(({ name }) => name === model.get("operator")) ?? operators[0];
    Object.assign(before, { disabled: index === 0 });
    Object.assign(after, { disabled: index === last });
    [block.value, measure.value] = [String(index), model.get("measure")];
    diagram.show({ index, operators, layout: meta.layouts[index], measure: model.get("measure"), chosen: one.name });
    explain(about, one, index, meta);
    const words = meta.measures.find(([key]) => key === model.get("measure"))[1];
    what.textContent = `Error of ${words}, of every operator in every block. Click a cell, or move with the arrow keys; grey: not measured, or not in this block.`;
    strip.redraw();
  };
  const fit = new ResizeObserver(() => root.classList.toggle("pm-narrow", root.clientWidth < 720));
  fit.observe(root);
  const looks = ["block", "operator", "measure"];
  for (const name of looks) model.on(`change:${name}`, show);
  show();
  return () => {
    for (const name of looks) model.off(`change:${name}`, show);
    fit.disconnect();
    diagram.stop();
    strip.stop();
  };
}

export default { render };
