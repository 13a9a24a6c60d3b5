// stream_explorer.js: StreamExplorer. Controls, one chart for all lanes (stream_chart.js), and the lanes (stream_lane.js) below.

const SERIES = { dense: 3, window: 2, sinks: 1, recompute: 4 };

function render({ model, el }) {
  const root = startView(el, model);
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
  const stop = addButton(bar, "Stop", "End here and free the caches; what was read stays", () => model.send({ kind: "stop" }));
  const reset = addButton(bar, "Reset", "Forget what was read and go back to the beginning", () => model.send({ kind: "reset" }));
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
  const chart = makeStreamChart(root, () => lanes.values(), () => model.get("about").trained);
  chart.canvas.lanes = () => Object.fromEntries([...lanes].map(([name, lane]) => [name, lane.points])); // for tests
  const machine = make("div", "st-machine");
  root.append(machine);
  const resident = makeSpark(machine, { label: "resident memory of the kernel's process", unit: "MB", colour: (colours) => colours.dim });
  const grid = make("div", "st-lanes");
  root.append(grid);
  root.append(make("div", "sqviz-note", "Colour of a token: how surprising it was. Hover for its alternatives. Each lane gets the same time, so a fast policy gets further."));

  if (live) addSource(root, (message) => model.send(message));

  const laneOf = (name) => {
    if (!lanes.has(name)) {
      lanes.set(name, makeLane(grid, tooltip, { name, title: model.get("about").lanes[name], series: SERIES[name], first: () => model.get("about").first }));
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
    if (message.machine) resident.add(message.machine.resident);
    chart.redraw();
  };
  const show = () => {
    const [state, about] = [model.get("state"), model.get("about")];
    toggle.textContent = { ready: "Start", running: "Pause", paused: "Go on", ended: "Start again" }[state];
    toggle.setAttribute("aria-pressed", state === "running");
    toggle.disabled = !live;
    stop.disabled = !live || state === "ready" || state === "ended";
    reset.disabled = !live || state === "ready";
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
    resident.stop();
    for (const lane of lanes.values()) lane.stop();
    for (const name of traits) model.off(`change:${name}`, show);
    model.off("msg:custom", hear);
  };
}

export default { render };
