// attention_panels.js: all heads as small multiples on one canvas. Codes: 0 blank, 1 … 255 on the scale of meta.scale.
//
//   readPanels(model) -> {meta, panels: [{layer, head, mass, entropy, cells}], tokens, share, norms}
//   valueOf(code, scale)                          the value a code stands for
//   lutWithBlank(palette, colours) -> Uint32Array(256)
//   paintCells(raster, cells, rows, view, pixels, lut)     the part `view` of a map, pooled by maxima to `pixels` at most
//   makePanels(parent, tooltip, data, {sort, span, setSpan, palette, open}) -> {canvas, redraw, stop, choose(panel)}

const [PANEL_GAP, LAYER_LABEL, PANEL_TALL] = [3, 22, 900];

function readPanels(model) {
  const meta = model.get("meta");
  const cells = asBytes(model.get("cells"));
  const [mass, entropy] = [asFloat32(model.get("mass")), asFloat32(model.get("entropy"))];
  const size = meta.rows * meta.rows;
  const panels = Array.from({ length: meta.layers * meta.heads }, (_, i) => ({
    layer: Math.floor(i / meta.heads), head: i % meta.heads, mass: mass[i], entropy: entropy[i],
    cells: cells.subarray(i * size, (i + 1) * size), rows: meta.rows,
  }));
  return { meta, panels, tokens: model.get("tokens"), share: asFloat32(model.get("share")), norms: asFloat32(model.get("norms")) };
}

function valueOf(code, { lo, hi, log }) {
  const at = (code - 1) / 254;
  return log ? lo * (hi / lo) ** at : lo + at * (hi - lo);
}

const scaleAxis = ({ lo, hi, log }) => (log ? logAxis(lo, hi) : linearAxis(lo, hi));

function lutWithBlank(palette, colours) {
  const full = lutOf(palette);
  const lut = Uint32Array.from({ length: 256 }, (_, code) => full[Math.max(0, Math.round(((code - 1) / 254) * 255))]);
  lut[0] = colours.dark ? 0xff242424 : 0xfff4f4f4;
  return lut;
}

// view: {from, to} in cells, rows and columns alike. Returns the raster's side.
function paintCells(raster, cells, rows, { from, to }, pixels, lut) {
  const count = to - from;
  const side = Math.max(1, Math.min(count, Math.floor(pixels)));
  const image = raster.fit(side, side);
  if (side === count) {
    for (let r = 0; r < side; r++) {
      const start = (from + r) * rows + from;
      for (let c = 0; c < side; c++) image[r * side + c] = lut[cells[start + c]];
    }
    return side;
  }
  const edges = Array.from({ length: side + 1 }, (_, i) => from + Math.floor((i * count) / side));
  for (let r = 0; r < side; r++) {
    for (let c = 0; c < side; c++) {
      let most = 0;
      for (let y = edges[r]; y < edges[r + 1]; y++) {
        for (let x = edges[c], at = y * rows + x; x < edges[c + 1]; x++, at++) if (cells[at] > most) most = cells[at];
      }
      image[r * side + c] = lut[most];
    }
  }
  return side;
}

// By layer: a row per layer, a column per head, layers in several runs side by side where that makes panels larger.
// By sink mass: one after the other. {tiles: [{panel, x, y, row, column}], side, labels, height}
function layOutPanels({ meta, panels }, sort, width) {
  if (sort === "sink") {
    const side = Math.max(20, Math.min(72, Math.sqrt(((width - 8) * PANEL_TALL) / panels.length) - PANEL_GAP - 6));
    const columns = Math.max(1, Math.floor((width - 8) / (side + PANEL_GAP)));
    const order = [...panels].sort((a, b) => b.mass - a.mass);
    const tiles = order.map((panel, i) => {
      const [row, column] = [Math.floor(i / columns), i % columns];
      return { panel, row, column, x: 4 + column * (side + PANEL_GAP), y: 14 + row * (side + PANEL_GAP + 12) };
    });
    return { tiles, side, labels: [], headers: [], captions: side >= 34, height: 14 + Math.ceil(panels.length / columns) * (side + PANEL_GAP + 12) };
  }
  const sideOf = (runs) => Math.min(110, Math.floor((width - 8 - runs * LAYER_LABEL) / (runs * meta.heads)) - PANEL_GAP);
  let best = 1;
  for (let runs = 1; runs <= meta.layers; runs++) {
    const tall = Math.ceil(meta.layers / runs) * (sideOf(runs) + PANEL_GAP);
    if (sideOf(runs) < 14) break;
    best = runs;
    if (tall <= PANEL_TALL) break;
  }
  const side = Math.max(4, sideOf(best));
  const perRun = Math.ceil(meta.layers / best);
  const runWidth = LAYER_LABEL + meta.heads * (side + PANEL_GAP);
  const place = (layer, head) => [4 + Math.floor(layer / perRun) * runWidth + LAYER_LABEL + head * (side + PANEL_GAP), 16 + (layer % perRun) * (side + PANEL_GAP)];
  const tiles = panels.map((panel) => {
    const [x, y] = place(panel.layer, panel.head);
    const run = Math.floor(panel.layer / perRun);
    return { panel, x, y, row: panel.layer % perRun, column: run * meta.heads + panel.head };
  });
  const labels = Array.from({ length: meta.layers }, (_, layer) => {
    const [x, y] = place(layer, 0);
    return { text: String(layer), x: x - 4, y: y + side / 2 };
  });
  const headers = side < 26 ? [] : Array.from({ length: best * meta.heads }, (_, i) => {
    const [run, head] = [Math.floor(i / meta.heads), i % meta.heads];
    return { text: side < 44 ? String(head) : `head ${head}`, x: place(run * perRun, head)[0] + side / 2 };
  }).slice(0, Math.ceil(meta.layers / perRun) * meta.heads);
  return { tiles, side, labels, headers, captions: false, height: 20 + perRun * (side + PANEL_GAP) };
}

// The cells that a span of tokens covers; all of them without one.
function cellsOf(span, meta) {
  if (span.length !== 2) return { from: 0, to: meta.rows };
  const from = Math.floor(Math.min(...span) / meta.cell);
  return { from, to: Math.max(from + 1, Math.min(meta.rows, Math.floor(Math.max(...span) / meta.cell) + 1)) };
}

function tokensOf(cell, meta) {
  const from = cell * meta.cell;
  return [from, Math.min(from + meta.cell, meta.length) - 1];
}

function tokenName([from, to], tokens) {
  const words = tokens.slice(from, to + 1);
  const plain = words.length && words[0] === `token ${from}`; // averages have places, not words
  const range = from === to ? `${from}` : `${from}–${to}`;
  if (plain) return `token ${range}`;
  const shown = words.slice(0, 4).map((word) => `“${word}”`).join(" ");
  return `${range}: ${shown}${words.length > 4 ? " …" : ""}`;
}

function describePair(panel, row, column, code, { meta, tokens }) {
  const value = code ? `${code === 1 && meta.scale.below ? "≤ " : code === 255 && meta.scale.above ? "≥ " : "≈ "}${number(valueOf(code, meta.scale))}` : "not looked at";
  return [
    `${meta.logits ? "logit" : "probability"} ${value}`,
    `query ${tokenName(tokensOf(row, meta), tokens)}`,
    `key ${tokenName(tokensOf(column, meta), tokens)}`,
    `layer ${panel.layer} · head ${panel.head} · ${number(100 * panel.mass)} % on the first 4 tokens · entropy ${number(panel.entropy)} nats`,
  ];
}

function makePanels(parent, tooltip, data, { sort, span, setSpan, palette, open }) {
  const { meta, panels } = data;
  let [layout, chosen] = [null, null];
  const raster = makeRaster();
  const surface = makeCanvas(parent, {
    label: `${meta.layers} layers of ${meta.heads} attention heads. Arrow keys move between them, Enter opens one.`,
    height: (width) => (layout = layOutPanels(data, sort(), width)).height,
    draw(context, width, height, colours) {
      const lut = lutWithBlank(palette(), colours);
      const view = cellsOf(span(), meta);
      const ratio = window.devicePixelRatio || 1;
      context.font = `10px ${colours.font}`;
      context.fillStyle = colours.dim;
      context.textBaseline = "middle";
      context.textAlign = "right";
      for (const { text, x, y } of layout.labels) context.fillText(text, x, y);
      context.textAlign = "center";
      for (const { text, x } of layout.headers) context.fillText(text, x, 7);
      for (const { panel, x, y } of layout.tiles) {
        paintCells(raster, panel.cells, meta.rows, view, layout.side * ratio, lut);
        raster.paint(context, { x, y, width: layout.side, height: layout.side });
        if (layout.captions) {
          context.fillStyle = colours.dim;
          context.fillText(`${Math.round(100 * panel.mass)} %`, x + layout.side / 2, y - 6);
          context.textAlign = "right";
          context.fillText(`${panel.layer}·${panel.head}`, x + layout.side - 2, y + 7); // where no query looks
          context.textAlign = "center";
        }
        if (chosen === panel) {
          context.strokeStyle = colours.accent;
          context.lineWidth = 2;
          context.strokeRect(x - 1, y - 1, layout.side + 2, layout.side + 2);
        }
      }
    },
  });
  const { canvas } = surface;
  canvas.panels = () => ({ side: layout.side, view: cellsOf(span(), meta), tiles: layout.tiles.map(({ panel, x, y }) => ({ layer: panel.layer, head: panel.head, x, y })) }); // for tests
  const choose = (panel) => {
    if (panel === chosen) return;
    chosen = panel;
    surface.redraw();
  };
  const under = (event) => {
    const frame = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
    const { side } = layout ?? { side: 0 };
    const tile = layout?.tiles.find((one) => x >= one.x && x < one.x + side && y >= one.y && y < one.y + side);
    if (!tile) return null;
    const view = cellsOf(span(), meta);
    const cell = (at) => view.from + Math.min(view.to - view.from - 1, Math.floor((at / side) * (view.to - view.from)));
    return { tile, row: cell(y - tile.y), column: cell(x - tile.x) };
  };
  canvas.addEventListener("pointermove", (event) => {
    const found = under(event);
    canvas.style.cursor = found ? "pointer" : "";
    if (!found) return tooltip.hide();
    const { tile, row, column } = found;
    tooltip.show(describePair(tile.panel, row, column, tile.panel.cells[row * meta.rows + column], data), event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", tooltip.hide);
  canvas.addEventListener("blur", tooltip.hide);
  canvas.addEventListener("click", (event) => {
    const found = under(event);
    if (!found) return;
    choose(found.tile.panel);
    tooltip.hide();
    open(found.tile.panel);
  });
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Enter" && chosen) open(chosen);
    else if (steps[event.key] && layout) {
      const tile = layout.tiles.find((one) => one.panel === chosen);
      const [down, right] = steps[event.key];
      const next = tile ? layout.tiles.find((one) => one.row === tile.row + down && one.column === tile.column + right) : layout.tiles[0];
      choose((next ?? tile).panel);
    } else return;
    event.preventDefault();
  });
  const tokenAt = (event) => {
    const found = under(event);
    return found && tokensOf(found.column, meta)[0];
  };
  zoomByHand(canvas, { tokenAt, span, setSpan, length: meta.length });
  return { ...surface, choose, order: () => layOutPanels(data, sort(), surface.size().width || 900).tiles.map((tile) => tile.panel) };
}
