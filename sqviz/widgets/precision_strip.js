// precision_strip.js: the errors of every operator in every block, a row per operator, a column per block.

const PM_CELL = 17;

function makeStrip(parent, tooltip, meta, { block, operator, measure, choose }) {
  const names = Object.keys(meta.labels);
  const found = meta.blocks.map((operators) => new Map(operators.map((one) => [one.name, one])));
  let box = null;
  const surface = makeCanvas(parent, {
    label: `Errors of ${names.length} operators in ${found.length} blocks. Arrow keys move from one to the next.`,
    height: () => names.length * PM_CELL + 84,
    draw(context, width, height, colours) {
      context.font = `11px ${colours.font}`;
      const label = Math.min(width * 0.4, 8 + Math.max(...names.map((name) => context.measureText(meta.labels[name]).width)));
      box = { x: label + 4, y: 6, width: Math.min(width - label - 14, found.length * 30), height: names.length * PM_CELL };
      const [lut, axis] = [lutOf("viridis"), logAxis(...meta.scales[measure()])];
      const cell = box.width / found.length;
      const colour = (value) => {
        const pixel = lut[Math.round(255 * Math.min(1, Math.max(0, axis.at(value))))];
        return `rgb(${pixel & 255} ${(pixel >> 8) & 255} ${(pixel >> 16) & 255})`;
      };
      names.forEach((name, row) => {
        const y = box.y + row * PM_CELL;
        const own = found.map((one) => one.get(name));
        context.fillStyle = own.some((one) => one?.quantised) ? colours.ink : colours.dim;
        context.textAlign = "right";
        context.textBaseline = "middle";
        context.fillText(meta.labels[name], box.x - 6, y + PM_CELL / 2, label - 6);
        own.forEach((one, column) => {
          const value = one?.[measure()];
          context.fillStyle = value === null || value === undefined ? colours.faint : colour(value);
          context.fillRect(box.x + column * cell, y, Math.max(1, cell - 1), PM_CELL - 1);
        });
      });
      context.strokeStyle = colours.ink;
      context.lineWidth = 1.5;
      context.strokeRect(box.x + block() * cell - 1, box.y - 1, cell + 1, box.height + 1);
      const row = names.indexOf(operator());
      if (row >= 0) context.strokeRect(box.x - 1, box.y + row * PM_CELL - 1, box.width + 1, PM_CELL + 1);
      context.fillStyle = colours.dim;
      context.textAlign = "center";
      context.textBaseline = "top";
      const every = Math.ceil(26 / cell);
      for (let at = 0; at < found.length; at += every) context.fillText(at, box.x + (at + 0.5) * cell, box.y + box.height + 4);
      context.textAlign = "right";
      context.fillText("block", box.x - 6, box.y + box.height + 4);
      const bar = { x: box.x, y: box.y + box.height + 34, width: Math.max(120, Math.min(box.width, 300)), height: 9 };
      drawColourBar(context, bar, axis, lut, "error", colours);
    },
  });
  const { canvas } = surface;
  canvas.box = () => box; // for tests
  const under = (event) => {
    const frame = canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - frame.left - box.x) / box.width) * found.length);
    const row = Math.floor((event.clientY - frame.top - box.y) / PM_CELL);
    return found[column]?.get(names[row]) ? { column, name: names[row] } : null;
  };
  canvas.addEventListener("pointermove", (event) => {
    const at = under(event);
    if (!at) return tooltip.hide();
    const one = found[at.column].get(at.name);
    const value = one[measure()] === null ? "not measured" : shownError(one[measure()], one.quantised);
    tooltip.show([`${one.title} · block ${at.column}`, `error ${value}`], event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", tooltip.hide);
  canvas.addEventListener("click", (event) => {
    const at = under(event);
    if (at) choose(at.column, at.name);
  });
  canvas.addEventListener("keydown", (event) => {
    const [across, down] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    if (!across && !down) return;
    event.preventDefault();
    const column = Math.min(found.length - 1, Math.max(0, block() + across));
    let row = names.indexOf(operator());
    do row += down;
    while (down && names[row] && !found[column].has(names[row])); // an operator that this block has
    if (names[row] && found[column].has(names[row])) choose(column, names[row]);
  });
  return surface;
}
