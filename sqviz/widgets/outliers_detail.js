// outliers_detail.js: one layer of OutliersView, opened: its channel maxima, its top tokens, and its heatmap if there is
// a map. Needs draw.js and heatmap_panel.js.
//
//   openDetail(parent, tooltip, group, state, {close, step}) -> {setMaps(details), focus(), stop()}
//     group  {name, title, kind, block, channels, ratio, fold, reason, smooths, top, xMax, wMax, tokenOf, tokens, median}
//     close() and step(±1) are called by the buttons and keys: back to the overview, the layer before or after

const OUTLIER_RATIO = 10; // as in outliers.py

function openDetail(parent, tooltip, group, { close, step }) {
  const panel = Object.assign(document.createElement("div"), { className: "sqviz-detail" });
  const head = Object.assign(document.createElement("div"), { className: "sqviz-wide" });
  const bar = Object.assign(document.createElement("div"), { className: "sqviz-bar" });
  addButton(bar, "← All layers", "Back to the overview (Esc)", close);
  addButton(bar, "‹", "The layer before", () => step(-1)).setAttribute("aria-label", "The layer before");
  addButton(bar, "›", "The layer after", () => step(1)).setAttribute("aria-label", "The layer after");
  bar.append(Object.assign(document.createElement("span"), { className: "sqviz-title", textContent: group.name }));
  head.append(bar, Object.assign(document.createElement("div"), { className: "sqviz-note", textContent: describeGroup(group) }));
  panel.append(head);
  parent.append(panel);
  const plot = maximaPlot(head, tooltip, group);
  const mapSpace = document.createElement("div");
  panel.append(mapSpace, tokenTable(group));
  panel.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.preventDefault();
    close();
  });
  let heatmap = null;
  let state = { operand: "x", smoothed: false, alpha: 0.5, log_colours: true, clip: false, palette: "viridis" };
  const say = (text) => mapSpace.replaceChildren(Object.assign(document.createElement("div"), { className: "sqviz-note", textContent: text }));
  return {
    focus: () => plot.canvas.focus({ preventScroll: true }),
    waiting: (text) => heatmap || say(text),
    setMaps({ meta, x_cells, w_cells }) {
      if (heatmap) return;
      const part = (key, cells) => (meta[key] && cells ? { ...meta[key], codes: asBytes(cells) } : null);
      const [x, w] = [part("x", x_cells), part("w", w_cells)];
      if (!x && !w) return say("This capture holds no map of this layer.");
      panel.classList.add("sqviz-has-map");
      mapSpace.replaceChildren();
      const { name, channels: columns, smooths, xMax, wMax, tokens } = group;
      heatmap = makeHeatmap(mapSpace, tooltip, { name, columns, smooths, x, w, xMax, wMax, tokens }, state, (changes) => {
        state = { ...state, ...changes };
        heatmap.update(state);
      });
    },
    stop() {
      plot.stop();
      heatmap?.stop();
      tooltip.hide();
      panel.remove();
    },
  };
}

function describeGroup({ xMax, median, ratio, channels, fold, reason, title }) {
  const count = xMax.reduce((sum, value) => sum + (median > 0 && value > OUTLIER_RATIO * median), 0);
  const folds = { norm: "1/s folds into the norm before it", linear: "1/s folds into the linear before it" };
  const parts = [
    title, `${channels} channels`, `largest ${number(Math.max(0, ...xMax))}`, `median ${number(median)}`, `ratio ${number(ratio)}`,
    `${count} channel${count === 1 ? "" : "s"} above ${OUTLIER_RATIO} × the median`, folds[fold] ?? `cannot be folded: ${reason}`,
  ];
  return parts.join(" · ");
}

// The text of the token that holds a channel's maximum, as far as the capture knows it.
function tokenText(group, channel) {
  const token = group.tokenOf[channel];
  if (token < 0) return "no token: this channel is dead";
  const known = group.top.find((top) => top[2] === token)?.[3] ?? (token < group.tokens.length ? group.tokens[token] : null);
  return `token ${token}${known === null ? "" : `: “${known}”`}`;
}

function maximaPlot(parent, tooltip, group) {
  const { xMax, median } = group;
  const scale = ownScale(group);
  let [box, cursor] = [null, -1];
  const draw = (context, width, height, colours) => {
    canvas.plot = box = { x: 64, y: 10, width: width - 64 - 14, height: height - 10 - 48 };
    const [x, y] = [linearAxis(0, xMax.length), logAxis(...scale)];
    drawAxes(context, box, x, y, { xLabel: "input channel", yLabel: "max |X|" }, colours);
    drawMaxima(context, box, xMax, median, y, colours, window.devicePixelRatio || 1);
    context.fillStyle = colours.dim;
    context.textAlign = "right";
    context.textBaseline = "bottom";
    if (median > 0) {
      const at = [box.x + box.width, box.y + box.height * (1 - y.at(median)) - 5];
      context.strokeStyle = colours.paper;
      context.lineWidth = 4;
      context.lineJoin = "round";
      context.strokeText("median", ...at); // a halo: the bars run behind the word
      context.fillText("median", ...at);
    }
    if (cursor >= 0) {
      context.fillStyle = colours.accent;
      context.fillRect(box.x + ((cursor + 0.5) / xMax.length) * box.width - 0.5, box.y, 1, box.height);
    }
  };
  const surface = makeCanvas(parent, { height: 210, label: `Largest input of each channel of ${group.name}. Left and right arrows move.`, draw });
  const { canvas } = surface;
  const point = (channel) => {
    cursor = channel;
    surface.redraw();
    if (channel < 0) return tooltip.hide();
    const frame = canvas.getBoundingClientRect();
    const ratio = median > 0 ? ` = ${number(xMax[channel] / median)} × median` : "";
    const lines = [`channel ${channel}: max |X| ${number(xMax[channel])}${ratio}`, tokenText(group, channel), `max |W| ${number(group.wMax[channel])}`];
    tooltip.show(lines, frame.left + box.x + ((channel + 0.5) / xMax.length) * box.width, frame.top + 30);
  };
  canvas.addEventListener("pointermove", (event) => {
    if (!box) return;
    const at = (event.clientX - canvas.getBoundingClientRect().left - box.x) / box.width;
    if (at < 0 || at >= 1) return point(-1);
    const [from, to] = [at, at + 1 / box.width].map((f) => f * xMax.length);
    let best = Math.floor(from); // the largest channel under the pointer
    for (let c = best; c < Math.min(xMax.length, Math.ceil(to)); c++) if (xMax[c] > xMax[best]) best = c;
    point(best);
  });
  for (const name of ["pointerleave", "blur"]) canvas.addEventListener(name, () => point(-1));
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !box) return;
    event.preventDefault();
    point(cursor < 0 ? xMax.indexOf(Math.max(...xMax)) : Math.min(xMax.length - 1, Math.max(0, cursor + move)));
  });
  return surface;
}

// From the power of ten below nearly all channels to the largest.
function ownScale({ xMax }) {
  const alive = xMax.filter((value) => value > 0).sort();
  if (!alive.length) return [0.1, 1];
  const low = Math.min(alive[Math.floor(alive.length * 0.02)], alive.at(-1) / 10);
  return [10 ** Math.floor(Math.log10(low)), alive.at(-1)];
}

// Bars of channel maxima, max-pooled to device pixels; outliers in the second colour, the median as a line.
function drawMaxima(context, box, maxima, median, axis, colours, ratio) {
  const pixels = Math.max(1, Math.round(box.width * ratio));
  const bottom = box.y + box.height;
  const [plain, outlying] = [new Path2D(), new Path2D()];
  const wide = Math.max(1 / ratio, box.width / Math.max(pixels, maxima.length));
  const { starts, ends } = cellSpans(0, maxima.length, Math.min(pixels, maxima.length), maxima.length);
  for (let i = 0; i < starts.length; i++) {
    let most = maxima[starts[i]];
    for (let c = starts[i] + 1; c < ends[i]; c++) if (maxima[c] > most) most = maxima[c];
    const tall = Math.min(1, Math.max(0, axis.at(most))) * box.height;
    const path = median > 0 && most > OUTLIER_RATIO * median ? outlying : plain;
    path.rect(box.x + (i / starts.length) * box.width, bottom - tall, Math.max(wide, box.width / starts.length), tall);
  }
  context.fillStyle = colours.series[0];
  context.fill(plain);
  context.fillStyle = colours.series[1];
  context.fill(outlying);
  if (median > 0) {
    context.fillStyle = colours.ink;
    context.fillRect(box.x, bottom - Math.max(0, axis.at(median)) * box.height, box.width, 1);
  }
}

function tokenTable(group) {
  const table = Object.assign(document.createElement("table"), { className: "sqviz-tokens" });
  table.createCaption().textContent = `The ${group.top.length} tokens with the largest inputs`;
  const head = table.createTHead().insertRow();
  for (const name of ["max |X|", "channel", "token", "text"]) {
    const cell = Object.assign(document.createElement("th"), { textContent: name, scope: "col" });
    if (name !== "text") cell.className = "number";
    head.append(cell);
  }
  const body = table.createTBody();
  for (const [value, channel, token, text] of group.top) {
    const row = body.insertRow();
    for (const shown of [number(value), channel, token]) Object.assign(row.insertCell(), { textContent: shown, className: "number" });
    Object.assign(row.insertCell(), { textContent: `“${text}”`, className: "text" });
  }
  return table;
}
