// alpha_map.js: AlphaMapView. α of every group of linears on one canvas, a row per kind and a column per block; above it
// the candidates of the search. Needs draw.js.

const [ROW, TOP, RIGHT] = [30, 6, 10];
const ALPHA_HINT = "Hover over a cell, or move with the arrow keys (Home, End: first, last block), for its α and name.";

// A kind of linear, as much of it as fits: whole, or without its first part, or cut at its front.
function fitLabel(context, text, width) {
  const inner = text.slice(text.indexOf(".") + 1);
  const found = [text, inner].find((one) => context.measureText(one).width <= width);
  if (found) return found;
  let from = 1;
  while (from < inner.length && context.measureText(`…${inner.slice(from)}`).width > width) from++;
  return `…${inner.slice(from)}`;
}

// Slanted lines: no strength at all.
function hatch(context, { x, y, width, height }, colours) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.strokeStyle = colours.dim;
  context.lineWidth = 0.8;
  context.beginPath();
  for (let at = 5; at < width + height; at += 5) {
    context.moveTo(x + at - height, y + height);
    context.lineTo(x + at, y);
  }
  context.stroke();
  context.strokeStyle = colours.faint;
  context.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
  context.restore();
}

const shortAlpha = (alpha) => alpha.toFixed(2).replace(/^0(?=\.)/, "").replace(/\.?0+$/, "") || "0";

function drawAlphaMap(context, width, { kinds, blocks, cells }, lut, chosen, colours) {
  const left = Math.round(Math.min(150, width * 0.24));
  const each = (width - left - RIGHT) / blocks.length;
  const tiles = cells.map((cell) => ({
    ...cell, x: left + each * cell.column, y: TOP + ROW * cell.row, width: Math.max(1, each - (each > 5 ? 1.5 : 0)), height: ROW - 2,
  }));
  context.font = `11px ${colours.font}`;
  context.textBaseline = "middle";
  context.textAlign = "right";
  context.fillStyle = colours.dim;
  kinds.forEach((kind, row) => context.fillText(fitLabel(context, kind, left - 12), left - 7, TOP + ROW * row + ROW / 2));
  for (const tile of tiles) {
    if (tile.alpha === null) {
      hatch(context, tile, colours);
      continue;
    }
    const pixel = lut[Math.round(255 * tile.alpha)];
    const [red, green, blue] = [pixel & 255, (pixel >> 8) & 255, (pixel >> 16) & 255];
    context.fillStyle = `rgb(${red} ${green} ${blue})`;
    context.fillRect(tile.x, tile.y, tile.width, tile.height);
    context.font = `10px ${colours.font}`;
    const text = shortAlpha(tile.alpha);
    if (context.measureText(text).width > tile.width - 3) continue;
    context.textAlign = "center";
    context.fillStyle = 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#1b1b1b" : "#fff";
    context.fillText(text, tile.x + tile.width / 2, tile.y + tile.height / 2);
  }
  const bottom = TOP + ROW * kinds.length;
  context.font = `11px ${colours.font}`;
  context.fillStyle = colours.dim;
  context.textAlign = "center";
  context.textBaseline = "top";
  const every = Math.max(1, Math.ceil(26 / each));
  blocks.forEach((block, column) => column % every || context.fillText(block, left + each * (column + 0.5), bottom + 4));
  context.fillText("block", left + (width - left - RIGHT) / 2, bottom + 20);
  const marked = tiles.find((tile) => tile.name === chosen);
  if (marked) {
    context.strokeStyle = colours.paper;
    context.lineWidth = 4;
    context.strokeRect(marked.x - 1, marked.y - 1, marked.width + 2, marked.height + 2);
    context.strokeStyle = colours.accent;
    context.lineWidth = 2;
    context.strokeRect(marked.x - 1, marked.y - 1, marked.width + 2, marked.height + 2);
  }
  drawLegend(context, width, left, bottom + 44, lut, colours);
  return tiles;
}

function drawLegend(context, width, left, y, lut, colours) {
  const room = width - left - RIGHT;
  const bar = { x: left + 4, y, width: Math.min(200, room * 0.5), height: 10 };
  drawColourBar(context, bar, linearAxis(0, 1), lut, "α", colours);
  const box = { x: bar.x + bar.width + 26, y: y - 2, width: 22, height: 14 };
  hatch(context, box, colours);
  context.fillStyle = colours.dim;
  context.textAlign = "left";
  context.textBaseline = "middle";
  context.fillText("not smoothed", box.x + 28, y + 5);
}

function triedTable(tried) {
  const make = (tag, text, className = "") => Object.assign(document.createElement(tag), { textContent: text, className });
  const [searched, noise] = ["searched", "noise"].map((what) => tried.some((one) => one[what] !== null));
  const figure = (value) => make("td", value === null ? "" : number(value), "number");
  const table = make("table", "", "am-tried");
  const heads = ["candidate", "KL held, nats per token", ...(noise ? ["± to flat α"] : []), ...(searched ? ["KL searched, nats per token"] : []), ""];
  const head = table.createTHead().insertRow();
  for (const text of heads) head.append(Object.assign(make("th", text, /^(KL|±)/.test(text) ? "number" : ""), { scope: "col" }));
  const body = table.createTBody();
  for (const one of tried) {
    const row = body.insertRow();
    row.className = one.kept ? "am-kept" : "";
    row.append(make("td", one.name), figure(one.divergence));
    if (noise) row.append(figure(one.noise));
    if (searched) row.append(figure(one.searched));
    row.append(make("td", one.kept ? "★ kept" : ""));
  }
  return table;
}

// Pointer and keys: `choose(tile)` marks a cell and says what it is, `choose(null)` nothing.
function moveOverMap(canvas, tiles, chosen, choose) {
  const under = (event) => {
    const frame = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
    return tiles().find((t) => x >= t.x && x < t.x + t.width + 1.5 && y >= t.y && y < t.y + t.height + 2) ?? null;
  };
  canvas.addEventListener("pointermove", (event) => choose(under(event)));
  canvas.addEventListener("pointerdown", (event) => choose(under(event)));
  canvas.addEventListener("pointerleave", () => choose(null));
  canvas.addEventListener("blur", () => choose(null));
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const now = tiles().find((tile) => tile.name === chosen());
    if (event.key === "Escape") choose(null);
    else if (steps[event.key] || event.key === "Home" || event.key === "End") {
      choose(now ? nextTile(tiles(), now, event.key, steps[event.key]) : tiles()[0]);
    } else return;
    event.preventDefault();
  });
}

// The next cell in a direction, over what a block does not have; the last one stays.
function nextTile(tiles, now, key, step) {
  const row = tiles.filter((tile) => tile.row === now.row).sort((a, b) => a.column - b.column);
  if (!step) return key === "Home" ? row[0] : row.at(-1);
  const [down, right] = step;
  const ahead = tiles.filter((tile) =>
    down ? tile.column === now.column && Math.sign(tile.row - now.row) === down : tile.row === now.row && Math.sign(tile.column - now.column) === right);
  const away = (tile) => Math.abs(tile.row - now.row) + Math.abs(tile.column - now.column);
  return ahead.sort((a, b) => away(a) - away(b))[0] ?? now;
}

function render({ model, el }) {
  const root = startView(el, model);
  const meta = model.get("meta");
  const add = (className, textContent) => root.append(Object.assign(document.createElement("div"), { className, textContent }));
  add("sqviz-title", model.get("title"));
  add("sqviz-note", meta.note);
  if (meta.tried.length) {
    add("sqviz-note", "Candidates, on segments that no search has seen. A search is kept if it is ahead of the best flat α by two standard errors.");
    root.append(triedTable(meta.tried));
  }
  const tooltip = makeTooltip(root);
  let [tiles, chosen] = [[], null];
  const surface = makeCanvas(root, {
    label: `α of ${meta.cells.length} inputs: ${meta.kinds.length} kinds by ${meta.blocks.length} blocks. ${ALPHA_HINT}`,
    height: TOP + ROW * meta.kinds.length + 76,
    draw(context, width, height, colours) {
      tiles = drawAlphaMap(context, width, meta, lutOf(model.get("palette")), chosen, colours);
    },
  });
  const { canvas } = surface;
  canvas.tiles = () => tiles; // for tests
  const choose = (tile) => {
    if ((tile?.name ?? null) !== chosen) {
      chosen = tile?.name ?? null;
      surface.redraw();
    }
    if (!tile) return tooltip.hide();
    const frame = canvas.getBoundingClientRect();
    const strength = tile.alpha === null ? "not smoothed" : `α = ${tile.alpha}`;
    const lines = [strength, tile.name, `block ${meta.blocks[tile.column]} · ${meta.kinds[tile.row]}`];
    tooltip.show(lines, frame.left + tile.x + tile.width / 2, frame.top + tile.y + tile.height / 2);
  };
  moveOverMap(canvas, () => tiles, () => chosen, choose);
  const bar = Object.assign(document.createElement("div"), { className: "sqviz-bar" });
  root.append(bar);
  const palettes = [["viridis", "viridis"], ["cividis", "cividis"]];
  const select = addSelect(bar, "Colours", palettes, model.get("palette"), (value) => {
    model.set("palette", value);
    model.save_changes();
  });
  addButton(bar, "PNG", "Save the picture", () => savePicture(canvas, "alpha"));
  add("sqviz-note", ALPHA_HINT);
  const repaint = () => {
    select.value = model.get("palette");
    surface.redraw();
  };
  model.on("change:palette", repaint);
  return () => {
    surface.stop();
    model.off("change:palette", repaint);
  };
}

export default { render };
