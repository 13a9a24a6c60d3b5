// attention.js: AttentionView. Heads on one canvas (attention_panels.js), one of them large, the profile below.

function openHead(parent, tooltip, data, { palette, span, setSpan, close, step }) {
  const { meta } = data;
  const bar = Object.assign(document.createElement("div"), { className: "sqviz-bar" });
  parent.append(bar);
  addButton(bar, "← All heads", "Back to the overview (Escape)", close);
  const name = Object.assign(document.createElement("b"));
  bar.append(name);
  addButton(bar, "Layer −", "One layer up (↑)", () => step(-1, 0));
  addButton(bar, "Layer +", "One layer down (↓)", () => step(1, 0));
  addButton(bar, "Head −", "Previous head (←)", () => step(0, -1));
  addButton(bar, "Head +", "Next head (→)", () => step(0, 1));
  const save = addButton(bar, "PNG", "Save the picture", () => savePicture(surface.canvas, name.textContent.replaceAll(" ", "-")));
  const status = Object.assign(document.createElement("div"), { className: "sqviz-note" });
  parent.append(status);
  const raster = makeRaster();
  let [panel, map, box] = [null, null, null];
  const ownMeta = () => ({ ...meta, rows: map.rows, cell: map.rows === panel.rows ? meta.cell : Math.ceil(meta.length / map.rows) });
  const surface = makeCanvas(parent, {
    label: "One attention head: queries downwards, keys to the right. Arrow keys step through layers and heads, Escape closes.",
    height: (width) => Math.min(width - 70, 620) + 96,
    draw(context, width, height, colours) {
      if (!map) return;
      const side = Math.min(width - 70, 620);
      box = { x: 58, y: 8, width: side, height: side };
      const own = ownMeta();
      const view = cellsOf(span(), own);
      paintCells(raster, map.cells, map.rows, view, side * (window.devicePixelRatio || 1), lutWithBlank(palette(), colours));
      raster.paint(context, box);
      const axis = linearAxis(view.from * own.cell, Math.min(view.to * own.cell, meta.length));
      drawAxes(context, box, axis, axis, { xLabel: "key", yLabel: "query", flip: true, grid: false }, colours);
      const { below, above } = meta.scale;
      drawColourBar(context, { x: box.x + side * 0.4, y: height - 30, width: side * 0.5, height: 9 }, scaleAxis(meta.scale), lutOf(palette()), meta.logits ? "logit q·k" : "probability", colours, { below, above });
    },
  });
  const { canvas } = surface;
  canvas.box = () => box; // for tests
  const under = (event) => {
    if (!map || !box) return null;
    const frame = canvas.getBoundingClientRect();
    const [x, y] = [(event.clientX - frame.left - box.x) / box.width, (event.clientY - frame.top - box.y) / box.height];
    if (x < 0 || y < 0 || x >= 1 || y >= 1) return null;
    const own = ownMeta();
    const view = cellsOf(span(), own);
    const [row, column] = [y, x].map((at) => view.from + Math.floor(at * (view.to - view.from)));
    return { own, row, column };
  };
  canvas.addEventListener("pointermove", (event) => {
    const found = under(event);
    if (!found) return tooltip.hide();
    const { own, row, column } = found;
    tooltip.show(describePair(panel, row, column, map.cells[row * map.rows + column], { ...data, meta: own }), event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", tooltip.hide);
  const tokenAt = (event) => {
    const found = under(event);
    return found && tokensOf(found.column, found.own)[0];
  };
  zoomByHand(canvas, { tokenAt, span, setSpan, length: meta.length });
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Escape") close();
    else if (steps[event.key]) step(...steps[event.key]);
    else return;
    event.preventDefault();
  });
  return {
    canvas, redraw: surface.redraw, stop: surface.stop,
    show(which, detail) {
      panel = which;
      name.textContent = `Layer ${panel.layer}, head ${panel.head}`;
      map = { cells: panel.cells, rows: panel.rows };
      status.className = "sqviz-note";
      status.textContent = `${number(100 * panel.mass)} % of the attention on the first 4 tokens · entropy ${number(panel.entropy)} nats`;
      const mine = detail?.panel && detail.panel[0] === panel.layer && detail.panel[1] === panel.head;
      if (mine && detail.error) {
        status.className = "sqviz-error";
        status.textContent = `The map token by token could not be computed: ${detail.error}`;
      } else if (mine) map = { cells: asBytes(detail.cells), rows: detail.rows };
      else if (meta.detailed) status.textContent += " · computing it token by token …";
      surface.redraw();
    },
    save,
  };
}

function render({ model, el }) {
  const root = startView(el, model);
  const data = readPanels(model);
  const { meta, panels } = data;
  const note = (text) => Object.assign(document.createElement("div"), { className: "sqviz-note", textContent: text });
  root.append(Object.assign(document.createElement("div"), { className: "sqviz-title", textContent: model.get("title") }), note(meta.note));
  const tooltip = makeTooltip(root);
  const set = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const bar = Object.assign(document.createElement("div"), { className: "sqviz-bar" });
  root.append(bar);
  const sort = addSelect(bar, "Sort by", [["layer", "layer and head"], ["sink", "attention on the first 4 tokens"]], model.get("sort"), (value) => set("sort", value));
  const palette = addSelect(bar, "Colours", [["viridis", "viridis"], ["cividis", "cividis"]], model.get("palette"), (value) => set("palette", value));
  const reset = addButton(bar, "All tokens", "Show all tokens again (double click below, or 0)", () => set("span", []));
  addButton(bar, "PNG", "Save the picture of all heads", () => savePicture(tiles.canvas, "attention"));
  const overview = document.createElement("div");
  const large = document.createElement("div");
  root.append(overview, large);
  const open = (panel) => set("opened", [panel.layer, panel.head]);
  const tiles = makePanels(overview, tooltip, data, {
    sort: () => model.get("sort"), span: () => model.get("span"), setSpan: (span) => set("span", span), palette: () => model.get("palette"), open,
  });
  const legend = makeCanvas(overview, {
    label: "Colour scale", height: 40,
    draw(context, width, height, colours) {
      const wide = Math.min(300, width - 190);
      const { below, above } = meta.scale;
      drawColourBar(context, { x: 170, y: 8, width: wide, height: 9 }, scaleAxis(meta.scale), lutOf(model.get("palette")), meta.logits ? "logit q·k, before softmax" : "probability", colours, { below, above });
    },
  });
  overview.append(note("Rows: queries, columns: keys, one scale for all heads. Click or Enter opens a head; arrow keys move. Zoom all of them: wheel (with Ctrl, or after a click), + and −, 0 for all tokens, or drag below to pick a span."));
  const profile = makeProfile(root, tooltip, data, {
    span: () => model.get("span"), setSpan: (span) => set("span", span), palette: () => model.get("palette"),
  });
  const head = openHead(large, tooltip, data, {
    palette: () => model.get("palette"),
    span: () => model.get("span"), setSpan: (span) => set("span", span),
    close: () => set("opened", []),
    step(down, right) {
      const [layer, at] = model.get("opened");
      set("opened", [(layer + down + meta.layers) % meta.layers, (at + right + meta.heads) % meta.heads]);
    },
  });
  const showOpened = () => {
    const [layer, at] = model.get("opened");
    const panel = panels.find((one) => one.layer === layer && one.head === at);
    const before = !overview.hidden;
    const focused = root.contains(root.getRootNode().activeElement);
    overview.hidden = Boolean(panel);
    large.hidden = !panel;
    if (panel) {
      head.show(panel, model.get("detail"));
      tiles.choose(panel);
      if (focused && before) head.canvas.focus({ preventScroll: true });
    } else {
      tiles.redraw();
      if (focused && !before) tiles.canvas.focus({ preventScroll: true });
    }
  };
  const redraw = () => {
    sort.value = model.get("sort");
    palette.value = model.get("palette");
    reset.disabled = model.get("span").length !== 2;
    for (const one of [tiles, legend, profile, head]) one.redraw();
  };
  const looks = ["sort", "palette", "span"];
  for (const name of looks) model.on(`change:${name}`, redraw);
  for (const name of ["opened", "detail"]) model.on(`change:${name}`, showOpened);
  showOpened();
  redraw();
  return () => {
    for (const one of [tiles, legend, profile, head]) one.stop();
    for (const name of looks) model.off(`change:${name}`, redraw);
    for (const name of ["opened", "detail"]) model.off(`change:${name}`, showOpened);
  };
}

export default { render };
