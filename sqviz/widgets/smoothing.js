// The smoothing explorer: wires the store, the two sides and the controls. Every frame is drawn from what the page holds;
// the kernel is told where α is, and its answers replace the value read off the curve.

function makePage(model, el) {
  const store = makeStore(model), live = hasKernel(model);
  const root = startView(el, model, `Smoothing explorer, ${store.about.model}`);
  root.classList.add("sm");
  const timings = makeTimings(root);

  const top = element("div", "sqviz-bar sm-top"), pickersBar = element("div", "sqviz-bar"), schemeBar = element("div", "sqviz-bar sm-scheme");
  const grid = element("div", "sm-grid"), channels = element("section", "sm-channels"), curves = element("section", "sm-curves");
  root.append(top, pickersBar, schemeBar);
  makeProblem(root, model);
  grid.append(curves, channels);
  const frame = element("div", "sm-frame");
  frame.append(grid);
  root.append(frame);

  // ---- the α side
  const reading = makeReading(curves);
  const onAlpha = (value, moving, event) => {
    const before = store.alpha;
    store.setAlpha(value);
    if (event) timings.begin(event);
    // The kernel first: it computes while the page draws.
    if (store.alpha !== before || moving !== model.get("moving")) store.send({ alpha: store.alpha, moving });
    if (store.alpha !== before) alphaMoved();
  };
  const error = makeErrorPanel(curves, store);
  const slider = makeAlphaSlider(curves, store, onAlpha);
  const stripFacts = heading(curves, ["Every layer", ""]);
  const strip = makeStripPanel(curves, store, stripFacts);
  const estimate = makeEstimatePanel(curves, model, store, live);

  // ---- the channel side
  const xMap = makeMapPanel(channels, store, "x"), maxima = makeMaximaPanel(channels, store), wMap = makeMapPanel(channels, store, "w");
  const tooltip = makeTooltip(root);
  linkChannels(store, [xMap, maxima, wMap], tooltip);
  const panels = [xMap, maxima, wMap];

  // ---- the controls
  const openLinear = (name) => {
    if (name === store.linear) return;
    store.send({ linear: name });
    refresh();
  };
  const pickers = makePickers(pickersBar, store, openLinear);
  const changeScheme = (scheme) => (store.send({ scheme }), refresh());
  const scheme = makeSchemeBar(schemeBar, store, live, changeScheme, (folds) => (store.send({ folds }), refresh()));

  // What is not canvas is written once a frame, after the canvases, which ask the page for their width: written before,
  // each text would cost a layout of its own.
  let writing = 0;
  const write = () => {
    writing = 0;
    panels.forEach((panel) => panel.write?.());
    error.placeMarker(store);
    strip.placeMarker(store);
    slider.update(error.spot);
    reading.update(store);
    estimate.update();
  };
  store.later = () => (writing ||= requestAnimationFrame(write));
  const alphaMoved = () => {
    panels.forEach((panel) => panel.redrawSoon());
    store.later();
  };
  const refresh = () => {
    pickers.update();
    scheme.update();
    store.takeSweeps();
    store.takeStops();
    stripFacts.previousSibling.lastChild.textContent = ` · ${store.row.kind}`;
    [...panels, error, strip].forEach((panel) => panel.redraw());
    store.later();
  };
  store.waiting = () => {
    const { activations, sweep } = model.get("status");
    if (!live) return "no sweep of this linear in this page";
    return (activations ?? sweep)?.text ?? "waiting for the kernel";
  };

  addTopBar(top, { model, store, live, root, panels, error, strip, reading, refresh, onAlpha });
  dragAlpha(error, (value, moving, event) => onAlpha(value, moving, event));
  for (const node of [slider.input, error.canvas]) alphaKeys(node, store, onAlpha);
  strip.canvas.addEventListener("click", (event) => {
    const row = strip.rowAt(event);
    if (row) openLinear(row.name);
  });
  strip.canvas.addEventListener("pointermove", (event) => showStripTip(event, strip, store, tooltip));
  strip.canvas.addEventListener("pointerleave", tooltip.hide);
  strip.canvas.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowUp" && event.key !== "ArrowDown") return;
    event.preventDefault();
    pickers.step(event.key === "ArrowUp" ? -1 : 1);
  });

  listen(model, {
    "change:alpha": () => {
      if (model.get("moving") || model.get("alpha") === store.alpha) return; // the hand goes before an echo
      store.setAlpha(model.get("alpha"));
      alphaMoved();
    },
    "change:picture": () => (store.takePacks(model.get("picture")), refresh()),
    "change:linear change:scheme change:folds": refresh,
    "change:sweeps change:sweeps_for": () => {
      store.takeSweeps();
      [error, strip].forEach((panel) => panel.redraw());
      store.later();
    },
    "change:stops": () => (store.takeStops(), reading.update(store)),
    "change:answer": () => {
      store.takeAnswer(model.get("answer"));
      reading.update(store); // at once: this is what the hand waits for
      error.redraw();
    },
    "change:status": () => (error.redraw(), store.later()),
  });
  refresh();
  return () => {
    [...panels, error, strip].forEach((panel) => panel.stop());
    model.off(null, null, root);
  };
}

const listen = (model, table) => {
  for (const [events, callback] of Object.entries(table)) model.on(events, callback);
};

// The big number: error and SQNR at today's α, and where they come from.
function makeReading(parent) {
  const line = element("div", "sm-reading");
  const alpha = element("output", "sm-big"), error = element("output", "sm-big"), sqnr = element("output", "sm-big"), source = element("span", "sm-source");
  const cell = (label, node) => {
    const box = element("div", "sm-cell");
    box.append(element("span", "sm-cell-label", label), node);
    line.append(box);
  };
  cell("α", alpha);
  cell("output error", error);
  cell("SQNR", sqnr);
  line.append(source);
  parent.append(line);
  const words = {
    exact: (read) => `exact · ${read.tokens} tokens`,
    sampled: (read) => `sampled · ${read.tokens} tokens`,
    interpolated: () => "≈ read off the curve",
    failed: () => "not finite",
    "": () => "measuring …",
  };
  return {
    update(store) {
      const read = store.reading(), good = Number.isFinite(read.error), about = read.how === "exact" ? "" : "≈ ";
      setText(alpha, store.alpha.toFixed(2));
      setText(error, good ? `${about}${number(100 * read.error)} %` : "–");
      setText(sqnr, good && read.error > 0 ? `${sqnrDb(read.error).toFixed(1)} dB` : good ? "∞ dB" : "–");
      const bare = store.sweepOf(store.linear)?.[store.about.alphas.length];
      const gain = good && usable(bare) && read.error > 0 ? ` · ${number(bare / read.error)} × less than unsmoothed` : "";
      setText(source, words[read.how](read) + (gain && bare < read.error ? ` · ${number(read.error / bare)} × more than unsmoothed` : gain));
      if (line.dataset.how !== read.how) line.dataset.how = read.how;
    },
  };
}

function showStripTip(event, strip, store, tooltip) {
  const row = strip.rowAt(event), part = (event.clientX - strip.canvas.getBoundingClientRect().left - strip.box.x) / strip.box.width;
  if (!row || part < -0.02 || part > 1.02) return tooltip.hide();
  const { alphas } = store.about, k = Math.max(0, Math.min(alphas.length - 1, Math.round(part * (alphas.length - 1))));
  const sweep = store.sweepOf(row.name), spot = sweep && sweetSpot(alphas, [...sweep.subarray(0, alphas.length)], store.about.slack);
  const lines = [`layer ${row.block}`];
  if (spot) lines.push(`α = ${alphas[k].toFixed(2)}: ${number(100 * sweep[k])} %`, `smallest ${number(100 * spot.error)} % at α = ${spot.best.toFixed(2)}`, `unsmoothed ${number(100 * sweep[alphas.length])} %`);
  else lines.push(sweep && sweep[0] < 0 ? "not finite" : "not swept yet");
  tooltip.show(lines, event.clientX, event.clientY);
}

function addTopBar(bar, page) {
  const { model, store, live, root, refresh, onAlpha } = page;
  bar.append(element("span", "sqviz-title", "Smoothing"), element("span", "sqviz-note sm-model", store.about.model));
  const help = makeHelp(root);
  bar.after(help);
  addToggle(bar, "Sort channels", "Order the channels by max|X|, largest first", false, (on) => {
    store.sorted = on;
    refresh();
  });
  addToggle(bar, "Tall", "Give the token map more room", false, (on) => {
    page.panels[0].tall = on ? 512 : undefined;
    page.panels[0].redraw();
  });
  addButton(bar, "Reset", "Back to where this view opened", () => {
    const { alpha, linear, scheme, folds } = store.about.first;
    store.send(live ? { linear, scheme, folds } : { linear });
    onAlpha(alpha, false, null);
    refresh();
  });
  addButton(bar, "Copy code", "The calls that reproduce this state", (event) => copyCode(event.currentTarget, root, codeText(model, store)));
  addButton(bar, "PNG", "Save a picture of this view", () => savePicture(composePicture(page), `smoothing-${store.linear}-alpha-${store.alpha.toFixed(2)}`));
  if (live) addButton(bar, "HTML", "Save a page that works without a kernel", () => model.send({ kind: "export" }));
  model.on("msg:custom", (message, buffers) => {
    if (message.kind !== "page") return;
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(new Blob([buffers[0]], { type: "text/html" })), download: message.name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  addToggle(bar, "?", "What everything here means", false, (on) => (help.hidden = !on)).setAttribute("aria-label", "Help");
}

const codeText = (model, store) => model.get("code").replace("{alpha}", String(store.alpha));

async function copyCode(button, root, code) {
  let box = root.querySelector(".sm-code");
  box?.remove();
  try {
    await navigator.clipboard.writeText(code);
    const text = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = text), 1200);
  } catch { // no clipboard here (an insecure origin, or a refusal): show the code to be copied by hand
    box = Object.assign(element("textarea", "sm-code"), { value: code, rows: 3, readOnly: true });
    box.setAttribute("aria-label", "Code that reproduces this state");
    button.closest(".sqviz-bar").after(box);
    box.focus();
    box.select();
  }
}

const schemeWords = ({ activation, weight, static: fixed, bits, weight_bits: weightBits, symmetric }) =>
  [weight === "none" ? "" : `W${weightBits} ${weight}`, activation === "none" ? "" : `A${bits} ${activation}, ${fixed ? "static" : "dynamic"}`, symmetric ? "" : "asymmetric"]
    .filter(Boolean).join(", ");

// The whole view as one picture: a line of text, then the canvases as they stand.
function composePicture({ store, root, panels, error, strip }) {
  const ratio = window.devicePixelRatio || 1, theme = themeOf(root), gap = 26;
  const columns = [panels, [error, strip]].map((list) => list.map((panel) => panel.canvas));
  const widths = columns.map((list) => list[0].clientWidth), tall = columns.map((list) => list.reduce((sum, canvas) => sum + canvas.clientHeight + gap, 0));
  const picture = Object.assign(document.createElement("canvas"), { width: (widths[0] + widths[1] + 36) * ratio, height: (Math.max(...tall) + 72) * ratio });
  const context = picture.getContext("2d");
  context.scale(ratio, ratio);
  context.fillStyle = theme.paper;
  context.fillRect(0, 0, picture.width, picture.height);
  context.fillStyle = theme.ink;
  context.font = `600 14px ${theme.font}`;
  const read = store.reading(), error100 = Number.isFinite(read.error) ? ` · error ${read.how === "exact" ? "" : "≈ "}${number(100 * read.error)} %` : "";
  context.fillText(`${store.about.model} · ${store.linear} · α = ${store.alpha.toFixed(2)}${error100}`, 12, 24);
  context.font = `12px ${theme.font}`;
  context.fillStyle = theme.dim;
  context.fillText(schemeWords(store.scheme), 12, 42);
  const { dim, series: [blue, orange] } = theme;
  const scale = "colour: the integer a cell becomes, blank: 0";
  const titles = [
    [[[`|X/s|, activations in · ${scale}`, dim]], [["channel maxima: ", dim], ["|X/s|", blue], [" and ", dim], ["|s·W|", orange], [", pale: before", dim]], [["|s·W|, weights", dim]]],
    [[["output error against α", dim]], [[`the same in every layer · ${store.row.kind}`, dim]]],
  ];
  columns.forEach((list, side) => {
    let y = 56;
    list.forEach((canvas, i) => {
      let x = 12 + side * (widths[0] + 12);
      for (const [text, colour] of titles[side][i]) {
        context.fillStyle = colour;
        context.fillText(text, x, y + 14);
        x += context.measureText(text).width;
      }
      context.drawImage(canvas, 12 + side * (widths[0] + 12), y + 20, canvas.clientWidth, canvas.clientHeight);
      if (side === 1) {
        context.fillStyle = theme.ink;
        const box = (i ? strip : error).box;
        context.fillRect(12 + widths[0] + 12 + box.x + store.alpha * box.width - 0.75, y + 20 + box.y, 1.5, box.height);
      }
      y += canvas.clientHeight + gap;
    });
  });
  return picture;
}

export default { render: ({ model, el }) => makePage(model, el) };
