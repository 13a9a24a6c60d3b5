// attention_zoom.js: one span of tokens for all heads, the head shown large and the profile: to zoom in one is to zoom in all.
//
//   zoomedSpan(span, token, factor, length) -> span      [first, last], or [] for all tokens; `token` keeps its place
//   zoomByHand(canvas, {tokenAt(event), span(), setSpan(span), length})
//
// The wheel zooms once the canvas has the focus (a click), or with Ctrl: else the page scrolls. Keys: + − and 0.

function zoomedSpan(span, token, factor, length) {
  const [from, to] = span.length === 2 ? [Math.min(...span), Math.max(...span)] : [0, length - 1];
  const now = to - from + 1;
  const size = Math.max(Math.min(2, length), Math.round(factor > 1 ? Math.max(now * factor, now + 1) : Math.min(now * factor, now - 1)));
  if (size >= length) return [];
  const start = Math.round(token - (token - from) * (size / now));
  const first = Math.max(0, Math.min(length - size, start));
  return [first, first + size - 1];
}

function zoomByHand(canvas, { tokenAt, span, setSpan, length }) {
  const change = (token, factor) => {
    const next = zoomedSpan(span(), token, factor, length);
    if (String(next) !== String(span())) setSpan(next);
  };
  canvas.addEventListener("wheel", (event) => {
    if (!(event.ctrlKey || event.metaKey || canvas.matches(":focus"))) return;
    const token = tokenAt(event);
    if (token === null) return;
    event.preventDefault();
    change(token, 2 ** Math.max(-1, Math.min(1, event.deltaY / 200)));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const [from, to] = span().length === 2 ? span() : [0, length - 1];
    if (event.key === "+" || event.key === "=") change((from + to) / 2, 0.5);
    else if (event.key === "-") change((from + to) / 2, 2);
    else if (event.key === "0") setSpan([]);
    else return;
    event.preventDefault();
  });
}
