// The controls of the smoothing explorer: pickers, scheme, the α slider, the perplexity panel, and their help.
// Each maker returns {update()}, which brings the control in line with the store.

const HELP = [
  ["α", "How much of the difficulty moves from the activations to the weights: s = max|X|^α / max|W|^(1−α), per input channel. Drag the slider or the error plot; ← → move by 0.01, Page Up/Down by 0.05, Home/End to 0 and 1."],
  ["Error", "‖Ŷ − Y‖ / ‖Y‖ of this linear's output (relative Frobenius norm) on the sample text, with X/s and s·W rounded under the scheme; SQNR is the same as a ratio of powers, in dB. “≈” is read off the curve, “sampled” uses part of the tokens, “exact” all of them."],
  ["Sweet spot", "The green band: every α whose error stays within 1.1 × of the smallest one swept. The dashed line is the error without any smoothing, dots are exact values of the last few α."],
  ["Maps", "Colour is the integer that a cell becomes under the scheme, its size in quantisation steps on a log scale; blank is 0. Several tokens or outputs may share a row, which then shows the largest, and “rounds to 0” counts such cells. What is not quantised is coloured by its size next to the largest."],
  ["Channel maxima", "The largest |X/s| and |s·W| of each input channel, on one log axis that stays the same for every α; pale: before smoothing. At α = 0.5 both are equal where this linear has the largest weight of those that share s."],
  ["Layer, linear", "Which linear to look at. Linears that read the same tensor share one s, made from the largest weight among them."],
  ["Activations, weights", "Which elements share a quantisation step: the whole tensor, a token, a channel, or a group of channels. One step for the whole tensor is the fastest to run and the hardest to round to. Per-channel activations exist for comparison only: no integer product can use them."],
  ["Bits", "2 to 8, for activations (A) and weights (W) separately."],
  ["Static", "Activation steps are fixed from the calibration text beforehand, instead of taken from each tensor as it comes. Per-tensor and per-channel only."],
  ["Folds", "Into what s is folded when the whole model is smoothed (perplexity, code): norms only, or also the linear before (v → o, up → down), where that is exact."],
  ["Perplexity", "Smooths and quantises a copy of the whole model under this state and scores held text that was not used for calibration. A new state cancels a running estimate."],
];

const element = (tag, className, text = "") => Object.assign(document.createElement(tag), { className, textContent: text });

function setOptions(select, options, value) {
  const key = JSON.stringify(options);
  if (select.dataset.options !== key) {
    select.replaceChildren(...options.map(([name, text]) => new Option(text, name)));
    select.dataset.options = key;
  }
  select.value = value;
}

// ---- layer and linear --------------------------------------------------------------------------------------------------

function makePickers(bar, store, onLinear) {
  const shown = new Set(store.available);
  const rows = store.about.linears.filter((row) => shown.has(row.name));
  const kinds = [...new Set(rows.map((row) => row.kind))];
  const blocksOf = (kind) => rows.filter((row) => row.kind === kind).map((row) => row.block);
  const open = (kind, block) => {
    const near = blocksOf(kind).reduce((best, b) => (Math.abs(b - block) < Math.abs(best - block) ? b : best));
    onLinear(rows.find((row) => row.kind === kind && row.block === near).name);
  };
  const step = (by) => {
    const blocks = blocksOf(store.row.kind), at = blocks.indexOf(store.row.block);
    open(store.row.kind, blocks[Math.max(0, Math.min(blocks.length - 1, at + by))]);
  };
  const field = element("div", "sqviz-field sm-layer");
  const label = Object.assign(element("label", "", "Layer"), { htmlFor: uniqueId("layer") });
  const slider = Object.assign(element("input", "sm-layer-range"), { type: "range", min: 0, step: 1, id: label.htmlFor, title: "Layer (transformer block)" });
  const value = element("output", "sm-layer-value");
  field.append(label);
  const back = addButton(field, "‹", "Previous layer", () => step(-1));
  field.append(slider);
  const next = addButton(field, "›", "Next layer", () => step(1));
  for (const button of [back, next]) button.setAttribute("aria-label", button.title);
  field.append(value);
  bar.append(field);
  slider.addEventListener("input", () => open(store.row.kind, blocksOf(store.row.kind)[Number(slider.value)]));
  const linear = addSelect(bar, "Linear", kinds.map((kind) => [kind, kind]), store.row.kind, (kind) => open(kind, store.row.block));
  linear.setAttribute("aria-label", "Linear");
  const fold = element("span", "sqviz-note sm-fold");
  bar.append(fold);
  return {
    step,
    update() {
      const { row } = store, blocks = blocksOf(row.kind);
      Object.assign(slider, { max: blocks.length - 1, value: blocks.indexOf(row.block) });
      slider.setAttribute("aria-valuetext", `layer ${row.block}`);
      value.textContent = `${row.block}`;
      back.disabled = row.block === blocks[0];
      next.disabled = row.block === blocks[blocks.length - 1];
      linear.value = row.kind;
      fold.textContent = `${row.channels} → ${row.out} · ${foldWords(row, store.folds)}`;
      fold.title = row.reason;
    },
  };
}

const foldWords = (row, folds) => {
  if (row.fold === "norm") return "s folds into the norm before";
  if (row.fold === "linear") return folds === "all" ? "s folds into the linear before" : "s folds into the linear before, with folds “all” only";
  return `online scaling: ${row.reason || "no exact fold"}`;
};

let identifiers = 0;
const uniqueId = (name) => `sqviz-${name}-${++identifiers}`;

// ---- the scheme --------------------------------------------------------------------------------------------------------

const ACTIVATIONS = [["per-tensor", "per tensor"], ["per-token", "per token"], ["per-group(128)", "per group of 128"], ["per-channel", "per channel"], ["none", "not quantised"]];
const WEIGHTS = [["per-tensor", "per tensor"], ["per-channel", "per channel"], ["per-group(128)", "per group of 128"], ["none", "not quantised"]];
const BITS = [8, 7, 6, 5, 4, 3, 2].map((bits) => [String(bits), `${bits} bits`]);
const withOwn = (options, word) => (options.some(([name]) => name === word) ? options : [...options, [word, word]]);
const canBeStatic = (activation) => activation === "per-tensor" || activation === "per-channel";

function makeSchemeBar(bar, store, live, onScheme, onFolds) {
  const change = (field, value) => {
    const scheme = { ...store.scheme, [field]: value };
    if (!canBeStatic(scheme.activation)) scheme.static = false;
    if (scheme.activation === "none" && scheme.weight === "none") scheme[field === "weight" ? "activation" : "weight"] = field === "weight" ? "per-token" : "per-channel";
    onScheme(scheme);
  };
  const presets = store.about.presets.map((preset) => [preset.id, preset.label]);
  const preset = addSelect(bar, "Scheme", [["", "own"], ...presets], "", (id) => id && onScheme(store.about.presets.find((known) => known.id === id).scheme));
  const activation = addSelect(bar, "Activations", ACTIVATIONS, "", (word) => change("activation", word));
  const bits = addSelect(bar, "", BITS, "", (value) => change("bits", Number(value)));
  const weight = addSelect(bar, "Weights", WEIGHTS, "", (word) => change("weight", word));
  const weightBits = addSelect(bar, "", BITS, "", (value) => change("weight_bits", Number(value)));
  const fixed = addToggle(bar, "Static", "Activation steps from calibration instead of from each tensor", false, (on) => change("static", on));
  const folds = addSelect(bar, "Folds", [["norm", "norms"], ["all", "all exact"]], "", onFolds);
  const names = { Scheme: preset, Activations: activation, "Bits of the activations": bits, Weights: weight, "Bits of the weights": weightBits, Folds: folds };
  for (const [name, control] of Object.entries(names)) control.setAttribute("aria-label", name);
  preset.title = "Schemes of thesis Table 3.2";
  folds.title = "Where s may be folded when the whole model is smoothed";
  const note = element("span", "sqviz-note", live ? "" : "no kernel: α, layer and linear stay live, the scheme is fixed");
  bar.append(note);
  return {
    update() {
      const { scheme } = store;
      setOptions(activation, withOwn(ACTIVATIONS, scheme.activation), scheme.activation);
      setOptions(weight, withOwn(WEIGHTS, scheme.weight), scheme.weight);
      [bits.value, weightBits.value, folds.value] = [String(scheme.bits), String(scheme.weight_bits), store.folds];
      preset.value = store.about.presets.find((known) => schemeKey(known.scheme) === schemeKey(scheme))?.id ?? "";
      fixed.setAttribute("aria-pressed", scheme.static);
      for (const control of [preset, activation, bits, weight, weightBits, folds]) control.disabled = !live;
      fixed.disabled = !live || !canBeStatic(scheme.activation);
      bits.disabled ||= scheme.activation === "none";
      weightBits.disabled ||= scheme.weight === "none";
    },
  };
}

// ---- α -----------------------------------------------------------------------------------------------------------------

const KEY_STEPS = { ArrowLeft: -0.01, ArrowDown: -0.01, ArrowRight: 0.01, ArrowUp: 0.01, PageDown: -0.05, PageUp: 0.05, Home: -1, End: 1 };

// `onAlpha(value, moving, event)`: moving is true while the hand is on it.
function makeAlphaSlider(parent, store, onAlpha) {
  const frame = element("div", "sm-slider");
  const id = uniqueId("alpha");
  const label = Object.assign(element("label", "sm-slider-label", "α"), { htmlFor: id });
  const input = Object.assign(element("input", "sm-range"), { type: "range", min: 0, max: 1, step: 0.01, id, title: "Migration strength α: ← → 0.01, Page Up/Down 0.05" });
  input.setAttribute("aria-label", "Migration strength alpha");
  frame.append(label, input);
  parent.append(frame);
  input.addEventListener("input", (event) => onAlpha(Number(input.value), true, event));
  input.addEventListener("change", (event) => onAlpha(Number(input.value), false, event));
  return {
    input,
    update(spot) {
      if (Number(input.value) !== store.alpha) input.value = store.alpha;
      input.setAttribute("aria-valuetext", `alpha ${store.alpha.toFixed(2)}`);
      for (const [name, value] of [["--lo", spot?.lo ?? 0], ["--hi", spot?.hi ?? 0]]) {
        if (frame.style.getPropertyValue(name) !== String(value)) frame.style.setProperty(name, value);
      }
    },
  };
}

function alphaKeys(node, store, onAlpha) {
  node.addEventListener("keydown", (event) => {
    const by = KEY_STEPS[event.key];
    if (by === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    onAlpha(store.alpha + by, false, event);
  });
}

// ---- perplexity of the whole model -------------------------------------------------------------------------------------

function makeEstimatePanel(parent, model, store, live) {
  const facts = heading(parent, ["Perplexity", " of the whole model"]);
  const bar = element("div", "sqviz-bar");
  parent.append(bar);
  const run = addButton(bar, "Estimate", "Smooth and quantise the whole model under this state and score held text", () => model.send({ kind: "estimate" }));
  const stop = addButton(bar, "Cancel", "Stop the estimate", () => model.send({ kind: "cancel" }));
  const auto = addToggle(bar, "On release", "Estimate whenever α or the scheme comes to rest", model.get("estimate_on_release"), (on) => store.send({ estimate_on_release: on }));
  const meter = Object.assign(element("progress", "sm-meter"), { max: 1, value: 0 });
  meter.setAttribute("aria-label", "Progress of the estimate");
  const result = element("span", "sm-estimate");
  bar.append(meter, result);
  const update = () => {
    const running = model.get("status").estimate ?? null, got = model.get("estimate");
    run.disabled = !live || Boolean(running);
    auto.disabled = !live;
    auto.setAttribute("aria-pressed", model.get("estimate_on_release"));
    stop.hidden = meter.hidden = !running;
    result.hidden = Boolean(running) && !got.value;
    if (running) [meter.value, meter.max] = [running.done, running.total || 1];
    const here = got.value && Math.abs(got.alpha - store.alpha) < 1e-9 && got.scheme === schemeKey(store.scheme) && got.folds === store.folds;
    const told = running ? running.text : got.tokens ? `${got.tokens} held tokens` : live ? "on held text" : "needs a kernel";
    setText(facts, told);
    result.classList.toggle("sm-stale", !here);
    const shown = got.value ? `${number(got.reference)} → ${number(got.value)} (${signed(got.value / got.reference - 1)})${here ? "" : ` at α = ${got.alpha.toFixed(2)}${got.scheme === schemeKey(store.scheme) ? "" : ", other scheme"}`}` : "";
    setText(result, shown);
    const exactly = got.value ? `unquantised ${got.reference.toPrecision(5)}, this state ${got.value.toPrecision(5)}` : "";
    if (result.title !== exactly) result.title = exactly;
  };
  model.on("change:estimate change:status change:estimate_on_release", update);
  return { update };
}

const signed = (part) => (part > 9.995 ? `× ${number(part + 1)}` : `${part < 0 ? "−" : "+"}${(100 * Math.abs(part)).toFixed(Math.abs(part) < 0.1 ? 2 : 0)} %`);

// ---- help and errors ---------------------------------------------------------------------------------------------------

function makeHelp(root) {
  const panel = element("dl", "sm-help");
  panel.hidden = true;
  for (const [term, text] of HELP) panel.append(element("dt", "", term), element("dd", "", text));
  root.append(panel);
  return panel;
}

function makeProblem(parent, model) {
  const box = element("div", "sqviz-error sm-problem");
  box.setAttribute("role", "alert");
  const text = element("span", "");
  box.append(text);
  addButton(box, "×", "Dismiss", () => (box.hidden = true)).setAttribute("aria-label", "Dismiss this message");
  parent.append(box);
  const update = () => {
    const problem = model.get("problem");
    box.hidden = !problem;
    text.textContent = problem;
  };
  model.on("change:problem", update);
  update();
}
