// The α side of the smoothing explorer: the error of this linear's output against α, and the same for every layer as a
// strip. Both share one α axis with the slider between them; a line through both marks today's α.

const ALPHA_SIDE = { left: 52, right: 14 };

const alphaBox = (width, top, height) => ({ x: ALPHA_SIDE.left, y: top, width: width - ALPHA_SIDE.left - ALPHA_SIDE.right, height });

function makeMarker(panel) {
  const line = Object.assign(document.createElement("div"), { className: "sm-alpha" });
  panel.canvas.parentElement.append(line);
  return (store) => {
    const { box } = panel;
    if (!box) return;
    line.hidden = Boolean(panel.empty);
    line.style.transform = `translate(${box.x + store.alpha * box.width}px, ${box.y}px)`;
    line.style.height = `${box.height}px`;
  };
}

// Dragging on a plot sets α, like the slider.
function dragAlpha(panel, onAlpha) {
  const at = (event) => (event.clientX - panel.canvas.getBoundingClientRect().left - panel.box.x) / panel.box.width;
  panel.canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    panel.canvas.setPointerCapture(event.pointerId);
    panel.dragging = true;
    onAlpha(at(event), true, event);
  });
  panel.canvas.addEventListener("pointermove", (event) => panel.dragging && onAlpha(at(event), true, event));
  for (const end of ["pointerup", "pointercancel"]) {
    panel.canvas.addEventListener(end, (event) => {
      if (panel.dragging) onAlpha(at(event), false, event);
      panel.dragging = false;
    });
  }
}

function errorLimits(errors) {
  const known = errors.filter(usable);
  if (!known.length) return logAxis(1, 100);
  const lo = 100 * Math.min(...known), hi = 100 * Math.max(...known);
  const middle = Math.sqrt(lo * hi), least = Math.sqrt(10); // at least one decade, so that a flat curve looks flat
  return logAxis(Math.min(lo / 1.25, middle / least), Math.max(hi * 1.25, middle * least));
}

function errorTicks(axis) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(axis.lo)); power <= Math.log10(axis.hi); power++) {
    for (const digit of [1, 2, 5]) if (digit * 10 ** power >= axis.lo && digit * 10 ** power <= axis.hi) ticks.push(digit * 10 ** power);
  }
  return ticks.length > 7 ? ticks.filter((tick) => Math.abs(Math.log10(tick) % 1) < 1e-9) : ticks;
}

function makeErrorPanel(parent, store) {
  const panel = makeCanvas(parent, {
    height: () => 190,
    label: "Error of this linear's output against α, log axis; drag to move α",
    draw(context, width, height, theme) {
      const box = (panel.box = alphaBox(width, 8, height - 26));
      const sweep = store.sweepOf(store.linear), errors = sweep ? [...sweep] : [];
      const { alphas } = store.about, answers = store.answers();
      const y = errorLimits([...errors, ...answers.map((answer) => answer.error)]), x = linearAxis(0, 1);
      const px = (alpha) => box.x + box.width * x.at(alpha), py = (error) => box.y + box.height * (1 - y.at(100 * error));
      const spot = sweep && sweetSpot(alphas, errors.slice(0, -1), store.about.slack);
      if (spot) {
        context.fillStyle = theme.series[2];
        context.globalAlpha = theme.dark ? 0.22 : 0.14;
        context.fillRect(px(spot.lo), box.y, Math.max(2, px(spot.hi) - px(spot.lo)), box.height);
        context.globalAlpha = 1;
      }
      const known = errors.some(usable) || answers.some((answer) => usable(answer.error));
      drawErrorAxes(context, box, x, known ? y : null, theme);
      context.textBaseline = "middle";
      const bare = errors[alphas.length];
      if (usable(bare)) {
        context.setLineDash([4, 4]);
        context.strokeStyle = theme.dim;
        context.beginPath();
        context.moveTo(box.x, py(bare));
        context.lineTo(box.x + box.width, py(bare));
        context.stroke();
        context.setLineDash([]);
        // The label stands where the curve is farther from the line, on a ground of its own.
        const away = (error) => (usable(error) ? Math.abs(Math.log(error / bare)) : 0);
        const right = away(errors[alphas.length - 1]) >= away(errors[0]), wide = context.measureText("unsmoothed").width;
        const x0 = right ? box.x + box.width - wide - 4 : box.x + 4, y0 = py(bare) < box.y + 16 ? py(bare) + 9 : py(bare) - 8;
        context.globalAlpha = 0.75;
        context.fillStyle = theme.paper;
        context.fillRect(x0 - 2, y0 - 7, wide + 4, 14);
        context.globalAlpha = 1;
        context.fillStyle = theme.dim;
        context.textAlign = "left";
        context.fillText("unsmoothed", x0, y0);
      }
      drawErrorCurve(context, alphas, errors, px, py, theme);
      answers.forEach((answer, i) => {
        if (!answer.rest || answer.how !== "exact" || !usable(answer.error)) return;
        context.globalAlpha = 0.3 + (0.6 * (i + 1)) / answers.length;
        context.fillStyle = theme.ink;
        context.beginPath();
        context.arc(px(answer.alpha), py(answer.error), 2.6, 0, 2 * Math.PI);
        context.fill();
        context.globalAlpha = 1;
      });
      panel.empty = !known;
      if (!errors.some(usable)) {
        context.fillStyle = theme.dim;
        context.textAlign = "center";
        context.fillText(sweep && errors[0] < 0 ? "no finite error: the activations or weights hold NaN or infinity" : store.waiting(), box.x + box.width / 2, box.y + box.height / 2);
      }
      panel.spot = spot;
      panel.placeMarker?.(store);
    },
  });
  panel.placeMarker = makeMarker(panel);
  return panel;
}

function drawErrorAxes(context, box, x, y, theme) {
  context.font = `11px ${theme.font}`;
  context.lineWidth = 1;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const tick of y ? errorTicks(y) : []) {
    const at = Math.round(box.y + box.height * (1 - y.at(tick))) + 0.5;
    context.strokeStyle = theme.faint;
    context.beginPath();
    context.moveTo(box.x, at);
    context.lineTo(box.x + box.width, at);
    context.stroke();
    context.fillStyle = theme.dim;
    context.fillText(`${number(tick)} %`, box.x - 6, at);
  }
  context.textAlign = "center";
  context.textBaseline = "top";
  for (const tick of [0, 0.2, 0.4, 0.6, 0.8, 1]) context.fillText(number(tick), box.x + box.width * x.at(tick), box.y + box.height + 5);
}

function drawErrorCurve(context, alphas, errors, px, py, theme) {
  context.strokeStyle = theme.accent;
  context.lineWidth = 2;
  context.lineJoin = "round";
  context.beginPath();
  let on = false;
  alphas.forEach((alpha, k) => {
    if (!usable(errors[k])) return void (on = false);
    if (on) context.lineTo(px(alpha), py(errors[k]));
    else context.moveTo(px(alpha), py(errors[k]));
    on = true;
  });
  context.stroke();
}

// ---- the strip: one row per layer, one column per swept α -------------------------------------------------------------

function makeStripPanel(parent, store, facts) {
  const raster = makeRaster(), lut = lutOf("cividis");
  const panel = makeCanvas(parent, {
    height: () => Math.min(260, Math.max(64, panel.rows().length * 6)) + 44,
    label: "Error of the same linear in every layer against α; click a row to open that layer",
    draw(context, width, height, theme) {
      const box = (panel.box = alphaBox(width, 2, height - 44)), rows = panel.rows(), { alphas } = store.about;
      const sweeps = rows.map((row) => store.sweepOf(row.name));
      const known = sweeps.flatMap((sweep) => (sweep ? [...sweep.subarray(0, alphas.length)].filter(usable) : []));
      const [lo, hi] = known.length ? [Math.min(...known), Math.max(...known)] : [0.01, 1];
      const axis = logAxis(100 * lo, 100 * Math.max(hi, lo * 1.5)), nothing = cssPixel(lostColour(theme));
      const pixels = raster.fit(alphas.length, rows.length);
      sweeps.forEach((sweep, r) => alphas.forEach((_, k) => {
        const error = sweep ? sweep[k] : NaN;
        pixels[r * alphas.length + k] = usable(error) ? lut[Math.max(0, Math.min(255, Math.round(255 * axis.at(100 * error))))] : nothing;
      }));
      const cell = box.width / (alphas.length - 1), tall = box.height / rows.length;
      context.save();
      context.beginPath();
      context.rect(box.x, box.y, box.width, box.height);
      context.clip();
      raster.paint(context, { x: box.x - cell / 2, y: box.y, width: box.width + cell, height: box.height }); // cells centred on their α
      context.restore();
      sweeps.forEach((sweep, r) => {
        const spot = sweep && sweetSpot(alphas, [...sweep.subarray(0, alphas.length)], 1);
        if (!spot) return;
        context.fillStyle = "#ffffff";
        context.strokeStyle = "#000000";
        context.lineWidth = 0.5;
        context.beginPath();
        context.arc(box.x + spot.best * box.width, box.y + (r + 0.5) * tall, Math.min(2.4, tall / 2.4), 0, 2 * Math.PI);
        context.fill();
        context.stroke();
      });
      const here = rows.findIndex((row) => row.name === store.linear);
      context.strokeStyle = theme.ink;
      context.lineWidth = 2;
      if (here >= 0) context.strokeRect(box.x - 1, box.y + here * tall - 1, box.width + 2, tall + 2);
      drawStripAxes(context, box, rows, tall, theme, width);
      drawColourBar(context, { x: box.x + box.width - 120, y: height - 22, width: 108, height: 7 }, { ...axis, ticks: () => [axis.lo, Math.sqrt(axis.lo * axis.hi), axis.hi] }, lut, "error, %", theme);
      const done = sweeps.filter((sweep) => sweep && !Number.isNaN(sweep[0])).length;
      facts.textContent = done < rows.length ? `${done} of ${rows.length} layers swept` : "○ smallest error of each layer";
      panel.placeMarker?.(store);
    },
  });
  panel.rows = () => {
    const { kind } = store.row, may = new Set(store.available);
    return store.about.linears.filter((row) => row.kind === kind && may.has(row.name));
  };
  panel.placeMarker = makeMarker(panel);
  panel.rowAt = (event) => {
    const rows = panel.rows(), down = event.clientY - panel.canvas.getBoundingClientRect().top - panel.box.y;
    return rows[Math.floor((down / panel.box.height) * rows.length)] ?? null;
  };
  return panel;
}

function drawStripAxes(context, box, rows, tall, theme, width) {
  context.font = `11px ${theme.font}`;
  context.fillStyle = theme.dim;
  context.textBaseline = "middle";
  context.textAlign = "right";
  const every = Math.max(1, Math.ceil(14 / tall));
  rows.forEach((row, r) => {
    if (r % every === 0) context.fillText(String(row.block), box.x - 6, box.y + (r + 0.5) * tall);
  });
  context.save();
  context.translate(9, box.y + box.height / 2);
  context.rotate(-Math.PI / 2);
  context.textAlign = "center";
  context.fillText("layer", 0, 0);
  context.restore();
  context.textBaseline = "top";
  context.textAlign = "center";
  for (const tick of [0, 0.2, 0.4, 0.6, 0.8, 1]) context.fillText(number(tick), box.x + box.width * tick, box.y + box.height + 5);
}
