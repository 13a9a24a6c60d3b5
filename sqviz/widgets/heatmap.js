// heatmap.js: HeatmapView. The state lives in traits of the same names; everything else is heatmap_panel.js.

const HEATMAP_STATE = ["operand", "smoothed", "alpha", "log_colours", "clip", "palette"];

function render({ model, el }) {
  const meta = model.get("meta");
  const root = startView(el, model);
  root.append(Object.assign(document.createElement("div"), { className: "sqviz-title", textContent: model.get("title") }));
  root.append(Object.assign(document.createElement("div"), { className: "sqviz-note", textContent: meta.note }));
  const tooltip = makeTooltip(root);
  const part = (key) => meta[key] && { ...meta[key], codes: asBytes(model.get(`${key}_cells`)) };
  const data = {
    name: meta.name, smooths: meta.smooths, columns: meta.columns, tokens: model.get("tokens"), x: part("x"), w: part("w"),
    xMax: asFloat32(model.get("x_max")), wMax: asFloat32(model.get("w_max")),
  };
  const read = () => Object.fromEntries(HEATMAP_STATE.map((name) => [name, model.get(name)]));
  const panel = makeHeatmap(root, tooltip, data, read(), (changes) => {
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    model.save_changes();
  });
  const update = () => panel.update(read());
  for (const name of HEATMAP_STATE) model.on(`change:${name}`, update);
  const hint = "Click, then wheel or + and − to zoom, drag to pan, double click to reset; arrow keys move the cross.";
  root.append(Object.assign(document.createElement("div"), { className: "sqviz-note", textContent: hint }));
  return () => {
    panel.stop();
    for (const name of HEATMAP_STATE) model.off(`change:${name}`, update);
  };
}

export default { render };
