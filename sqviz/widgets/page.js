// Runs a view in an exported page, with the model of page_model.js, which stands before this.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);

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
    try {
      const el = document.createElement("div");
      main.append(el);
      await runView(read("module"), read("state"), el);
      document.body.dataset.ready = "true";
    } catch (error) {
      const note = document.createElement("p");
      note.id = "page-failed";
      note.textContent = `This view could not be drawn: ${error.message}`;
      main.append(note);
      throw error;
    }
  };
  start();
})();
