// Before anything is drawn: the colours a person chose last time; without a choice, the system's.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("qkscope-theme");
  } catch {
    // a browser that stores nothing follows the system
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
