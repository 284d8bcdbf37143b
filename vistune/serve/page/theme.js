// Light or dark before anything is drawn: what was chosen here, else what the system has.
(() => {
  let chosen = null;
  try { chosen = localStorage.getItem("vistune.theme"); } catch (error) { console.info("no storage:", error.name); }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const set = () => { document.documentElement.dataset.theme = chosen || (dark.matches ? "dark" : "light"); };
  dark.addEventListener("change", set);
  set();
})();
