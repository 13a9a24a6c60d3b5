// method_table.js: MethodTableView. One row per method, changes as dots with intervals, columns that sort. While the table
// is being computed (`state` is not "done") rows say how far they are, and Cancel asks the kernel to stop.

const SVG = "http://www.w3.org/2000/svg";
const HEARD_MS = 4000; // after which the page says what to do about a kernel that has not answered

const STOPPING = "Stopping: the step under way ends, finished rows stay.";

// Linear up to ±5; beyond, compressed: asinh is linear around 0 and a logarithm far from it. The twin of change_axis in
// method_table_still.py.
function changeAxis(cells) {
  const ends = cells.flatMap((cell) => [cell.low, cell.value, cell.high]).filter((value) => value != null);
  const [lo, hi] = [Math.min(0, ...ends), Math.max(0, ...ends)];
  if (Math.max(-lo, hi) <= 5) {
    const axis = linearAxis(lo, hi);
    return { at: axis.at, ticks: axis.ticks(3) };
  }
  const [first, last] = [Math.asinh(lo), Math.asinh(hi)];
  const ticks = [0];
  for (let power = 1; power <= Math.max(-lo, hi); power *= 10) ticks.push(...[-power, power].filter((value) => value >= lo && value <= hi));
  return { at: (value) => (Math.asinh(value) - first) / (last - first), ticks: ticks.sort((a, b) => a - b) };
}

const element = (tag, className = "", text = "") => Object.assign(document.createElement(tag), { className, textContent: text });

function shape(parent, name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.append(made);
  return made;
}

const PLOT = { width: 176, height: 22, pad: 9 };
const across = (axis, value) => PLOT.pad + (PLOT.width - 2 * PLOT.pad) * axis.at(value);

function plot(axis, label) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${PLOT.width} ${PLOT.height}`);
  svg.setAttribute("class", "mt-plot");
  if (label) {
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", label);
  } else svg.setAttribute("aria-hidden", "true");
  for (const tick of axis.ticks) shape(svg, "line", { x1: across(axis, tick), x2: across(axis, tick), y1: -200, y2: 200, class: tick ? "mt-grid" : "mt-zero" });
  return svg;
}

function addChange(td, cell, axis, unit) {
  const svg = plot(axis, `${cell.text}, 95 % interval ${cell.interval}: ${cell.note}`);
  const middle = PLOT.height / 2;
  if (cell.low != null && cell.high != null)
    shape(svg, "line", { x1: across(axis, cell.low), x2: across(axis, cell.high), y1: middle, y2: middle, class: `mt-interval mt-${cell.tone}` });
  if (cell.value != null) shape(svg, "circle", { cx: across(axis, cell.value), cy: middle, r: 4.5, class: `mt-dot mt-${cell.tone}` });
  const words = element("div", "mt-words", cell.text);
  words.append(element("div", "mt-small", cell.interval));
  const pair = element("div", "mt-pair");
  pair.append(svg, words);
  pair.title = `${cell.note}. 95 % interval ${cell.interval}${unit ? ` ${unit}` : ""}`;
  td.append(pair);
}

function addAxis(th, axis) {
  const svg = plot({ ...axis, ticks: [] }, "");
  let taken = -Infinity;
  const zeroFirst = [...axis.ticks].sort((a, b) => Math.abs(a) - Math.abs(b));
  const placed = [];
  for (const tick of zeroFirst) if (placed.every((other) => Math.abs(across(axis, other) - across(axis, tick)) > 18)) placed.push(tick);
  for (const tick of placed.sort((a, b) => a - b)) {
    taken = across(axis, tick);
    shape(svg, "text", { x: taken, y: 11, class: "mt-tick" }).textContent = `${tick > 0 ? "+" : ""}${number(tick)}`.replace("-", "−");
    shape(svg, "line", { x1: taken, x2: taken, y1: 15, y2: PLOT.height, class: "mt-zero" });
  }
  th.append(svg);
}

function addBar(td, cell, most) {
  td.append(element("div", "", cell.text));
  if (cell.value == null || !most) return;
  const bar = element("div", "mt-bar");
  bar.style.width = `${(100 * cell.value) / most}%`;
  td.append(bar);
}

function csvOf({ columns, rows }) {
  const quoted = (value) => (/[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const named = (column) => (column.unit ? `${column.label}, ${column.unit}` : column.label);
  const head = ["method", "what", ...columns.flatMap((column) => (column.kind === "change" ? [named(column), `${named(column)}: low`, `${named(column)}: high`] : [named(column)])), "why not"];
  const lines = rows.map((row) => [row.name, row.what, ...columns.flatMap((column) => {
    const cell = row.cells[column.key] ?? {};
    return column.kind === "change" ? [cell.value, cell.low, cell.high] : [cell.value ?? cell.text];
  }), row.why]);
  return [head, ...lines].map((line) => line.map((value) => quoted(String(value ?? ""))).join(",")).join("\n");
}

function render({ model, el }) {
  const root = startView(el, model);
  root.classList.add("mt");
  const live = hasKernel(model);
  let sorted = { key: "", way: 0 }; // way: 1 ascending, -1 descending, 0 the order asked for

  const top = element("div", "sqviz-bar");
  const title = element("div", "sqviz-title", model.get("title"));
  top.append(title);
  const cancel = addButton(top, "Cancel", "Stop; finished rows stay", () => {
    if (cancel.disabled) return;
    cancel.disabled = true;
    cancel.textContent = "Stopping …";
    said.textContent = STOPPING;
    model.send({ kind: "cancel" });
    unheard = setTimeout(() => (said.textContent = "The kernel has not answered: this front end delivers a click only when the cell is done. Interrupt the kernel (■) instead; finished rows are kept."), HEARD_MS);
  });
  const csv = addButton(top, "CSV", "Save the table as a CSV file, numbers in full", () => {
    const url = URL.createObjectURL(new Blob([csvOf(model.get("sheet"))], { type: "text/csv" }));
    Object.assign(document.createElement("a"), { href: url, download: "methods.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  });
  const status = element("div", "sqviz-note mt-status");
  status.setAttribute("aria-live", "polite");
  const said = element("div", "sqviz-note mt-said");
  const problem = element("div", "sqviz-error");
  problem.setAttribute("role", "alert");
  const frame = element("div", "mt-frame");
  frame.tabIndex = 0;
  frame.setAttribute("role", "region");
  frame.setAttribute("aria-label", "Table of methods; scrolls sideways");
  const table = element("table", "mt-table");
  const [head, body] = [element("thead"), element("tbody")];
  table.append(head, body);
  frame.append(table);
  const help = element("details", "mt-help");
  help.append(element("summary", "", "What the columns say"), element("dl"));
  root.append(top, status, said, problem, frame, help);
  let [unheard, began, number_, clock] = [0, performance.now(), -1, 0];
  let running = null; // what of the running row changes while it runs

  const reorder = (column) => {
    const first = column.kind === "number" && column.better === "higher" ? -1 : 1; // the best on top
    const ways = sorted.key === column.key ? { [first]: -first, [-first]: 0, 0: first } : null;
    sorted = { key: column.key, way: ways ? ways[sorted.way] : first };
    draw();
    head.querySelector(`[data-key="${CSS.escape(column.key)}"] button`)?.focus();
  };
  const ordered = (rows) => {
    if (!sorted.way) return rows;
    const value = (row) => (sorted.key === "name" ? row.name : row.cells[sorted.key]?.value);
    const places = rows.filter((row) => row.state === "done");
    const rest = rows.filter((row) => row.state !== "done");
    const less = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en") : a - b);
    places.sort((a, b) => {
      const [left, right] = [value(a), value(b)];
      if (left == null || right == null) return (left == null) - (right == null); // what has no number comes last
      return sorted.way * less(left, right);
    });
    return [...places, ...rest];
  };

  const drawHead = (columns, axes) => {
    const line = element("tr");
    for (const column of [{ key: "name", kind: "name", label: "method", unit: "", help: "What is done to the model before and while it is quantised.", better: "" }, ...columns]) {
      const th = element("th", `mt-${column.kind}`);
      th.scope = "col";
      th.dataset.key = column.key;
      const way = sorted.key === column.key ? sorted.way : 0;
      th.setAttribute("aria-sort", { "-1": "descending", 0: "none", 1: "ascending" }[way]);
      const arrow = { "-1": "\u00a0▼", 0: "", 1: "\u00a0▲" }[way];
      const button = element("button", "mt-sort", `${column.label}${column.unit ? `, ${column.unit}` : ""}${arrow}`);
      button.type = "button";
      button.title = `${column.help} Click to sort.`;
      button.addEventListener("click", () => reorder(column));
      th.append(button);
      if (axes[column.key]) addAxis(th, axes[column.key]);
      line.append(th);
    }
    head.replaceChildren(line);
    help.querySelector("dl").replaceChildren(...columns.flatMap((column) => [
      element("dt", "", `${column.label}${column.unit ? `, ${column.unit}` : ""}`), element("dd", "", column.help)]));
  };

  const nameCell = (row) => {
    const th = element("th", "mt-name");
    th.scope = "row";
    th.append(element("div", "", row.name), element("div", "mt-small", row.what));
    th.title = row.what;
    return th;
  };
  const unfinished = (row, count) => {
    const td = element("td", "mt-state");
    td.colSpan = count;
    const line = element("div", "mt-progress");
    const size = row.cells.size ? ` · ${row.cells.size.text} MB` : "";
    const words = { waiting: `waiting${size}`, stopped: `not computed${size}`, cannot: `cannot: ${row.why}`, running: "" }[row.state];
    const text = element("span", row.state === "cannot" ? "mt-why" : "mt-small", words);
    if (row.state === "running") {
      const meter = element("progress", "mt-meter");
      meter.setAttribute("aria-label", `${row.name}: progress`);
      line.append(meter);
      running = { meter, text };
    }
    line.append(text);
    td.append(line);
    return td;
  };
  const finished = (row, columns, axes, most) => columns.map((column) => {
    const td = element("td", `mt-${column.kind}`);
    const cell = row.cells[column.key];
    if (!cell) {
      td.append(element("span", "mt-small", column.kind === "change" && row === model.get("sheet").rows[0] ? "what the others are compared with" : "–"));
      return td;
    }
    if (column.kind === "change") addChange(td, cell, axes[column.key], column.unit);
    else if (column.kind === "bar" && cell.text) addBar(td, cell, most[column.key]);
    else td.textContent = cell.text || "–";
    if (cell.note && column.kind !== "change") td.title = cell.note;
    return td;
  });
  const draw = () => {
    const { columns = [], rows = [] } = model.get("sheet");
    const cellsOf = (key) => rows.map((row) => row.cells[key]).filter(Boolean);
    const axes = Object.fromEntries(columns.filter(({ kind }) => kind === "change").map(({ key }) => [key, changeAxis(cellsOf(key))]));
    const most = Object.fromEntries(columns.filter(({ kind }) => kind === "bar").map(({ key }) => [key, Math.max(0, ...cellsOf(key).map((cell) => cell.value ?? 0))]));
    drawHead(columns, axes);
    running = null;
    body.replaceChildren(...ordered(rows).map((row) => {
      const line = element("tr", `mt-row mt-is-${row.state}`);
      line.dataset.name = row.name;
      line.append(nameCell(row), ...(row.state === "done" ? finished(row, columns, axes, most) : [unfinished(row, columns.length)]));
      return line;
    }));
    const done = rows.filter((row) => row.state === "done" || row.state === "cannot").length;
    const state = model.get("state");
    const count = `${done} of ${rows.length} rows finished`;
    status.textContent = { done: "", running: count, stopped: `Stopped: ${count}`, failed: `Ended by an error: ${count}` }[state];
    cancel.hidden = !live || state !== "running";
    status.hidden = state === "done";
    csv.disabled = !done;
    tick();
  };
  const tick = () => {
    if (!running) return;
    const now = model.get("running");
    if (now.number !== number_) [number_, began] = [now.number, performance.now()];
    if (now.total) Object.assign(running.meter, { max: now.total, value: now.done });
    else running.meter.removeAttribute("value");
    const of = now.total ? ` ${now.done.toLocaleString("en")} of ${now.total.toLocaleString("en")}` : "";
    running.text.textContent = `${now.what}${of} · ${Math.round((performance.now() - began) / 1000)} s`;
  };
  const say = () => {
    title.textContent = model.get("title");
    if (!cancel.disabled) said.textContent = model.get("note");
    problem.textContent = model.get("problem");
    problem.hidden = !model.get("problem");
    said.hidden = model.get("state") === "done" && !model.get("note");
  };
  const hear = (message) => {
    if (message.kind !== "heard") return;
    clearTimeout(unheard);
    said.textContent = STOPPING;
    root.dataset.heard = "true";
  };
  const heard = [["sheet", draw], ["state", draw], ["running", tick], ["title", say], ["note", say], ["problem", say]];
  for (const [name, call] of heard) model.on(`change:${name}`, call);
  model.on("msg:custom", hear);
  if (live) clock = setInterval(tick, 1000);
  draw();
  say();
  return () => {
    clearInterval(clock);
    clearTimeout(unheard);
    for (const [name, call] of heard) model.off(`change:${name}`, call);
    model.off("msg:custom", hear);
  };
}

export default { render };
