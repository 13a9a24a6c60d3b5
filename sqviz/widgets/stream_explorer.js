// stream_explorer.js: StreamExplorer. Controls, one chart for all lanes, and the lanes (stream_lane.js) below.

const SERIES = { dense: 3, window: 2, sinks: 1, recompute: 4 };
const DASH = { dense: [], window: [2, 3], sinks: [7, 3], recompute: [9, 3, 2, 3] };

function render({ model, el }) {
  const root = startView(el, model.get("title"));
  const live = hasKernel(model);
  const make = (tag, className, text = "") => Object.assign(document.createElement(tag), { className, textContent: text });
  root.append(make("div", "sqviz-title", model.get("title")));
  const source = make("div", "sqviz-note");
  root.append(source);
  const tooltip = makeTooltip(root);
  const set = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const bar = make("div", "sqviz-bar");
  root.append(bar);
  const toggle = addButton(bar, "Start", "Start or pause (Space)", () => model.send({ kind: model.get("state") === "running" ? "pause" : "start" }));
  const reset = addButton(bar, "Reset", "Stop and go back to the beginning", () => model.send({ kind: "reset" }));
  const boxes = Object.entries(model.get("about").lanes).map(([name, title]) => {
    const field = make("label", "sqviz-field");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: model.get("on").includes(name), disabled: !live });
    field.append(box, title);
    bar.append(field);
    box.addEventListener("change", () => set("on", boxes.filter(([, each]) => each.checked).map(([each]) => each)));
    return [name, box];
  });
  const range = (text, title, name, max) => {
    const field = Object.assign(make("label", "sqviz-field", text), { title });
    const input = Object.assign(document.createElement("input"), { type: "range", min: name === "recent" ? 4 : 0, max, step: 1, disabled: !live });
    const shown = document.createElement("output");
    field.append(input, shown);
    bar.append(field);
    input.addEventListener("input", () => {
      shown.textContent = input.value;
      set(name, Number(input.value));
    });
    return () => {
      if (Number(input.value) !== model.get(name)) input.value = model.get(name);
      shown.textContent = model.get(name);
    };
  };
  const showSinks = range("sinks", "Tokens kept for good; acts while it runs", "sinks", 16);
  const showRecent = range("window", "Latest tokens kept; acts while it runs", "recent", 1024);
  addButton(bar, "PNG", "Save the curves", () => savePicture(chart.canvas, "stream"));
  const problem = make("div", "sqviz-error");
  problem.setAttribute("role", "alert");
  root.append(problem);

  const lanes = new Map();
  const chart = makeCanvas(root, {
    label: "Perplexity of the latest 64 tokens against position, one curve per lane",
    height: 240,
    draw(context, width, height, colours) {
      const box = { x: 58, y: 12, width: width - 76, height: height - 58 };
      const shown = [...lanes.values()].filter((lane) => lane.points.length);
      const trained = model.get("about").trained;
      const longest = Math.max(100, ...shown.map((lane) => lane.points.at(-1)[0]));
      let [lo, hi] = [Infinity, 0];
      for (const lane of shown) {
        for (const [position, value] of lane.points) {
          if (position < Math.min(48, longest / 2)) continue;
          lo = Math.min(lo, value);
          hi = Math.max(hi, value);
        }
      }
      if (!Number.isFinite(lo)) [lo, hi] = [1, 1000];
      const [x, y] = [linearAxis(0, longest * 1.02), logAxis(lo / 1.15, Math.max(hi, lo * 3) * 1.15)];
      const { px, py } = drawAxes(context, box, x, y, { xLabel: "tokens read", yLabel: "perplexity, last 64" }, colours);
      context.save();
      context.beginPath();
      context.rect(box.x, box.y, box.width, box.height);
      context.clip();
      const mark = (at, text) => {
        if (!at || at > longest) return;
        context.strokeStyle = colours.dim;
        context.setLineDash([3, 3]);
        context.lineWidth = 1;
        context.beginPath();
        context.moveTo(px(at), box.y);
        context.lineTo(px(at), box.y + box.height);
        context.stroke();
        context.fillStyle = colours.dim;
        const left = px(at) + 8 + context.measureText(text).width > box.x + box.width; // no room on its right
        context.textAlign = left ? "right" : "left";
        context.textBaseline = "top";
        context.fillText(text, px(at) + (left ? -4 : 4), box.y + 2);
      };
      mark(trained, "trained context ends");
      for (const lane of shown) {
        context.strokeStyle = colours.series[lane.series - 1];
        context.setLineDash(DASH[lane.name]);
        context.lineWidth = 2;
        context.beginPath();
        lane.points.forEach(([position, value], i) => (i ? context.lineTo(px(position), py(value)) : context.moveTo(px(position), py(value))));
        context.stroke();
      }
      context.setLineDash([]);
      context.restore();
    },
  });
  chart.canvas.lanes = () => Object.fromEntries([...lanes].map(([name, lane]) => [name, lane.points])); // for tests
  const machine = make("div", "sqviz-note");
  root.append(machine);
  const grid = make("div", "st-lanes");
  root.append(grid);
  root.append(make("div", "sqviz-note", "Colour of a token: how surprising it was. Hover for its alternatives. Each lane gets the same time, so a fast policy gets further."));

  if (live) addSource(root, model);

  const laneOf = (name) => {
    if (!lanes.has(name)) {
      lanes.set(name, makeLane(grid, tooltip, { name, title: model.get("about").lanes[name], series: SERIES[name] }));
      const order = Object.keys(model.get("about").lanes);
      for (const lane of [...lanes.values()].sort((a, b) => order.indexOf(a.name) - order.indexOf(b.name))) grid.append(lane.root);
    }
    return lanes.get(name);
  };
  const keepOnly = (names) => {
    for (const [name, lane] of lanes) {
      if (names.includes(name)) continue;
      lane.stop();
      lanes.delete(name);
    }
  };
  const showMachine = (found) => found && (machine.textContent = `${number(found.resident)} MB resident in the kernel's process`);
  const hear = (message) => {
    if (message.kind === "steps") {
      for (const [name, found] of Object.entries(message.lanes)) {
        if (!found.steps.length && !found.ended) continue;
        laneOf(name).add(found.steps);
        laneOf(name).set(found);
      }
    } else if (message.kind === "all") {
      keepOnly(Object.keys(message.lanes));
      for (const [name, found] of Object.entries(message.lanes)) laneOf(name).restore(found);
    } else return;
    showMachine(message.machine);
    chart.redraw();
  };
  const show = () => {
    const [state, about] = [model.get("state"), model.get("about")];
    toggle.textContent = { ready: "Start", running: "Pause", paused: "Go on", ended: "At the end" }[state];
    toggle.setAttribute("aria-pressed", state === "running");
    toggle.disabled = !live || state === "ended";
    reset.disabled = !live;
    source.textContent = `${about.source}${about.tokens ? ` · ${about.tokens.toLocaleString("en")} tokens` : ""}${about.trained ? ` · trained on ${about.trained.toLocaleString("en")} positions` : ""}${live ? "" : " · no kernel: this is where the streams stood"}`;
    problem.textContent = model.get("problem");
    problem.hidden = !model.get("problem");
    for (const [name, box] of boxes) box.checked = model.get("on").includes(name);
    showSinks();
    showRecent();
  };
  root.addEventListener("keydown", (event) => {
    if (event.key !== " " || ["BUTTON", "INPUT", "TEXTAREA", "SELECT"].includes(event.target.tagName)) return;
    toggle.click();
    event.preventDefault();
    event.stopPropagation();
  });
  const traits = ["state", "about", "problem", "on", "sinks", "recent"];
  for (const name of traits) model.on(`change:${name}`, show);
  model.on("msg:custom", hear);
  show();
  const snapshot = model.get("snapshot");
  if (!live && snapshot?.lanes) hear({ kind: "all", ...snapshot });
  model.send({ kind: "hello" });
  return () => {
    chart.stop();
    for (const lane of lanes.values()) lane.stop();
    for (const name of traits) model.off(`change:${name}`, show);
    model.off("msg:custom", hear);
  };
}

// Where the text comes from: the embedded corpus, pasted text, a file, or the model itself after a prompt.
function addSource(root, model) {
  const make = (tag, className, text = "") => Object.assign(document.createElement(tag), { className, textContent: text });
  const details = document.createElement("details");
  details.append(make("summary", "", "Another text"));
  const area = Object.assign(make("textarea", "st-source"), { rows: 4, placeholder: "Paste a text to read, or write a prompt for the model to go on from" });
  area.setAttribute("aria-label", "Text to read, or prompt");
  const bar = make("div", "sqviz-bar");
  addButton(bar, "Read it", "Score this text under every lane", () => model.send({ kind: "source", what: "text", text: area.value }));
  addButton(bar, "Go on from it", "Let the model write, under every lane", () => model.send({ kind: "source", what: "prompt", text: area.value, temperature: Number(heat.value) }));
  const field = make("label", "sqviz-field", "temperature");
  const heat = Object.assign(document.createElement("input"), { type: "range", min: 0.1, max: 2, step: 0.1, value: 1 });
  const shown = make("output", "", "1");
  heat.addEventListener("input", () => (shown.textContent = heat.value));
  field.append(heat, shown);
  bar.append(field);
  addButton(bar, "Embedded text", "Back to the text that sqviz brings along", () => model.send({ kind: "source", what: "corpus" }));
  const file = Object.assign(document.createElement("input"), { type: "file", accept: ".txt,.md,text/*" });
  file.setAttribute("aria-label", "A text file");
  file.addEventListener("change", async () => {
    const chosen = file.files?.[0];
    if (chosen) model.send({ kind: "source", what: "text", name: chosen.name, text: await chosen.slice(0, 12_000_000).text() });
  });
  bar.append(file);
  details.append(area, bar);
  root.append(details);
}

export default { render };
