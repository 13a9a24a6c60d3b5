// A model with the state that a page carries, in place of the one a kernel would hold. It answers get, set, on, off like
// a live one; save_changes and send do nothing, for there is no one to tell. `model.kernel === false` is how a view knows
// (draw.js: hasKernel). Shared by exported pages (page.js) and by views inside a notebook's HTML (inline.js).
const revive = (value) => {
  if (Array.isArray(value)) return value.map(revive);
  if (value === null || typeof value !== "object") return value;
  if (typeof value.base64 === "string" && Object.keys(value).length === 1) {
    const text = atob(value.base64);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return new DataView(bytes.buffer);
  }
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, revive(item)]));
};

const makeModel = (state) => {
  const listeners = new Map(); // event name -> [callback, ...]
  const fire = (event, ...args) => [...(listeners.get(event) ?? [])].forEach((callback) => callback(...args));
  const model = {
    kernel: false,
    widget_manager: null,
    get: (name) => state[name],
    set(name, value) {
      const changes = typeof name === "object" ? name : { [name]: value };
      const changed = Object.keys(changes).filter((key) => state[key] !== changes[key]);
      Object.assign(state, changes);
      for (const key of changed) fire(`change:${key}`, model, state[key]);
      if (changed.length) fire("change", model);
    },
    on: (events, callback) => events.split(" ").forEach((e) => listeners.set(e, [...(listeners.get(e) ?? []), callback])),
    off(events, callback) {
      if (!events) return listeners.clear();
      for (const e of events.split(" ")) {
        listeners.set(e, callback ? (listeners.get(e) ?? []).filter((known) => known !== callback) : []);
      }
    },
    save_changes() {},
    send() {},
  };
  return model;
};

// Runs a view's module, given as text, in an element.
const runView = async (module, state, el) => {
  const url = URL.createObjectURL(new Blob([module], { type: "text/javascript" }));
  try {
    const view = (await import(url)).default;
    await view.render({ model: makeModel(revive(state)), el });
  } finally {
    URL.revokeObjectURL(url);
  }
};
