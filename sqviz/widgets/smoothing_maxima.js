// The curves between the two maps: largest |X/s| and |s·W| of each channel on a log axis, and what they were before as
// pale silhouettes. The axis is the same for every α, so that what moves is the data.

// The largest value of each pixel column. Channels are never averaged: an outlier stays as tall as it is.
const poolMaxima = (values, columns) => {
  if (columns >= values.length) return values;
  return Float32Array.from({ length: columns }, (_, p) => {
    let most = 0;
    for (let j = Math.floor((p * values.length) / columns); j < Math.floor(((p + 1) * values.length) / columns); j++) if (values[j] > most) most = values[j];
    return most;
  });
};

// Limits that hold for every α: over α in {0, 0.5, 1} and before; the small end leaves out the lowest half per cent.
function maximaLimits({ pack, w }) {
  const all = [pack.x.absmax, w.absmax];
  for (const alpha of [0, 0.5, 1]) {
    const s = smoothingScale(pack.xLog, pack.foldLog, alpha);
    all.push(pack.x.absmax.map((value, j) => value / s[j]), w.absmax.map((value, j) => value * s[j]));
  }
  let [lo, hi] = [Infinity, 0];
  for (const values of all) {
    const positive = values.filter((value) => value > 0 && Number.isFinite(value)).sort();
    if (!positive.length) continue;
    lo = Math.min(lo, positive[Math.floor(positive.length * 0.005)]);
    hi = Math.max(hi, positive[positive.length - 1]);
  }
  return hi > 0 ? logAxis(Math.min(lo, hi / 10) / 1.3, hi * 1.6) : logAxis(0.1, 10);
}

function makeMaximaPanel(parent, store) {
  const facts = heading(parent, ["Channel maxima"]);
  facts.append(swatch("max |X/s|", 1), swatch("max |s·W|", 2), swatch("", 1, true), swatch("before", 2, true));
  let limits = { key: "" };
  const trace = (context, box, y, values) => {
    const columns = values.length, width = box.width / columns, bottom = box.y + box.height;
    const at = (value) => (value > 0 ? Math.min(bottom, box.y + box.height * (1 - y.at(value))) : bottom);
    context.beginPath();
    for (let p = 0; p < columns; p++) {
      const level = at(values[p]);
      if (p === 0) context.moveTo(box.x, level);
      else context.lineTo(box.x + p * width, level);
      context.lineTo(box.x + (p + 1) * width, level);
    }
  };
  const silhouette = (context, box, y, values, colour, dark) => {
    trace(context, box, y, values);
    context.lineTo(box.x + box.width, box.y + box.height);
    context.lineTo(box.x, box.y + box.height);
    context.globalAlpha = dark ? 0.14 : 0.09;
    context.fillStyle = colour;
    context.fill();
    context.globalAlpha = dark ? 0.5 : 0.4;
    context.strokeStyle = colour;
    context.lineWidth = 1;
    trace(context, box, y, values);
    context.stroke();
    context.globalAlpha = 1;
  };
  // The silhouettes and the axis do not move with α: they are drawn once and copied.
  let [backdrop, backdropKey] = [null, ""];
  const drawBackdrop = (now, box, y, width, height, theme, columns) => {
    const ratio = window.devicePixelRatio || 1;
    backdrop = Object.assign(document.createElement("canvas"), { width: Math.round(width * ratio), height: Math.round(height * ratio) });
    const context = backdrop.getContext("2d");
    context.scale(ratio, ratio);
    silhouette(context, box, y, poolMaxima(now.pack.x.absmax, columns), theme.series[0], theme.dark);
    silhouette(context, box, y, poolMaxima(now.w.absmax, columns), theme.series[1], theme.dark);
    context.font = `11px ${theme.font}`;
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const tick of y.ticks(box.height / 26)) {
      const at = Math.round(box.y + box.height * (1 - y.at(tick))) + 0.5;
      context.strokeStyle = theme.faint;
      context.beginPath();
      context.moveTo(box.x, at);
      context.lineTo(box.x + box.width, at);
      context.stroke();
      context.fillStyle = theme.dim;
      context.fillText(number(tick), box.x - 6, at);
    }
    context.save();
    context.translate(9, box.y + box.height / 2);
    context.rotate(-Math.PI / 2);
    context.textAlign = "center";
    context.fillText("largest value", 0, 0);
    context.restore();
  };

  const panel = makeCanvas(parent, {
    height: () => 150,
    label: "Largest |X/s| and |s·W| of each channel, log axis, with the values before smoothing",
    draw(context, width, height, theme) {
      const box = { x: CHANNEL_SIDE.left, y: 4, width: width - CHANNEL_SIDE.left - CHANNEL_SIDE.right, height: height - 8 };
      panel.box = box;
      const now = store.now();
      if (!now) return;
      const key = `${store.linear}|${now.pack.sorted}`;
      if (limits.key !== key || limits.pack !== now.pack) limits = { key, pack: now.pack, axis: maximaLimits(now) };
      const columns = Math.max(1, Math.round(box.width)), y = limits.axis;
      const wanted = `${key}|${width}|${height}|${theme.ink}|${theme.paper}`;
      if (backdropKey !== wanted || panel.pack !== now.pack) drawBackdrop(now, box, y, width, height, theme, columns);
      [backdropKey, panel.pack] = [wanted, now.pack];
      context.drawImage(backdrop, 0, 0, width, height);
      context.lineWidth = now.pack.channels > columns / 2 ? 1 : 1.4;
      for (const [values, series] of [[now.xAfter, 0], [now.wAfter, 1]]) {
        trace(context, box, y, poolMaxima(values, columns));
        context.strokeStyle = theme.series[series];
        context.stroke();
      }
    },
  });
  return panel;
}

// One upright hair through the three panels, and the facts of the channel under the pointer.
function linkChannels(store, panels, tooltip) {
  const hairs = panels.map((panel) => {
    const hair = Object.assign(document.createElement("div"), { className: "sm-hair", hidden: true });
    panel.canvas.parentElement.append(hair);
    return hair;
  });
  const hide = () => {
    hairs.forEach((hair) => (hair.hidden = true));
    tooltip.hide();
  };
  panels.forEach((panel, which) => {
    panel.canvas.addEventListener("pointerleave", hide);
    panel.canvas.addEventListener("pointermove", (event) => {
      const now = store.now(), { box } = panel;
      const frame = panel.canvas.getBoundingClientRect();
      const part = (event.clientX - frame.left - box.x) / box.width, down = (event.clientY - frame.top - box.y) / box.height;
      if (!now || part < 0 || part >= 1 || down < 0 || down > 1) return hide();
      let j = Math.floor(part * now.pack.channels);
      const columns = Math.round(box.width);
      if (now.pack.channels > columns) { // of the channels under this pixel, the one that stands out
        const first = Math.floor(Math.floor(part * columns) * now.pack.channels / columns);
        const last = Math.min(now.pack.channels, Math.ceil((Math.floor(part * columns) + 1) * now.pack.channels / columns));
        for (let k = (j = first); k < last; k++) if (now.pack.x.absmax[k] > now.pack.x.absmax[j]) j = k;
      }
      hairs.forEach((hair, i) => {
        hair.hidden = false;
        hair.style.transform = `translateX(${Math.round(panels[i].box.x + part * panels[i].box.width)}px)`;
      });
      tooltip.show([`channel ${now.pack.order[j]}`, ...channelFacts(now, j), ...(which === 0 ? cellFacts(now, j, down) : [])], event.clientX, event.clientY);
    });
  });
}

const channelFacts = (now, j) => [
  `s = ${number(now.s[j])}`,
  `max |X|  ${number(now.pack.x.absmax[j])} → ${number(now.xAfter[j])}`,
  `max |W|  ${number(now.w.absmax[j])} → ${number(now.wAfter[j])}`,
];

function cellFacts(now, j, down) {
  const { x, channels, tokensPerRow } = now.pack;
  if (x.rows === 0) return [];
  const row = Math.min(x.rows - 1, Math.floor(down * x.rows)), value = decodeLog(x.codes[row * channels + j], x.range);
  const first = row * tokensPerRow, words = now.pack.texts.slice(first, first + tokensPerRow);
  const which = tokensPerRow > 1 ? `tokens ${first}–${first + tokensPerRow - 1}` : `token ${first}`;
  const text = words.length ? ` “${words.join("").replace(/\s+/g, " ").trim().slice(0, 40)}”` : "";
  return [`${which}${text}`, `|X| here ≈ ${number(value)} → ${number(value / now.s[j])}`];
}
