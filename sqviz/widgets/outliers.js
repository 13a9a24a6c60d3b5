// outliers.js: OutliersView. All layers as tiles on one canvas; a tile opens into outliers_detail.js.

const SORTS = [["layer", "layer"], ["absmax", "largest input"], ["ratio", "outlier ratio"], ["name", "name"]];
const [GAP, LABEL] = [8, 14]; // room between tiles, height of a tile's label
const tileHeight = (rows) => Math.round(Math.min(70, Math.max(30, 420 / rows - LABEL - GAP))); // few layers: higher bars

function readGroups(model) {
  const meta = model.get("meta");
  const [xMax, wMax] = [asFloat32(model.get("x_max")), asFloat32(model.get("w_max"))];
  const owner = asBytes(model.get("channel_token")).slice();
  const tokenOf = new Int32Array(owner.buffer);
  let at = 0;
  return meta.groups.map((group) => {
    const slice = (all) => all.subarray(at, at + group.channels);
    const own = { ...group, xMax: slice(xMax), wMax: slice(wMax), tokenOf: slice(tokenOf), tokens: model.get("tokens"), scale: meta.scale };
    const sorted = own.xMax.slice().sort();
    own.median = sorted[Math.floor((sorted.length - 1) / 2)]; // torch's median: the lower of the two
    own.absmax = sorted.at(-1);
    at += group.channels;
    return own;
  });
}

// Which tile goes where. By layer: a row per block, a column per kind, blocks in several runs side by side when there is
// room; sorted otherwise, or with little room: one after the other. {tiles: [{group, x, y, width, row, column}], headers, height, columns}
function layOut(groups, sort, width) {
  const kinds = [...new Set(groups.map((group) => group.kind))];
  const blocks = [...new Set(groups.map((group) => group.block))].sort((a, b) => a - b);
  if (sort === "layer" && (width - 46) / kinds.length > 60) {
    const runs = Math.max(1, Math.min(Math.floor((width - 20) / (kinds.length * 96 + 30)), Math.ceil(blocks.length / 4)));
    const perRun = Math.ceil(blocks.length / runs);
    const tall = tileHeight(perRun);
    const step = tall + LABEL + GAP;
    const runWidth = (width - 16) / runs;
    const tileWidth = (runWidth - 30) / kinds.length;
    const tiles = groups.map((group) => {
      const [at, kind] = [blocks.indexOf(group.block), kinds.indexOf(group.kind)];
      const run = Math.floor(at / perRun);
      return { group, x: 8 + run * runWidth + 26 + kind * tileWidth, y: 22 + (at % perRun) * step, width: tileWidth - 8,
        tall, row: at % perRun, column: run * kinds.length + kind, label: "" };
    });
    const headers = [];
    for (let run = 0; run < runs; run++) {
      kinds.forEach((kind, i) => headers.push({ text: kind, x: 8 + run * runWidth + 26 + i * tileWidth, width: tileWidth - 8 }));
    }
    const numbers = blocks.map((block, at) => {
      const middle = 22 + (at % perRun) * step + LABEL + tall / 2;
      return { text: block, x: 8 + Math.floor(at / perRun) * runWidth + 20, y: middle };
    });
    return { tiles, headers, numbers, height: 26 + perRun * step };
  }
  const order = {
    absmax: (a, b) => b.absmax - a.absmax,
    ratio: (a, b) => b.ratio - a.ratio,
    name: (a, b) => a.name.localeCompare(b.name, "en", { numeric: true }),
  };
  const columns = Math.max(1, Math.floor((width - 8) / 165));
  const tileWidth = (width - 16) / columns;
  const tall = tileHeight(Math.ceil(groups.length / columns));
  const step = tall + LABEL + GAP;
  const tiles = (sort === "layer" ? groups : [...groups].sort(order[sort])).map((group, i) => ({
    group, x: 8 + (i % columns) * tileWidth, y: 4 + Math.floor(i / columns) * step, width: tileWidth - 8, tall,
    row: Math.floor(i / columns), column: i % columns, label: `${group.block} · `,
  }));
  return { tiles, headers: [], numbers: [], height: 8 + Math.ceil(groups.length / columns) * step };
}

// A kind of input, as much of it as fits: whole, without its first part, then without "_proj" too; else its end.
function fitKind(context, kind, width) {
  const inner = kind.slice(kind.indexOf(".") + 1);
  const found = [kind, inner, inner.replace(/_proj$/, "")].find((text) => context.measureText(text).width <= width);
  if (found) return found;
  let from = 1;
  while (from < inner.length && context.measureText(`…${inner.slice(from)}`).width > width) from++;
  return `…${inner.slice(from)}`;
}

function drawOverview(context, { tiles, headers, numbers }, scale, chosen, colours) {
  const axis = logAxis(...scale);
  const ratio = window.devicePixelRatio || 1;
  context.font = `11px ${colours.font}`;
  context.textBaseline = "middle";
  context.fillStyle = colours.dim;
  context.textAlign = "left";
  for (const { text, x, width } of headers) context.fillText(fitKind(context, text, width), x, 11);
  context.textAlign = "right";
  for (const { text, x, y } of numbers) context.fillText(text, x, y);
  for (const tile of tiles) {
    const { group, x, y, width, tall, label } = tile;
    const box = { x, y: y + LABEL, width, height: tall };
    context.fillStyle = colours.faint;
    context.fillRect(x, box.y + tall, width, 1);
    drawMaxima(context, box, group.xMax, group.median, axis, colours, ratio);
    context.font = `10px ${colours.font}`;
    const plain = number(group.absmax);
    const long = `${plain} · ${number(Math.round(group.ratio))}×`;
    const value = group.ratio >= OUTLIER_RATIO && context.measureText(long).width <= width ? long : plain;
    context.textAlign = "right";
    context.fillStyle = group.ratio >= OUTLIER_RATIO ? colours.series[1] : colours.dim;
    context.fillText(value, x + width, y + LABEL / 2);
    if (label) {
      const room = width - context.measureText(value).width - 6;
      context.textAlign = "left";
      context.fillStyle = colours.dim;
      const start = context.measureText(label).width;
      context.fillText(label, x, y + LABEL / 2);
      context.fillText(fitKind(context, group.kind, room - start), x + start, y + LABEL / 2);
    }
    if (tile === chosen) {
      context.strokeStyle = colours.accent;
      context.lineWidth = 2;
      context.strokeRect(x - 3, y - 1, width + 6, LABEL + tall + 4);
    }
  }
}

function makeOverview(parent, tooltip, groups, scale, { sort, open }) {
  let [layout, chosen] = [null, null];
  const surface = makeCanvas(parent, {
    label: `${groups.length} layers. Arrow keys move between them, Enter opens one.`,
    height: (width) => (layout = layOut(groups, sort(), width)).height,
    draw(context, width, height, colours) {
      if (chosen) chosen = layout.tiles.find((tile) => tile.group === chosen.group);
      drawOverview(context, layout, scale, chosen, colours);
    },
  });
  const { canvas } = surface;
  canvas.tiles = () => layout.tiles.map(({ group, x, y, width }) => ({ name: group.name, x, y, width })); // for tests
  const choose = (tile) => {
    if (tile === chosen) return;
    chosen = tile;
    surface.redraw();
  };
  const explain = (tile, clientX, clientY, channel) => {
    const { group } = tile;
    const lines = [group.title, `largest ${number(group.absmax)} · median ${number(group.median)} · ratio ${number(group.ratio)}`];
    if (group.top.length) lines.push(`top token “${group.top[0][3]}” (channel ${group.top[0][1]})`);
    if (channel >= 0) lines.splice(1, 0, `channel ${channel}: max |X| ${number(group.xMax[channel])}, ${tokenText(group, channel)}`);
    tooltip.show(lines, clientX, clientY);
  };
  const under = (event) => {
    const frame = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
    const tile = layout?.tiles.find((t) => x >= t.x && x <= t.x + t.width && y >= t.y && y <= t.y + LABEL + t.tall + 2);
    return { tile, x };
  };
  canvas.addEventListener("pointermove", (event) => {
    const { tile, x } = under(event);
    canvas.style.cursor = tile ? "pointer" : "";
    if (!tile) return tooltip.hide();
    const { xMax } = tile.group;
    const each = xMax.length / tile.width; // channels per pixel; the largest of those under the pointer is meant
    const from = Math.min(xMax.length - 1, Math.max(0, Math.floor((x - tile.x - 1) * each)));
    let best = from;
    for (let c = from; c < Math.min(xMax.length, Math.ceil((x - tile.x + 2) * each)); c++) if (xMax[c] > xMax[best]) best = c;
    explain(tile, event.clientX, event.clientY, best);
  });
  canvas.addEventListener("pointerleave", tooltip.hide);
  canvas.addEventListener("blur", tooltip.hide);
  canvas.addEventListener("click", (event) => {
    const { tile } = under(event);
    if (!tile) return;
    choose(tile);
    open(tile.group);
  });
  canvas.addEventListener("keydown", (event) => {
    if (!layout) return;
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Enter" && chosen) open(chosen.group);
    else if (steps[event.key]) {
      const [down, right] = steps[event.key];
      const next = chosen ? nearestTile(layout.tiles, chosen, down, right) : layout.tiles[0];
      choose(next ?? chosen);
      const frame = canvas.getBoundingClientRect();
      explain(chosen, frame.left + chosen.x, frame.top + chosen.y + LABEL + chosen.tall, -1);
    } else return;
    event.preventDefault();
  });
  return { ...surface, choose: (group) => choose(layout?.tiles.find((tile) => tile.group === group) ?? null) };
}

function nearestTile(tiles, { row, column }, down, right) {
  const ahead = tiles.filter((t) =>
    down ? Math.sign(t.row - row) === down && t.column === column : t.row === row && Math.sign(t.column - column) === right);
  const away = (tile) => Math.abs(tile.row - row) + Math.abs(tile.column - column);
  return ahead.sort((a, b) => away(a) - away(b))[0];
}

function render({ model, el }) {
  const root = startView(el, model);
  const meta = model.get("meta");
  const groups = readGroups(model);
  const note = (text) => Object.assign(document.createElement("div"), { className: "sqviz-note", textContent: text });
  root.append(Object.assign(document.createElement("div"), { className: "sqviz-title", textContent: model.get("title") }), note(meta.note));
  const tooltip = makeTooltip(root);
  const overview = document.createElement("div");
  root.append(overview);
  const bar = Object.assign(document.createElement("div"), { className: "sqviz-bar" });
  overview.append(bar);
  const set = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const select = addSelect(bar, "Sort by", SORTS, model.get("sort"), (value) => set("sort", value));
  const open = (group) => set("opened", group.name);
  const [lo, hi] = meta.scale.map(number);
  overview.append(note(`Each tile: max |X| of every channel, log scale ${lo} to ${hi} for all; line: median; ` +
    `second colour: above ${OUTLIER_RATIO} × the median. Click or Enter opens.`));
  const tiles = makeOverview(overview, tooltip, groups, meta.scale, { sort: () => model.get("sort"), open });
  addButton(bar, "PNG", "Save the picture", () => savePicture(tiles.canvas, "outliers"));

  let [detail, shown] = [null, ""];
  const supply = () => {
    const maps = model.get("details")[shown];
    if (maps) detail?.setMaps(maps);
    else detail?.waiting(hasKernel(model) ? "Asking the kernel for the map…" : "The map of this layer is not in this page; the live view has it.");
  };
  const showOpened = () => {
    const group = groups.find((one) => one.name === model.get("opened"));
    if ((group?.name ?? "") === shown) return;
    const before = groups.find((one) => one.name === shown);
    const hadFocus = root.contains(root.getRootNode().activeElement);
    detail?.stop();
    [detail, shown] = [null, group?.name ?? ""];
    overview.hidden = Boolean(group);
    if (!group) {
      tiles.choose(before);
      tiles.redraw();
      if (hadFocus) tiles.canvas.focus({ preventScroll: true });
      return;
    }
    const order = layOut(groups, model.get("sort"), 900).tiles.map((tile) => tile.group);
    const step = (by) => open(order[(order.indexOf(group) + by + order.length) % order.length]);
    detail = openDetail(root, tooltip, group, { close: () => set("opened", ""), step });
    if (!group.map) detail.waiting("This capture holds no map of this layer: only its maxima.");
    else supply();
    if (hadFocus) detail.focus();
    root.scrollIntoView({ block: "nearest" });
  };
  const resort = () => {
    select.value = model.get("sort");
    tiles.redraw();
  };
  model.on("change:sort", resort);
  model.on("change:opened", showOpened);
  model.on("change:details", supply);
  showOpened();
  return () => {
    tiles.stop();
    detail?.stop();
    model.off("change:sort", resort);
    model.off("change:opened", showOpened);
    model.off("change:details", supply);
  };
}

export default { render };
