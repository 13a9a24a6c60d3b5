// sink_explorer.js: SinkExplorer. Sliders and checkboxes set `recent` and `chosen`; the kernel answers with `scores`.

const CURVES = [["dense", "untouched model", 2, []], ["window", "window alone", 1, [2, 3]], ["sinks", "chosen sinks", 0, [7, 3]]];

function meanOfLast(values, count) {
  const found = new Float32Array(values.length);
  let sum = 0;
  for (let i = 0; i < values.length; i++) {
    sum += values[i] - (i >= count ? values[i - count] : 0);
    found[i] = Math.exp(sum / Math.min(i + 1, count));
  }
  return found;
}

function addRange(bar, text, title, { min, max, value, live }, onInput) {
  const field = Object.assign(document.createElement("label"), { className: "sqviz-field", textContent: text, title });
  const input = Object.assign(document.createElement("input"), { type: "range", min, max, step: 1, value, disabled: !live });
  const shown = document.createElement("output");
  field.append(input, shown);
  bar.append(field);
  input.addEventListener("input", () => {
    shown.textContent = input.value;
    onInput(Number(input.value));
  });
  const update = (now) => {
    if (Number(input.value) !== now) input.value = now;
    shown.textContent = now;
  };
  update(value);
  return { update };
}

function render({ model, el }) {
  const root = startView(el, model);
  const { tokens, smooth } = model.get("about");
  const live = hasKernel(model);
  const make = (tag, className, text = "") => Object.assign(document.createElement(tag), { className, textContent: text });
  root.append(make("div", "sqviz-title", model.get("title")));
  const tooltip = makeTooltip(root);
  const bar = make("div", "sqviz-bar");
  root.append(bar);
  const set = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const states = model.get("states") ?? []; // an exported page carries what its sliders can be set to
  const works = live || states.length > 0;
  const most = live || !works ? Math.min(16, tokens.length) : Math.max(...states.map((state) => state.chosen.length));
  const widest = live || !works ? tokens.length : Math.max(...states.map((state) => state.recent));
  const choose = (chosen, recent) => {
    if (live) return;
    const far = (state) => 1000 * Math.abs(Math.log(state.recent / recent)) + Math.abs(state.chosen.length - chosen);
    const nearest = states.reduce((best, state) => (far(state) < far(best) ? state : best));
    const { scores, ...rest } = nearest;
    model.set({ ...rest, scores: { ...model.get("scores"), ...scores } });
  };
  const count = addRange(bar, "sinks", "How many of the first tokens are kept for good", { min: 0, max: most, value: model.get("chosen").length, live: works },
    (value) => (live ? set("chosen", Array.from({ length: value }, (_, i) => i)) : choose(value, model.get("recent"))));
  const recent = addRange(bar, "window", "How many of the latest tokens are kept", { min: 1, max: widest, value: model.get("recent"), live: works },
    (value) => (live ? set("recent", value) : choose(model.get("chosen").length, value)));
  addButton(bar, "PNG", "Save the curves", () => savePicture(curves.canvas, "sinks"));
  const code = make("code", "sx-code");
  const copy = addButton(bar, "Copy as code", "The chosen cache as a line of Python", async () => {
    await navigator.clipboard?.writeText(model.get("code")).catch(() => {});
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy as code"), 1200);
  });
  bar.append(code);
  const numbers = make("div", "sx-numbers");
  numbers.setAttribute("aria-live", "polite");
  const status = make("div", "sqviz-note");
  const problem = make("div", "sqviz-error");
  problem.hidden = true;
  root.append(numbers, status, problem);

  let [nll, means] = [{}, {}];
  const curves = makeCanvas(root, {
    label: "Perplexity of the latest tokens against position, for the untouched model, a window alone, and the chosen sinks",
    height: 250,
    draw(context, width, height, colours) {
      const box = { x: 58, y: 12, width: width - 72, height: height - 62 };
      const skip = Math.min(smooth, tokens.length >> 1);
      const settled = Object.values(means).flatMap((values) => [...values.subarray(skip)]).filter(Number.isFinite);
      if (!settled.length) return;
      const [lo, hi] = settled.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, 0]);
      const [x, y] = [linearAxis(0, tokens.length), logAxis(lo / 1.1, Math.max(hi, lo * 2) * 1.1)];
      const { px, py } = drawAxes(context, box, x, y, { xLabel: "token", yLabel: `perplexity, last ${smooth}` }, colours);
      const size = model.get("recent") + model.get("chosen").length;
      if (size < tokens.length) {
        context.strokeStyle = colours.dim;
        context.setLineDash([3, 3]);
        context.strokeRect(px(size), box.y, 0, box.height);
        context.setLineDash([]);
        context.fillStyle = colours.dim;
        context.textAlign = "left";
        context.fillText("cache is full", px(size) + 4, box.y + 6);
      }
      context.save();
      context.beginPath();
      context.rect(box.x, box.y, box.width, box.height);
      context.clip();
      for (const [name, , series, dash] of CURVES) {
        if (!means[name]) continue;
        context.strokeStyle = colours.series[series];
        context.lineWidth = 2;
        context.setLineDash(dash);
        context.beginPath();
        means[name].forEach((value, i) => (i ? context.lineTo(px(i + 1), py(value)) : context.moveTo(px(1), py(value))));
        context.stroke();
      }
      context.restore();
      context.setLineDash([]);
    },
  });
  const legend = make("div", "sx-legend");
  for (const [, text, series, dash] of CURVES) {
    const item = make("span", "", text);
    item.style.setProperty("--line", `var(--sq-series-${series + 1})`);
    item.dataset.dash = dash.length;
    legend.append(item);
  }
  root.append(legend);
  root.append(make("div", "sqviz-note", "Each token: orange costs more than with the untouched model, blue less. Framed tokens are sinks. Click a token, or move with arrow keys and press Enter, to change that."));
  const text = makeSinkText(root, tooltip, tokens, {
    toggle(place) {
      if (!live) return;
      const chosen = new Set(model.get("chosen"));
      chosen.has(place) ? chosen.delete(place) : chosen.add(place);
      set("chosen", [...chosen].sort((a, b) => a - b));
    },
  });

  const behind = (values, size) => {
    const rest = values.subarray(Math.min(size, values.length - 1));
    return Math.exp(rest.reduce((sum, value) => sum + value, 0) / rest.length);
  };
  const showScores = () => {
    nll = text.update({ scores: model.get("scores"), chosen: model.get("chosen") });
    means = Object.fromEntries(Object.entries(nll).filter(([, values]) => values).map(([name, values]) => [name, meanOfLast(values, smooth)]));
    const size = model.get("scores").sinks?.size ?? 0;
    numbers.replaceChildren(...CURVES.map(([name, label]) => {
      const box = make("span", "", `${label} `);
      box.append(make("b", "", nll[name] ? number(behind(nll[name], size)) : "…"));
      return box;
    }), make("span", "sqviz-note", size < tokens.length ? `perplexity of the ${tokens.length - 1 - Math.min(size, tokens.length - 2)} tokens behind the first ${size}` : "nothing leaves this cache"));
    curves.redraw();
  };
  const showChoice = () => {
    count.update(Math.min(most, model.get("chosen").length));
    recent.update(model.get("recent"));
    showScores();
  };
  const say = () => {
    code.textContent = model.get("code");
    status.textContent = model.get("status") || (live ? "" : "No kernel: the sliders move between what was computed beforehand, tokens cannot be chosen.");
    problem.textContent = model.get("problem");
    problem.hidden = !model.get("problem");
  };
  const heard = [["recent", showChoice], ["chosen", showChoice], ["scores", showScores], ["status", say], ["problem", say], ["code", say]];
  for (const [name, call] of heard) model.on(`change:${name}`, call);
  showChoice();
  say();
  return () => {
    curves.stop();
    for (const [name, call] of heard) model.off(`change:${name}`, call);
  };
}

export default { render };
