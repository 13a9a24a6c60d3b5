// precision_block.js: one block as a drawing, data flowing downwards; every operator is a button.

const [PM_ROW, PM_GAP] = [44, 5]; // height of a row, room between two operators beside each other

// An error for people; in brackets where it is what quantising would cost.
function shownError(value, quantised) {
  if (value === null || value === undefined) return "–";
  return quantised ? number(value) : `(${number(value)})`;
}

function makeBlock(parent, tooltip, { choose, step }) {
  const frame = Object.assign(document.createElement("div"), { className: "pm-block" });
  frame.setAttribute("role", "group");
  parent.append(frame);
  let [state, buttons] = [null, new Map()];

  const draw = () => {
    if (!state || !frame.clientWidth) return;
    const { operators, layout, measure, chosen } = state;
    const focused = frame.contains(document.activeElement) ? document.activeElement.dataset.name : null;
    const [left, right] = layout.columns;
    const wide = Math.min(132, frame.clientWidth / (right - left));
    const offset = (frame.clientWidth - wide * (right - left)) / 2;
    const at = ([column, row]) => [offset + (column - left) * wide, (row + 0.45) * PM_ROW];
    frame.style.height = `${layout.rows * PM_ROW + 4}px`;
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("aria-hidden", "true");
    for (const [start, end, corners] of layout.lines) {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("d", `M${corners.map((corner) => at(corner).join(" ")).join("L")}`);
      if (start === chosen || end === chosen) path.setAttribute("class", "pm-of");
      svg.append(path);
    }
    const input = Object.assign(document.createElement("div"), { className: "pm-input", textContent: "residual stream" });
    const put = (element, place) => {
      const [x, y] = at(place);
      Object.assign(element.style, { left: `${x}px`, top: `${y}px` });
    };
    put(input, layout.places.input);
    buttons = new Map(operators.map((one) => [one.name, makeOperator(one, wide - PM_GAP, measure, one.name === chosen, choose, tooltip)]));
    for (const [name, button] of buttons) put(button, layout.places[name]);
    frame.replaceChildren(svg, input, ...buttons.values());
    if (focused) buttons.get(focused)?.focus();
  };

  frame.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: -1, ArrowDown: 1 };
    const turns = { ArrowLeft: -1, ArrowRight: 1 };
    if (event.key in turns) step(turns[event.key]);
    else if (event.key in moves) {
      const names = [...buttons.keys()];
      const next = names[names.indexOf(event.target.dataset?.name) + moves[event.key]];
      if (next) {
        choose(next);
        buttons.get(next)?.focus();
      }
    } else return;
    event.preventDefault();
  });
  const resized = new ResizeObserver(draw);
  resized.observe(parent);
  return {
    stop: () => resized.disconnect(),
    show(next) {
      state = next;
      frame.setAttribute("aria-label", `Block ${next.index}: ${next.operators.length} operators. Up and down go from one to the next, left and right to other blocks.`);
      draw();
    },
  };
}

function makeOperator(one, width, measure, pressed, choose, tooltip) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: one.quantised ? "pm-op pm-int" : "pm-op" });
  button.dataset.name = one.name;
  button.style.width = `${width}px`;
  button.setAttribute("aria-pressed", pressed);
  const error = shownError(one[measure], one.quantised);
  button.setAttribute("aria-label", `${one.title}, ${one.precision}, error ${error}`);
  for (const [text, kind] of [[one.title, ""], [error, "pm-error"]]) {
    button.append(Object.assign(document.createElement("span"), { textContent: text, className: kind }));
  }
  button.addEventListener("click", () => choose(one.name));
  button.addEventListener("pointermove", (event) => tooltip.show([`${one.title} · ${one.precision}`, one.name], event.clientX, event.clientY));
  button.addEventListener("pointerleave", tooltip.hide);
  return button;
}
