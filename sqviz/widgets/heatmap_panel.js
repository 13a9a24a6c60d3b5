// heatmap_panel.js: |X| or |W| of one linear as cells, with its controls; used by heatmap.js and by outliers.js.
// Needs draw.js, smoothing_formula.js, cells.js.
//
//   makeHeatmap(parent, tooltip, data, state, changed) -> {update(state), cells, stop()}
//     data   {name, columns, smooths, x, w, xMax, wMax, tokens}; x and w: {codes, rows, range, units, total} or null;
//            units: tokens (outputs) per row, total: tokens (outputs) in all; xMax, wMax: Float32Array [column]
//     state  {operand "x"|"w", smoothed, alpha, log_colours, clip, palette}
//     changed(changes)  called with what the user has changed; answer by update()
//
// Smoothing happens here: s(α) from the two vectors of maxima, then a shift of every column's codes (contract: the page
// computes what it can). The colour scale is that of the unsmoothed values, widened where smoothing exceeds it, so that
// before and after can be compared by colour.

function makeHeatmap(parent, tooltip, data, state, changed) {
  const bar = Object.assign(document.createElement("div"), { className: "sqviz-bar" });
  parent.append(bar);
  const controls = heatmapControls(bar, data, state, changed);
  const [xLog, wLog] = [logs(data.xMax), logs(data.wMax)];
  const spread = { x: data.x && codeSpread(data.x), w: data.w && codeSpread(data.w) };
  const describe = (cell) => describeCell(cell, data, state);
  const cells = makeCells(parent, tooltip, { height: (width) => Math.max(280, Math.min(520, width * 0.5)), label: "", describe });
  controls.onReset(cells.reset);
  controls.onSave(() => savePicture(cells.canvas, `${data.name}.${state.operand}`));
  let shown = null; // the operand whose codes the cells hold

  const update = (next) => {
    state = { ...state, ...next };
    if (!data[state.operand]) state.operand = data.x ? "x" : "w";
    const { operand } = state;
    const part = data[operand];
    const sign = operand === "x" ? -1 : 1;
    const s = smoothingScale(xLog, wLog, state.alpha);
    const shifts = state.smoothed && data.smooths ? Float32Array.from(s, (value) => sign * Math.log10(value)) : null;
    const symbol = operandSymbol(operand, shifts);
    const scale = colourScale(part.range, spread[operand], operand === "x" ? data.xMax : data.wMax, shifts, state);
    const changes = { shifts, ...scale, log: state.log_colours, map: state.palette, barLabel: symbol, rowUnits: part.units };
    if (operand !== shown) Object.assign(changes, { codes: part.codes, rows: part.rows, columns: data.columns, range: part.range });
    changes.xLabel = "input channel";
    changes.yLabel = operand === "x" ? "token" : "output feature";
    shown = operand;
    cells.set(changes);
    cells.canvas.setAttribute("aria-label", `${symbol} of ${data.name}: ${part.rows} rows by ${data.columns} channels. ` +
      "Arrow keys move the cross, plus and minus zoom, shift and arrows pan, 0 resets.");
    controls.update(state);
  };
  update(state);
  return { update, cells, stop: cells.stop };
}

const operandSymbol = (operand, smoothed) => (operand === "x" ? (smoothed ? "|X| / s" : "|X|") : smoothed ? "s · |W|" : "|W|");

// The codes at the 1st percentile, the 99.9th, and both ends, of the cells that are not zero.
function codeSpread({ codes }) {
  const counts = new Uint32Array(256);
  for (let i = 0; i < codes.length; i++) counts[codes[i]]++;
  const total = codes.length - counts[0];
  const at = (share) => {
    let seen = 0;
    for (let code = 1; code < 256; code++) if ((seen += counts[code]) >= Math.max(1, share * total)) return code;
    return 1;
  };
  return { least: at(0), low: at(0.01), high: at(0.999), most: at(1) };
}

function colourScale(range, { least, low, high, most }, maxima, shifts, { clip, log_colours }) {
  const top = (code) => decodeLog(code, range);
  let peak = 0; // the largest value there is now, exactly: from the maxima of the columns
  for (let c = 0; c < maxima.length; c++) peak = Math.max(peak, maxima[c] * (shifts ? 10 ** shifts[c] : 1));
  const full = Math.max(top(most), shifts ? peak : 0);
  const limit = clip ? top(high) : full;
  const start = Math.min(top(low), limit / 10);
  return { limits: [start, limit], clipped: { below: log_colours && least < low, above: clip && full > limit * 1.001 } };
}

function describeCell({ row, column, value, error, count }, data, { operand, smoothed }) {
  const part = data[operand];
  const [from, to] = [row * part.units, Math.min((row + 1) * part.units, part.total) - 1].map((v) => Math.floor(v + 1e-6));
  const range = to > from ? `${from}–${to}` : `${from}`;
  const lines = [`${operandSymbol(operand, smoothed)} ${value > 0 ? `≈ ${number(value)} ± ${(error * 100).toFixed(1)} %` : "= 0"}`];
  const most = operand === "x" ? data.xMax[column] : data.wMax[column];
  lines.push(`channel ${column} (its max ${operandSymbol(operand, false)}: ${number(most)})`);
  if (operand === "x") {
    const words = data.tokens.slice(from, to + 1).map((text) => `“${text}”`).join(" ");
    lines.push(`token ${range}${words ? `: ${words}` : ""}`);
  } else lines.push(`output feature ${range}`);
  if (to > from) lines.push(`a row is the maximum over ${part.units} ${operand === "x" ? "tokens" : "features"}`);
  if (count > 1) lines.push(`largest of the ${count} cells under the pointer; zoom in for each`);
  return lines;
}

function heatmapControls(bar, data, state, changed) {
  const operands = [["x", "|X|", "Input activations, token × channel"], ["w", "|W|", "Weights, output feature × input channel"]]
    .filter(([key]) => data[key])
    .map(([key, text, title]) => [key, addButton(bar, text, title, () => changed({ operand: key }))]);
  let [smooth, slider] = [null, null];
  if (data.smooths) {
    smooth = addToggle(bar, "Smooth", "Divide X and multiply W by s(α), channel by channel", state.smoothed, (on) => changed({ smoothed: on }));
    slider = alphaField(bar, state.alpha, (alpha) => changed({ alpha, smoothed: true }));
  }
  const log = addToggle(bar, "Log colours", "Logarithmic or linear colour scale", state.log_colours, (on) => changed({ log_colours: on }));
  const clip = addToggle(bar, "Clip at 99.9 %", "End the colour scale at the 99.9th percentile", state.clip, (on) => changed({ clip: on }));
  const palette = addSelect(bar, "Colours", [["viridis", "viridis"], ["cividis", "cividis"]], state.palette, (value) => changed({ palette: value }));
  let [resetView, save] = [() => {}, () => {}];
  addButton(bar, "Reset view", "Show everything again (double click, or 0)", () => resetView());
  addButton(bar, "PNG", "Save the picture", () => save());
  return {
    onReset: (call) => (resetView = call),
    onSave: (call) => (save = call),
    update(now) {
      for (const [key, button] of operands) button.setAttribute("aria-pressed", key === now.operand);
      for (const [button, on] of [[smooth, now.smoothed], [log, now.log_colours], [clip, now.clip]]) button?.setAttribute("aria-pressed", on);
      slider?.update(now.alpha);
      palette.value = now.palette;
    },
  };
}

// A slider for α from 0 to 1, with its value beside it. {update(alpha)}
function alphaField(bar, alpha, onChange) {
  const field = Object.assign(document.createElement("label"), { className: "sqviz-field", textContent: "α" });
  const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: 1, step: 0.01, value: alpha });
  slider.setAttribute("aria-label", "Migration strength α");
  slider.addEventListener("input", () => onChange(Number(slider.value)));
  const shown = document.createElement("output");
  field.append(slider, shown);
  bar.append(field);
  const update = (value) => {
    if (Number(slider.value) !== value) slider.value = value;
    shown.textContent = value.toFixed(2);
  };
  update(alpha);
  return { update };
}
