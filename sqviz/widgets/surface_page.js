// surface_page.js: in an exported page, puts the scenes of the figure above one below the other where it is narrow.
(() => {
  const figure = document.getElementById("surfaces");
  const scenes = Object.keys(figure.layout).filter((key) => key.startsWith("scene"));
  let stacked = false;
  const fit = () => {
    const narrow = figure.clientWidth < 640;
    if (narrow === stacked) return;
    stacked = narrow;
    const title = figure.layout.title.text.replace("<br>", " ");
    const [columns, count] = [narrow ? 1 : 2, scenes.length];
    const rows = Math.ceil(count / columns);
    const changes = { height: (narrow ? 180 : 84) + 380 * rows };
    changes["title.text"] = narrow ? title.replace(" before", "<br>before") : title;
    changes["title.font.size"] = narrow ? 12 : 15;
    scenes.forEach((scene, i) => {
      const [row, column] = [Math.floor(i / columns), i % columns];
      const [left, top] = [column / columns, 1 - row / rows];
      changes[`${scene}.domain`] = { x: [left, left + 1 / columns - 0.01], y: [top - 1 / rows, top - 0.08 / rows] };
      const [x, y, z] = [-1.0, -1.7, 0.95].map((v) => v * (narrow ? 1.3 : 1)); // step back, so that the labels fit
      changes[`${scene}.camera.eye`] = { x, y, z };
      changes[`annotations[${i}].x`] = left + 0.49 / columns;
      changes[`annotations[${i}].y`] = top;
    });
    if (narrow) Object.assign(changes, { "updatemenus[0].direction": "down", "updatemenus[0].y": 1.0, "margin.t": 180 });
    else Object.assign(changes, { "updatemenus[0].direction": "right", "margin.t": 84 });
    for (const node of [figure, figure.parentElement]) node.style.height = `${changes.height}px`; // plotly fixes both
    window.Plotly.relayout(figure, changes);
  };
  new ResizeObserver(fit).observe(figure);
  fit();
})();
