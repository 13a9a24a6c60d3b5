// draw.js: what every sqviz view draws with. Joined in front of a view's own file into one module (see view.py), so these
// are plain functions: nothing is imported, nothing exported. Lengths are CSS pixels; colours come from the theme.
//
//   startView(el, model, title) -> root      the <div class="sqviz"> a view fills; keeps its keys from the notebook, and says
//                                            so when the kernel has gone
//   hasKernel(model)                         false in an exported page
//   makeCanvas(parent, {height, label, draw}) -> {canvas, redraw(), redrawSoon(), size(), stop()}
//        draw(context, width, height, colours) runs at most once a frame: after redraw(), a resize or a theme switch.
//        redrawSoon() draws right after the input event, while the browser waits for its next frame, and once at most
//        until then.
//        height: number, or function of the width. Sharp at any devicePixelRatio; refits down to 320 px.
//        canvas.paints counts the frames, canvas.paintMilliseconds is what the last draw took: for tests and benchmarks.
//   themeOf(el) -> {ink, dim, faint, paper, accent, warn, series[6], dark, font}     onTheme(el, callback) -> stop()
//   linearAxis(lo, hi), logAxis(lo, hi) -> {lo, hi, log, at(value) -> 0..1, from(0..1) -> value, ticks(count)}
//   drawAxes(context, box, x, y, {xLabel, yLabel, flip, grid}, colours) -> {px(value), py(value)}     box: {x, y, width, height}
//   drawColourBar(context, box, axis, lut, label, colours, {below, above})   a horizontal bar; marks clipped ends
//   lutOf("viridis" | "cividis") -> Uint32Array(256), as canvas pixels
//   makeRaster() -> {fit(width, height) -> Uint32Array, paint(context, box)}  pixels to be coloured, then stretched on a box
//   asBytes(view), asFloat32(view)           what a Bytes trait holds: uint8, little-endian float32
//   codeError([lo, hi])                      relative half step of log codes; decoding them: smoothing_formula.js
//   makeTooltip(root) -> {show(lines, x, y), hide()}       x, y in client coordinates; first line bold
//   addButton(bar, text, title, onClick), addToggle(bar, text, title, on, onChange), addSelect(bar, label, options, value, onChange)
//   savePicture(canvas, name)                downloads the canvas as a PNG
//   number(value) -> "12.3"                  three significant digits, the twin of still.py `number`

function startView(el, model, title = model.get("title")) {
  const root = document.createElement("div");
  root.className = "sqviz";
  root.setAttribute("role", "group");
  if (title) root.setAttribute("aria-label", title);
  // A key that a view has used (preventDefault) must not also move the notebook's cells, nor a letter typed here add or
  // delete one. Shift+Enter, Ctrl+S and the like stay the notebook's.
  root.addEventListener("keydown", (event) => {
    const letter = event.key.length === 1 && !event.ctrlKey && !event.metaKey && !event.altKey;
    if (event.defaultPrevented || letter) event.stopPropagation();
  });
  el.append(root);
  watchKernel(model, root);
  return root;
}

// The event says that the connection has come or gone, not which; a message can only come from a kernel that is there.
function watchKernel(model, root) {
  let alive = true;
  const gone = Object.assign(document.createElement("div"), { className: "sqviz-error", hidden: true });
  gone.textContent = "The kernel that computes this view has ended or was restarted. Run the cell again.";
  gone.setAttribute("role", "alert");
  root.append(gone);
  model.on("comm_live_update", () => (gone.hidden = alive = !alive));
  model.on("msg:custom", () => (gone.hidden = alive = true));
}

const hasKernel = (model) => model.kernel !== false;

// ---- theme -----------------------------------------------------------------------------------------------------------

function themeOf(el) {
  const style = getComputedStyle(el.closest(".sqviz") ?? el);
  const read = (name) => style.getPropertyValue(`--sq-${name}`).trim();
  return {
    ink: read("ink"), dim: read("dim"), faint: read("faint"), paper: read("paper"), accent: read("accent"), warn: read("warn"),
    series: [1, 2, 3, 4, 5, 6].map((i) => read(`series-${i}`)),
    dark: isDark(read("paper")),
    font: style.fontFamily || "sans-serif",
  };
}

function isDark(colour) {
  const probe = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
  probe.fillStyle = colour;
  probe.fillRect(0, 0, 1, 1);
  const [red, green, blue] = probe.getImageData(0, 0, 1, 1).data;
  return 0.299 * red + 0.587 * green + 0.114 * blue < 128;
}

function onTheme(el, callback) {
  // JupyterLab swaps a style sheet, other front ends an attribute; the sheet may arrive after the attribute.
  let timers = [];
  const changed = () => {
    timers.forEach(clearTimeout);
    timers = [0, 150, 600].map((milliseconds) => setTimeout(callback, milliseconds));
  };
  const observer = new MutationObserver(changed);
  const attributeFilter = ["data-jp-theme-light", "data-jp-theme-name", "data-theme", "data-vscode-theme-kind", "class", "theme"];
  for (const node of [document.documentElement, document.body]) observer.observe(node, { attributes: true, attributeFilter });
  const query = matchMedia("(prefers-color-scheme: dark)");
  query.addEventListener("change", changed);
  return () => {
    observer.disconnect();
    query.removeEventListener("change", changed);
    timers.forEach(clearTimeout);
  };
}

// ---- canvas ----------------------------------------------------------------------------------------------------------

function makeCanvas(parent, { height, label = "", draw }) {
  const frame = document.createElement("div");
  frame.className = "sqviz-canvas";
  const canvas = document.createElement("canvas");
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  frame.append(canvas);
  parent.append(frame);
  const context = canvas.getContext("2d");
  let [width, tall, waiting, drawn, colours, fitted] = [0, 0, 0, 0, null, 0];

  const paint = () => {
    waiting = 0;
    width = Math.floor(fitted || frame.clientWidth); // to ask for clientWidth at every frame costs a layout of the page
    if (!width || !frame.isConnected) return;
    tall = Math.round(typeof height === "function" ? height(width) : height);
    const ratio = window.devicePixelRatio || 1;
    const [deviceWidth, deviceHeight] = [Math.round(width * ratio), Math.round(tall * ratio)];
    if (canvas.width !== deviceWidth || canvas.height !== deviceHeight) {
      Object.assign(canvas, { width: deviceWidth, height: deviceHeight });
      Object.assign(canvas.style, { width: `${width}px`, height: `${tall}px` });
      frame.style.height = `${tall}px`;
    }
    colours ??= themeOf(frame);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.globalAlpha = 1;
    context.fillStyle = colours.paper;
    context.fillRect(0, 0, width, tall);
    const start = performance.now();
    draw(context, width, tall, colours);
    canvas.paints = (canvas.paints ?? 0) + 1;
    canvas.paintMilliseconds = performance.now() - start;
  };
  const redraw = () => (waiting ||= requestAnimationFrame(paint));
  const soon = new MessageChannel(); // its messages come before timers
  soon.port1.onmessage = () => {
    if (!waiting || drawn) return;
    cancelAnimationFrame(waiting);
    drawn = requestAnimationFrame(() => (drawn = 0));
    paint();
  };
  const redrawSoon = () => {
    redraw();
    soon.port2.postMessage(0);
  };
  const resized = new ResizeObserver((entries) => {
    fitted = entries[entries.length - 1].contentRect.width;
    redraw();
  });
  resized.observe(frame);
  const stopTheme = onTheme(frame, () => {
    colours = null;
    redraw();
  });
  const stop = () => {
    resized.disconnect();
    stopTheme();
    cancelAnimationFrame(waiting);
    soon.port1.close();
  };
  return { canvas, redraw, redrawSoon, stop, size: () => ({ width, height: tall }) };
}

function makeRaster() {
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d");
  let image = null;
  return {
    fit(width, height) {
      if (!image || image.width !== width || image.height !== height) {
        Object.assign(canvas, { width, height });
        image = context.createImageData(width, height);
      }
      return new Uint32Array(image.data.buffer);
    },
    paint(target, box) {
      context.putImageData(image, 0, 0);
      target.imageSmoothingEnabled = false;
      target.drawImage(canvas, box.x, box.y, box.width, box.height);
    },
  };
}

// Ten anchors of each map, as in plotly.colors.sequential and in still.py; interpolated to 256.
const COLOUR_MAPS = {
  viridis: "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725",
  cividis: "00224e 123570 3b496c 575d6d 707173 8a8678 a59c74 c3b369 e1cc55 fee838",
};

function lutOf(name) {
  const anchors = COLOUR_MAPS[name].split(" ").map((code) => [0, 2, 4].map((i) => parseInt(code.slice(i, i + 2), 16)));
  return Uint32Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (anchors.length - 1);
    const left = Math.min(Math.floor(at), anchors.length - 2);
    const [red, green, blue] = [0, 1, 2].map((k) => Math.round(anchors[left][k] + (anchors[left + 1][k] - anchors[left][k]) * (at - left)));
    return (0xff000000 | (blue << 16) | (green << 8) | red) >>> 0; // little-endian RGBA
  });
}

// ---- numbers ---------------------------------------------------------------------------------------------------------

const asBytes = (view) => (view ? new Uint8Array(view.buffer, view.byteOffset, view.byteLength) : new Uint8Array(0));
const asFloat32 = (view) =>
  view ? new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength)) : new Float32Array(0);
const codeError = ([lo, hi]) => 10 ** ((hi - lo) / 508) - 1;

function number(value) {
  if (!Number.isFinite(value)) return String(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) {
    const [mantissa, exponent] = value.toExponential(2).split("e");
    return `${mantissa.replace(/\.?0+$/, "")}e${Number(exponent)}`;
  }
  const text = value.toFixed(Math.max(0, 2 - Math.floor(Math.log10(size))));
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

function linearAxis(lo, hi) {
  const span = hi - lo || 1;
  return {
    lo, hi, log: false,
    at: (value) => (value - lo) / span,
    from: (fraction) => lo + fraction * span,
    ticks(count) {
      const rough = Math.abs(span) / Math.max(count, 1);
      const power = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
      const found = [];
      for (let i = Math.ceil(lo / step - 1e-9); i <= hi / step + 1e-9; i++) found.push(i * step);
      return found;
    },
  };
}

function logAxis(lo, hi) {
  const [first, last] = [Math.log10(lo), Math.log10(hi)];
  const span = last - first || 1;
  return {
    lo, hi, log: true,
    at: (value) => (Math.log10(Math.max(value, 1e-30)) - first) / span,
    from: (fraction) => 10 ** (first + fraction * span),
    ticks(count) {
      const [from, to] = [Math.ceil(first - 1e-9), Math.floor(last + 1e-9)];
      if (to - from < 2) {
        const inside = [];
        for (let e = from - 1; e <= to; e++) inside.push(...[1, 2, 5].map((m) => m * 10 ** e).filter((v) => v >= lo * (1 - 1e-9) && v <= hi * (1 + 1e-9)));
        if (inside.length > Math.max(count, 2) && to > from) return [10 ** from, 10 ** to];
        return inside.length > 2 ? inside : linearAxis(lo, hi).ticks(count).filter((value) => value > 0);
      }
      const step = Math.max(1, Math.ceil((to - from) / Math.max(count, 1)));
      const found = [];
      for (let e = from; e <= to; e += step) found.push(10 ** e);
      return found;
    },
  };
}

// ---- axes ------------------------------------------------------------------------------------------------------------

function drawAxes(context, box, x, y, { xLabel = "", yLabel = "", flip = false, grid = true } = {}, colours) {
  const px = (value) => box.x + box.width * x.at(value);
  const py = (value) => box.y + box.height * (flip ? y.at(value) : 1 - y.at(value));
  const bottom = box.y + box.height;
  const segment = (x0, y0, x1, y1, colour) => {
    context.strokeStyle = colour;
    context.beginPath();
    context.moveTo(Math.round(x0) + 0.5, Math.round(y0) + 0.5);
    context.lineTo(Math.round(x1) + 0.5, Math.round(y1) + 0.5);
    context.stroke();
  };
  context.font = `11px ${colours.font}`;
  context.lineWidth = 1;
  context.fillStyle = colours.dim;
  context.textBaseline = "top";
  context.textAlign = "center";
  for (const tick of x.ticks(box.width / 80)) {
    segment(px(tick), bottom, px(tick), bottom + 4, colours.dim);
    context.fillText(number(tick), px(tick), bottom + 7);
  }
  context.textBaseline = "middle";
  context.textAlign = "right";
  for (const tick of y.ticks(box.height / 45)) {
    if (grid) segment(box.x, py(tick), box.x + box.width, py(tick), colours.faint);
    context.fillText(number(tick), box.x - 6, py(tick));
  }
  segment(box.x, box.y, box.x, bottom, colours.dim);
  segment(box.x, bottom, box.x + box.width, bottom, colours.dim);
  context.textAlign = "center";
  context.fillText(xLabel, box.x + box.width / 2, bottom + 28);
  if (yLabel) {
    context.save();
    context.translate(box.x - 44, box.y + box.height / 2);
    context.rotate(-Math.PI / 2);
    context.fillText(yLabel, 0, 0);
    context.restore();
  }
  return { px, py };
}

function drawColourBar(context, box, axis, lut, label, colours, { below = false, above = false } = {}) {
  const raster = makeRaster();
  raster.fit(256, 1).set(lut);
  raster.paint(context, box);
  context.font = `11px ${colours.font}`;
  context.fillStyle = colours.dim;
  context.strokeStyle = colours.dim;
  context.textBaseline = "top";
  context.textAlign = "center";
  for (const tick of axis.ticks(box.width / 60)) {
    const at = box.x + box.width * axis.at(tick);
    context.fillRect(Math.round(at), box.y + box.height, 1, 3);
    context.fillText(number(tick), at, box.y + box.height + 5);
  }
  context.textBaseline = "middle";
  context.textAlign = "right";
  context.fillText(label, box.x - (below ? 18 : 8), box.y + box.height / 2);
  const triangle = (at, way, pixel) => {
    context.fillStyle = `rgb(${pixel & 255} ${(pixel >> 8) & 255} ${(pixel >> 16) & 255})`;
    context.beginPath();
    context.moveTo(at, box.y);
    context.lineTo(at + way * 8, box.y + box.height / 2);
    context.lineTo(at, box.y + box.height);
    context.fill();
    context.stroke();
  };
  if (below) triangle(box.x - 2, -1, lut[0]);
  if (above) triangle(box.x + box.width + 2, 1, lut[255]);
}

// ---- tooltip and controls --------------------------------------------------------------------------------------------

function makeTooltip(root) {
  const box = document.createElement("div");
  box.className = "sqviz-tip";
  box.setAttribute("role", "status");
  box.hidden = true;
  root.append(box);
  return {
    show(lines, x, y) {
      box.replaceChildren(...lines.map((line, i) => Object.assign(document.createElement(i ? "div" : "b"), { textContent: line })));
      box.hidden = false;
      const frame = root.getBoundingClientRect();
      const left = x - frame.left + 14 + box.offsetWidth > frame.width ? x - frame.left - 14 - box.offsetWidth : x - frame.left + 14;
      box.style.left = `${Math.max(0, left)}px`;
      box.style.top = `${y - frame.top + 14}px`;
    },
    hide: () => (box.hidden = true),
  };
}

function addButton(bar, text, title, onClick) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "sqviz-button", textContent: text, title });
  button.addEventListener("click", onClick);
  bar.append(button);
  return button;
}

function addToggle(bar, text, title, on, onChange) {
  const button = addButton(bar, text, title, () => {
    const pressed = button.getAttribute("aria-pressed") !== "true"; // the view may have set it meanwhile
    button.setAttribute("aria-pressed", pressed);
    onChange(pressed);
  });
  button.setAttribute("aria-pressed", on);
  return button;
}

function addSelect(bar, label, options, value, onChange) {
  const frame = Object.assign(document.createElement("label"), { className: "sqviz-field", textContent: label });
  const select = Object.assign(document.createElement("select"), { className: "sqviz-select" });
  for (const [key, text] of options) select.append(new Option(text, key, false, key === value));
  select.addEventListener("change", () => onChange(select.value));
  frame.append(select);
  bar.append(frame);
  return select;
}

function savePicture(canvas, name) {
  canvas.toBlob((blob) => {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: `${name}.png` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}
