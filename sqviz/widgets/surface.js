// surface.js: SurfaceView. |X| and |W| before and after smoothing as four surfaces in one plotly figure, the heatmap below.
// The figure's layout comes from Python (plots/surface.py); the heights are computed here from the heatmap's codes, so
// that α works without a kernel. plotly.js is in the head of an exported page; live, the kernel sends it once per window.

const SURFACE_STATE = ["operand", "smoothed", "alpha", "log_colours", "clip", "palette"];
const HEIGHTS = [["own", "each its own"], ["same", "before and after alike"], ["log", "logarithmic"]];
const NARROW = 640;

function loadPlotly(model) {
  const ready = () => parseInt(window.Plotly?.version ?? "0", 10) >= 3;
  if (ready()) return Promise.resolve(window.Plotly);
  return new Promise((done, fail) => {
    const take = (message, buffers) => {
      if (message.plotly !== true) return;
      model.off("msg:custom", take);
      if (ready()) return done(window.Plotly); // another view was quicker
      const script = document.createElement("script");
      script.src = URL.createObjectURL(new Blob([buffers[0]], { type: "text/javascript" }));
      script.onload = () => done(window.Plotly);
      script.onerror = () => fail(new Error("plotly.js came from the kernel but did not load"));
      document.head.append(script);
    };
    model.on("msg:custom", take);
    model.send({ need: "plotly" });
  });
}

// Where at most `limit` blocks over `size` cells begin, with the end added; the twin of plots/pool.py `block_starts`.
function blockStarts(size, limit) {
  const count = Math.min(size, limit);
  return Array.from({ length: count + 1 }, (_, i) => (i === count ? size : Math.floor((i * size) / count)));
}

// Heights [row][column] of codes, scaled by column, max-pooled to rows × columns at most: no outlier is lost.
function poolHeights({ codes, rows, range }, columns, shifts, limits) {
  const [down, across] = [blockStarts(rows, limits[0]), blockStarts(columns, limits[1])];
  const line = new Float32Array(columns);
  const factor = Float32Array.from({ length: columns }, (_, c) => 10 ** (shifts ? shifts[c] : 0));
  const value = Float32Array.from({ length: 256 }, (_, code) => decodeLog(code, range));
  return down.slice(0, -1).map((start, r) => {
    line.fill(0);
    for (let row = start; row < down[r + 1]; row++) {
      for (let c = 0, i = row * columns; c < columns; c++, i++) if (codes[i] > line[c]) line[c] = codes[i];
    }
    return Float32Array.from(across.slice(0, -1), (first, b) => {
      let most = 0;
      for (let c = first; c < across[b + 1]; c++) most = Math.max(most, value[line[c]] * factor[c]);
      return most;
    });
  });
}

// Colours 0..255 on a log scale from the 1st percentile to the maximum; the twin of plots/surface.py `log_levels`.
function logLevels(heights) {
  const alive = Float32Array.from(heights.flatMap((row) => Array.from(row).filter((value) => value > 0))).sort();
  if (!alive.length) return heights.map((row) => row.map(() => 0));
  const [lo, hi] = [Math.log10(alive[Math.floor(alive.length * 0.01)]), Math.log10(alive.at(-1))];
  return heights.map((row) => row.map((value) => Math.min(255, Math.max(0, ((Math.log10(value) - lo) / Math.max(hi - lo, 1e-6)) * 255))));
}

function surfaceModel(model) {
  const meta = model.get("meta");
  const part = (key) => ({ ...meta[key], codes: asBytes(model.get(`${key}_cells`)) });
  const data = {
    name: meta.name, smooths: meta.smooths, columns: meta.columns, tokens: model.get("tokens"), x: part("x"), w: part("w"),
    xMax: asFloat32(model.get("x_max")), wMax: asFloat32(model.get("w_max")),
  };
  const peaks = { x: asFloat32(model.get("x_peak")), w: asFloat32(model.get("w_peak")) };
  const [xLog, wLog] = [logs(data.xMax), logs(data.wMax)];
  const panel = (which, alpha) => {
    const smoothed = alpha !== null;
    const sign = which === "x" ? -1 : 1;
    const shifts = smoothed ? Float32Array.from(smoothingScale(xLog, wLog, alpha), (s) => sign * Math.log10(s)) : null;
    let peak = 0; // exact, from the columns' maxima
    peaks[which].forEach((value, c) => (peak = Math.max(peak, value * (shifts ? 10 ** shifts[c] : 1))));
    const z = poolHeights(data[which], data.columns, shifts, meta.limits);
    const symbol = operandSymbol(which, smoothed);
    const title = `<b>${symbol} ${smoothed ? `at α = ${number(alpha)}` : "as it is"}: up to ${number(peak)}</b>`;
    return { z, surfacecolor: logLevels(z), peak, symbol, title };
  };
  const plain = [panel("x", null), panel("w", null)];
  let [last, made] = [null, plain]; // asked again for the same α, the same arrays: nothing is drawn twice
  const panels = (alpha) => {
    if (data.smooths && alpha !== last) [last, made] = [alpha, [...plain, panel("x", alpha), panel("w", alpha)]];
    return made;
  };
  return { data, panels };
}

const sceneKey = (i) => (i ? `scene${i + 1}` : "scene");

function surfaceLayout(width, panels, heights, colours, title) {
  const narrow = width < NARROW;
  const columns = narrow ? 1 : 2;
  const rows = Math.ceil(panels.length / columns);
  const changes = { height: 44 + 370 * rows, "margin.t": narrow ? 60 : 44, "font.color": colours.ink, "title.font.size": narrow ? 12 : 15 };
  changes["title.text"] = narrow ? title.replace(" before", "<br>before") : title;
  panels.forEach(({ symbol, title: text }, i) => {
    const [left, top] = [(i % columns) / columns, 1 - Math.floor(i / columns) / rows];
    const [key, log] = [sceneKey(i), heights === "log"];
    changes[`${key}.zaxis.title.text`] = narrow ? "" : symbol; // the heading says it; beside the axis it would be cut off
    changes[`${key}.domain`] = { x: [left, left + 1 / columns - 0.01], y: [top - 1 / rows, top - 0.06 / rows] };
    Object.assign(changes, { [`${key}.zaxis.type`]: log ? "log" : "linear", [`${key}.zaxis.dtick`]: log ? 1 : null });
    if (heights === "same") changes[`${key}.zaxis.range`] = [0, Math.max(...panels.filter((_, j) => j % 2 === i % 2).map((p) => p.peak))];
    else changes[`${key}.zaxis.autorange`] = true;
    for (const axis of ["xaxis", "yaxis", "zaxis"]) {
      Object.assign(changes, { [`${key}.${axis}.color`]: colours.dim, [`${key}.${axis}.gridcolor`]: colours.grid });
    }
    Object.assign(changes, {
      [`annotations[${i}].text`]: text, [`annotations[${i}].x`]: left + 0.49 / columns, [`annotations[${i}].y`]: top,
      [`annotations[${i}].font.color`]: colours.ink,
    });
  });
  return changes;
}

// Write changes such as {"scene.zaxis.type": "log"} into a layout, as Plotly.relayout would.
function applyChanges(layout, changes) {
  for (const [path, value] of Object.entries(changes)) {
    const steps = path.match(/[^.[\]]+/g);
    const last = steps.pop();
    let at = layout;
    for (const step of steps) at = at[step] ??= {};
    at[last] = value;
  }
  return layout;
}

function makeSurfaces(parent, Plotly, figure, title, first) {
  const space = Object.assign(document.createElement("div"), { className: "sqviz-surfaces", tabIndex: 0 });
  space.setAttribute("role", "img");
  space.setAttribute("aria-label", `${title}. Arrow keys turn the surfaces.`);
  parent.append(space);
  let [want, busy, width, shown] = [null, false, 0, []];
  const applied = new Map(); // what the layout was last told, so that only news is told
  const eye = { ...figure.layout.scene.camera.eye };
  const cameras = () => Object.fromEntries(shown.map((_, i) => [`${sceneKey(i)}.camera.eye`, scaled(eye, width < NARROW ? 1.3 : 1)]));
  const news = ({ panels, heights }) => {
    const colours = themeOf(space);
    const grid = colours.dark ? "#5a5a5a" : "#b8b8b8";
    const turned = !width || width < NARROW !== space.clientWidth < NARROW; // narrow: step back, so that the labels fit
    width = space.clientWidth;
    const changes = surfaceLayout(width, panels, heights, { ...colours, grid }, title);
    space.style.height = `${changes.height}px`;
    for (const [key, value] of Object.entries(changes)) {
      if (applied.get(key) === JSON.stringify(value)) delete changes[key];
      else applied.set(key, JSON.stringify(value));
    }
    const changed = panels.flatMap((panel, i) => (panel === shown[i] ? [] : [i])); // dragging α: the lower two only
    shown = panels;
    return { changed, changes: turned ? { ...changes, ...cameras() } : changes };
  };
  const draw = async () => {
    if (busy || !space.isConnected || !space.clientWidth) return;
    busy = true;
    while (want) {
      const { panels } = want;
      const { changed, changes } = news(want);
      want = null;
      const traces = { z: changed.map((i) => panels[i].z), surfacecolor: changed.map((i) => panels[i].surfacecolor) };
      if (changed.length) await Plotly.update(space, traces, changes, changed);
      else if (Object.keys(changes).length) await Plotly.relayout(space, changes);
    }
    busy = false;
    space.dataset.drawn = Number(space.dataset.drawn ?? 0) + 1;
  };
  const heights = figure.data.map((trace, i) => ({ ...trace, z: first.panels[i].z, surfacecolor: first.panels[i].surfacecolor }));
  const layout = applyChanges({ ...figure.layout, updatemenus: [], autosize: true }, news(first).changes);
  const started = Plotly.newPlot(space, heights, layout, { displaylogo: false, responsive: true });
  started.then(draw);
  const update = (next) => {
    want = next;
    started.then(draw);
  };
  const turn = (angle, tilt) => {
    const cos = Math.cos(angle), sin = Math.sin(angle);
    const scale = Math.hypot(eye.x, eye.y);
    Object.assign(eye, { x: eye.x * cos - eye.y * sin, y: eye.x * sin + eye.y * cos, z: Math.min(2 * scale, Math.max(0, eye.z + tilt)) });
    started.then(() => Plotly.relayout(space, cameras()));
  };
  space.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-0.15, 0], ArrowRight: [0.15, 0], ArrowUp: [0, 0.15], ArrowDown: [0, -0.15] };
    if (!moves[event.key] || event.target !== space) return;
    event.preventDefault();
    turn(...moves[event.key]);
  });
  return { update, space, stop: () => Plotly.purge(space) };
}

const scaled = ({ x, y, z }, factor) => ({ x: x * factor, y: y * factor, z: z * factor });

async function render({ model, el }) {
  const title = model.get("title");
  const root = startView(el, model);
  const tooltip = makeTooltip(root);
  const bar = Object.assign(document.createElement("div"), { className: "sqviz-bar" });
  root.append(bar);
  const set = (changes) => {
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    model.save_changes();
  };
  const { data, panels } = surfaceModel(model);
  const slider = data.smooths ? alphaField(bar, model.get("alpha"), (alpha) => set({ alpha, smoothed: true })) : null;
  const heights = addSelect(bar, "Height scale", HEIGHTS, model.get("heights"), (value) => set({ heights: value }));
  const hint = "Drag to turn, wheel to zoom; colours are logarithmic. Hover for values.";
  bar.append(Object.assign(document.createElement("span"), { className: "sqviz-note", textContent: hint }));
  const space = document.createElement("div");
  space.append(Object.assign(document.createElement("div"), { className: "sqviz-note", textContent: "Waiting for plotly.js from the kernel…" }));
  const below = document.createElement("details");
  below.append(Object.assign(document.createElement("summary"), { textContent: "The same as a heatmap: every token, every channel" }));
  root.append(space, below);

  const read = () => Object.fromEntries(SURFACE_STATE.map((name) => [name, model.get(name)]));
  const want = () => ({ panels: panels(model.get("alpha")), heights: model.get("heights") });
  let [surfaces, heatmap, stopped] = [null, null, false];
  below.addEventListener("toggle", () => {
    if (below.open) heatmap ??= makeHeatmap(below, tooltip, data, read(), set);
  });
  const update = () => {
    slider?.update(model.get("alpha"));
    heights.value = model.get("heights");
    heatmap?.update(read());
    surfaces?.update(want());
  };
  for (const name of [...SURFACE_STATE, "heights"]) model.on(`change:${name}`, update);
  const stopTheme = onTheme(root, update);
  const resized = new ResizeObserver(() => surfaces?.update(want()));
  loadPlotly(model).then((Plotly) => {
    if (stopped) return;
    space.replaceChildren();
    surfaces = makeSurfaces(space, Plotly, model.get("figure_json"), title, want());
    resized.observe(space);
  }, (error) => space.replaceChildren(Object.assign(document.createElement("div"), { className: "sqviz-error", textContent: error.message })));
  return () => {
    stopped = true;
    for (const name of [...SURFACE_STATE, "heights"]) model.off(`change:${name}`, update);
    stopTheme();
    resized.disconnect();
    surfaces?.stop();
    heatmap?.stop();
  };
}

export default { render };
