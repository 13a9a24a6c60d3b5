// cells.js: a heatmap of uint8 log codes [row][column] to zoom and pan, quick at 2048 × 4096 cells. Needs draw.js and
// smoothing_formula.js (decodeLog, codesPerDecade).
//
//   makeCells(parent, tooltip, {height, label, describe}) -> {canvas, set(changes), reset(), stop()}
//     canvas.plot is the box of the cells on it, canvas.view() the rows and columns shown: for tests and benchmarks
//     set: codes, rows, columns, range [lo, hi]   the cells; range in log10
//          shifts      Float32Array [column] or null: log10 factor by which a column is scaled (-log10 s for X/s)
//          limits      [smallest, largest] value of the colour scale
//          log, map    logarithmic colours?, "viridis" | "cividis"
//          xLabel, yLabel, barLabel, rowUnits  (what one row covers, in y units: 2 when pooled from two tokens)
//     describe({row, column, value, error, count}) -> lines of the tooltip; count cells lie under the pointer, the largest
//     of them is described.
//
// How it is quick: scaling a column keeps the order along rows, so rows are max-pooled once, into halvings ("levels").
// A frame reads the level with one to two rows per pixel, shifts each code by its column, max-pools columns into pixels
// and looks the colour up: work in proportion to columns × pixel rows, not to cells. Maxima, so no outlier is lost.

const FINE = 8; // shifted codes are integers in eighths of a code
const NOTHING = -0x100000; // added where the code is zero: far below every shifted code

// Maxima without a branch: magnitudes are noise to a branch predictor, and a wrong guess costs ten times the comparison.
// Integers a, b: a - ((a - b) & ((a - b) >> 31)) is the larger.
function rowLevels(codes, rows, columns) {
  const levels = [{ codes, rows }];
  while (levels.at(-1).rows > 64) {
    const { codes: from, rows: count } = levels.at(-1);
    const half = Math.ceil(count / 2);
    const pooled = new Uint8Array(half * columns);
    for (let r = 0; r < half; r++) {
      const [a, b] = [2 * r * columns, Math.min(2 * r + 1, count - 1) * columns];
      for (let c = 0, o = r * columns; c < columns; c++, o++) {
        const one = from[a + c], other = from[b + c];
        pooled[o] = one - ((one - other) & ((one - other) >> 31));
      }
    }
    levels.push({ codes: pooled, rows: half });
  }
  return levels;
}

// Colours for shifted codes base..base+length-1: one lookup per pixel whatever the scale is.
function colourTable(range, limits, log, lut) {
  const axis = log ? logAxis(...limits) : linearAxis(0, limits[1]);
  const unit = codesPerDecade(range) * FINE;
  const codeOfValue = (value) => FINE + (Math.log10(value) - range[0]) * unit;
  const base = Math.floor(codeOfValue(limits[0]));
  const length = Math.max(2, Math.ceil(codeOfValue(limits[1])) - base + 1);
  const colours = Uint32Array.from({ length }, (_, i) => {
    const value = 10 ** (range[0] + (base + i - FINE) / unit);
    return lut[Math.max(0, Math.min(255, Math.round(axis.at(value) * 255)))];
  });
  return { base, colours };
}

// The cells under each of `pixels` pixels of the span first..last, as [start, end) pairs; at least one cell each.
function cellSpans(first, last, pixels, limit) {
  const [starts, ends] = [new Int32Array(pixels), new Int32Array(pixels)];
  const step = (last - first) / pixels;
  for (let i = 0; i < pixels; i++) {
    starts[i] = Math.min(limit - 1, Math.max(0, Math.floor(first + i * step + 1e-6)));
    ends[i] = Math.min(limit, Math.max(starts[i] + 1, Math.ceil(first + (i + 1) * step - 1e-6)));
  }
  return { starts, ends };
}

// The rows of a view, max-pooled to one line per pixel row: uint8 [height][column]. Kept until the rows shown change, so
// that a frame of dragging α, hovering or panning sideways starts here.
function poolLines(source, view, height, kept) {
  const { columns, levels } = source;
  const key = `${view.r0} ${view.r1} ${height}`;
  if (kept.levels === levels && kept.key === key) return kept.lines;
  const k = Math.min(levels.length - 1, Math.max(0, Math.floor(Math.log2(Math.max(1, (view.r1 - view.r0) / height)))));
  const { codes, rows } = levels[k];
  const { starts, ends } = cellSpans(view.r0 / 2 ** k, view.r1 / 2 ** k, height, rows);
  const lines = kept.lines?.length === height * columns ? kept.lines : new Uint8Array(height * columns);
  for (let y = 0, o = 0; y < height; y++, o += columns) {
    const [first, last] = [starts[y] * columns, (ends[y] - 1) * columns];
    if (y && starts[y] === starts[y - 1] && ends[y] === ends[y - 1]) lines.copyWithin(o, o - columns, o);
    else if (first === last) lines.set(codes.subarray(first, first + columns), o);
    else {
      const middle = first + columns < last ? first + columns : last; // at most three rows fall into one line
      for (let c = 0; c < columns; c++) {
        const a = codes[first + c], b = codes[middle + c], d = codes[last + c];
        const ab = a - ((a - b) & ((a - b) >> 31));
        lines[o + c] = ab - ((ab - d) & ((ab - d) >> 31));
      }
    }
  }
  Object.assign(kept, { levels, key, lines });
  return lines;
}

function paintView(source, view, width, height, table, pixels, kept) {
  const { columns, fineShifts: shifts } = source;
  const lines = poolLines(source, view, height, kept);
  const { starts, ends } = cellSpans(view.c0, view.c1, width, columns);
  const [from, to] = [starts[0], ends[width - 1]];
  const line = new Int32Array(columns);
  const { base, colours } = table;
  const last = colours.length - 1;
  for (let y = 0, o = 0; y < height; y++, o += width) {
    const first = y * columns;
    for (let c = from; c < to; c++) {
      const code = lines[first + c];
      line[c] = code * FINE + shifts[c] + ((code - 1) & NOTHING); // zero stays below everything
    }
    for (let x = 0; x < width; x++) {
      let c = starts[x];
      let most = line[c];
      for (const stop = ends[x]; ++c < stop; ) most -= (most - line[c]) & ((most - line[c]) >> 31);
      const at = most - base;
      pixels[o + x] = colours[at < 0 ? 0 : at > last ? last : at];
    }
  }
}

// The largest cell of those under a point: {row, column, value, count}.
function largestCell(source, view, fx, fy, width, height) {
  const span = (first, last, pixels, at, limit) => {
    const step = (last - first) / pixels;
    const start = Math.min(limit - 1, Math.max(0, Math.floor(first + Math.floor(at * pixels) * step + 1e-6)));
    return [start, Math.min(limit, Math.max(start + 1, Math.ceil(first + (Math.floor(at * pixels) + 1) * step - 1e-6)))];
  };
  const [r0, r1] = span(view.r0, view.r1, height, fy, source.rows);
  const [c0, c1] = span(view.c0, view.c1, width, fx, source.columns);
  let best = { row: r0, column: c0, value: -1 };
  for (let row = r0; row < r1; row++) {
    for (let column = c0; column < c1; column++) {
      const value = decodeLog(source.codes[row * source.columns + column], source.range) * 10 ** (source.shifts?.[column] ?? 0);
      if (value > best.value) best = { row, column, value };
    }
  }
  return { ...best, count: (r1 - r0) * (c1 - c0) };
}

function makeCells(parent, tooltip, { height, label, describe }) {
  const source = { rows: 1, columns: 1, codes: new Uint8Array(1), range: [0, 1], shifts: null, limits: [1, 10], log: true, map: "viridis" };
  Object.assign(source, { levels: rowLevels(source.codes, 1, 1), fineShifts: new Int32Array(1), rowUnits: 1 });
  let [view, cross, box, lut, table] = [{ r0: 0, r1: 1, c0: 0, c1: 1 }, null, null, null, null];
  const [raster, kept] = [makeRaster(), {}];
  let painted = ""; // what the raster holds; moving the cross repaints only the cross

  const draw = (context, width, tall, colours) => {
    canvas.plot = box = { x: 64, y: 8, width: width - 64 - 14, height: tall - 8 - 84 };
    const ratio = box.width * box.height * (window.devicePixelRatio || 1) ** 2 > 1.2e6 ? 1 : window.devicePixelRatio || 1;
    const [w, h] = [Math.max(1, Math.round(box.width * ratio)), Math.max(1, Math.round(box.height * ratio))];
    lut ??= lutOf(source.map);
    if (!table) painted = "";
    table ??= colourTable(source.range, source.limits, source.log, lut);
    const wanted = [w, h, view.r0, view.r1, view.c0, view.c1].join();
    if (painted !== wanted) paintView(source, view, w, h, table, raster.fit(w, h), kept);
    painted = wanted;
    raster.paint(context, box);
    const x = linearAxis(view.c0, view.c1);
    const y = linearAxis(view.r0 * source.rowUnits, view.r1 * source.rowUnits);
    drawAxes(context, box, x, y, { xLabel: source.xLabel, yLabel: source.yLabel, flip: true, grid: false }, colours);
    const bar = { x: Math.min(170, width * 0.38), y: tall - 30, width: width - Math.min(170, width * 0.38) - 30, height: 10 };
    const axis = source.log ? logAxis(...source.limits) : linearAxis(0, source.limits[1]);
    drawColourBar(context, bar, axis, lut, source.barLabel ?? "", colours, source.clipped ?? {});
    if (cross) drawCross(context, box, cross, colours);
  };
  const surface = makeCanvas(parent, { height, label, draw });
  const { canvas } = surface;

  const show = () => {
    const [w, h] = [Math.round(box.width), Math.round(box.height)];
    const found = largestCell(source, view, Math.min(cross.fx, 0.999999), Math.min(cross.fy, 0.999999), w, h);
    const frame = canvas.getBoundingClientRect();
    const lines = describe({ ...found, error: codeError(source.range) });
    tooltip.show(lines, frame.left + box.x + cross.fx * box.width, frame.top + box.y + cross.fy * box.height);
    surface.redraw();
  };
  const changeView = (next) => {
    view = keepInside(next, source);
    surface.redraw();
    if (cross && box) show();
  };
  const reset = () => changeView({ r0: 0, r1: source.rows, c0: 0, c1: source.columns });
  moveByHand(canvas, {
    box: () => box, view: () => view, reset, changeView, cross: () => cross,
    point(fx, fy) {
      cross = fx === null ? null : { fx, fy };
      if (cross) return show();
      tooltip.hide();
      surface.redraw();
    },
  });

  const set = (changes) => {
    Object.assign(source, changes);
    if (changes.codes) {
      source.levels = rowLevels(source.codes, source.rows, source.columns);
      view = { r0: 0, r1: source.rows, c0: 0, c1: source.columns };
    }
    if ("shifts" in changes || changes.codes || changes.range) {
      const unit = codesPerDecade(source.range) * FINE;
      source.fineShifts = Int32Array.from({ length: source.columns }, (_, c) => Math.round((source.shifts?.[c] ?? 0) * unit));
    }
    if (changes.map) lut = null;
    table = null;
    surface.redraw();
    if (cross && box) show();
  };
  canvas.view = () => ({ ...view });
  return { canvas, set, reset, stop: surface.stop };
}

function drawCross(context, box, cross, colours) {
  const [x, y] = [Math.round(box.x + cross.fx * box.width) + 0.5, Math.round(box.y + cross.fy * box.height) + 0.5];
  const lines = new Path2D(`M${x} ${box.y}V${box.y + box.height}M${box.x} ${y}H${box.x + box.width}`);
  context.lineWidth = 3;
  context.strokeStyle = "rgb(0 0 0 / 0.45)";
  context.stroke(lines);
  context.lineWidth = 1;
  context.strokeStyle = "#fff";
  context.stroke(lines);
  context.fillStyle = colours.ink;
}

// Keep a view within the cells, at least two cells wide and high, without changing its size where that can be helped.
function keepInside(view, { rows, columns }) {
  const fit = (from, to, limit) => {
    const size = Math.min(limit, Math.max(Math.min(2, limit), to - from));
    const start = Math.min(limit - size, Math.max(0, from));
    return [start, start + size];
  };
  const [r0, r1] = fit(view.r0, view.r1, rows);
  const [c0, c1] = fit(view.c0, view.c1, columns);
  return { r0, r1, c0, c1 };
}

// Pointer, wheel and keys. The wheel zooms once the heatmap has the focus (a click), or with Ctrl: else the page scrolls.
function moveByHand(canvas, { box, view, reset, changeView, cross, point }) {
  const place = (event) => {
    const frame = canvas.getBoundingClientRect();
    const area = box();
    return [(event.clientX - frame.left - area.x) / area.width, (event.clientY - frame.top - area.y) / area.height];
  };
  const zoom = (factor, fx, fy) => {
    const { r0, r1, c0, c1 } = view();
    const [row, column] = [r0 + fy * (r1 - r0), c0 + fx * (c1 - c0)];
    const about = (at, from, to) => [at - (at - from) * factor, at + (to - at) * factor];
    const [[nr0, nr1], [nc0, nc1]] = [about(row, r0, r1), about(column, c0, c1)];
    changeView({ r0: nr0, r1: nr1, c0: nc0, c1: nc1 });
  };
  const pan = (dx, dy, start = view()) => {
    const [height, width] = [start.r1 - start.r0, start.c1 - start.c0];
    changeView({ r0: start.r0 - dy * height, r1: start.r1 - dy * height, c0: start.c0 - dx * width, c1: start.c1 - dx * width });
  };
  let drag = null;
  canvas.addEventListener("pointerdown", (event) => {
    if (!box() || event.button) return;
    const [fx, fy] = place(event);
    drag = { fx, fy, view: view() };
    canvas.setPointerCapture(event.pointerId);
    canvas.focus({ preventScroll: true });
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!box()) return;
    const [fx, fy] = place(event);
    if (drag) pan(fx - drag.fx, fy - drag.fy, drag.view);
    if (fx >= 0 && fx <= 1 && fy >= 0 && fy <= 1) point(fx, fy);
    else point(null);
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (drag = null));
  canvas.addEventListener("pointerleave", () => drag || point(null));
  canvas.addEventListener("blur", () => point(null));
  canvas.addEventListener("dblclick", reset);
  canvas.addEventListener("wheel", (event) => {
    if (!box() || !(event.ctrlKey || event.metaKey || canvas.matches(":focus"))) return;
    event.preventDefault();
    const [fx, fy] = place(event);
    zoom(2 ** Math.max(-1, Math.min(1, event.deltaY / 200)), Math.min(1, Math.max(0, fx)), Math.min(1, Math.max(0, fy)));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    if (!box()) return;
    const at = cross() ?? { fx: 0.5, fy: 0.5 };
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (arrows[event.key] && event.shiftKey) pan(-0.1 * arrows[event.key][0], -0.1 * arrows[event.key][1]);
    else if (arrows[event.key]) {
      const { r0, r1, c0, c1 } = view();
      const [stepX, stepY] = [Math.max(1 / box().width, 1 / (c1 - c0)), Math.max(1 / box().height, 1 / (r1 - r0))];
      const move = (value, step) => Math.min(1, Math.max(0, value + step));
      point(move(at.fx, arrows[event.key][0] * stepX), move(at.fy, arrows[event.key][1] * stepY));
    } else if (event.key === "+" || event.key === "=") zoom(0.7, at.fx, at.fy);
    else if (event.key === "-") zoom(1 / 0.7, at.fx, at.fy);
    else if (event.key === "0" || event.key === "Home") reset();
    else if (event.key === "Escape") point(null);
    else return;
    event.preventDefault();
  });
}
