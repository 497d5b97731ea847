// Draws every figure of the page, and lets its reader choose light or dark.
(() => {
  const root = document.documentElement;
  root.dataset.live = "";

  for (const source of document.querySelectorAll("script[data-chart]")) {
    const place = document.getElementById(source.dataset.chart);
    vegaEmbed(place, JSON.parse(source.textContent), { renderer: "svg", actions: false }).then(
      () => {
        place.querySelector("svg").setAttribute("aria-hidden", "true"); // caption and table say it in words
        place.dataset.drawn = "";
      },
      (error) => { place.textContent = `This figure cannot be drawn: ${error.message}`; },
    );
  }

  const button = document.getElementById("theme");
  const prefers = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefers.matches);
  const tell = () => button.setAttribute("aria-pressed", String(isDark()));
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; tell(); });
  prefers.addEventListener("change", tell);
  tell();
})();
