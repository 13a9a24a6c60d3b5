// Runs a view in an exported page: a model with the state the page carries, in place of the one a kernel would hold.
// The model answers get, set, on, off like a live one; save_changes and send do nothing, for there is no one to tell.
// `model.kernel === false` is how a view knows (draw.js: hasKernel).
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
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

  const addThemeButton = () => {
    const button = document.createElement("button");
    button.id = "page-theme";
    const dark = () =>
      document.body.dataset.theme ? document.body.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    const label = () => {
      button.textContent = dark() ? "Light" : "Dark";
      button.setAttribute("aria-label", `Switch to ${dark() ? "light" : "dark"} colours`);
    };
    button.addEventListener("click", () => {
      document.body.dataset.theme = dark() ? "light" : "dark";
      label();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
    label();
    document.body.append(button);
  };

  const start = async () => {
    addThemeButton();
    const main = document.getElementById("view");
    const url = URL.createObjectURL(new Blob([read("module")], { type: "text/javascript" }));
    try {
      const view = (await import(url)).default;
      const model = makeModel(revive(read("state")));
      const el = document.createElement("div");
      main.append(el);
      await view.render({ model, el });
      document.body.dataset.ready = "true";
    } catch (error) {
      const note = document.createElement("p");
      note.id = "page-failed";
      note.textContent = `This view could not be drawn: ${error.message}`;
      main.append(note);
      throw error;
    } finally {
      URL.revokeObjectURL(url);
    }
  };
  start();
})();
