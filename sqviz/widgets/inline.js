// Puts a view in the place of the plain table or picture that stands before this script, wherever scripts run. Wrapped by
// inline.py in a function of `script` (this element), `module` and `state`, after page_model.js.
(async () => {
  const plain = script.parentElement.querySelector(":scope > .sqviz-plain");
  const el = document.createElement("div");
  plain.before(el);
  try {
    await runView(module, state, el);
    plain.remove();
  } catch (error) {
    el.remove(); // what was there stays
    throw error;
  }
})();
