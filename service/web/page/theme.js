// Dark or light, before the first paint: so this is no module. What was chosen is kept by the browser.
"use strict";

(() => {
  const WORDS = { auto: "as the system has it", light: "light", dark: "dark" };
  const SIGNS = { auto: "◐", light: "☀\uFE0E", dark: "☾\uFE0E" }; // as text, not as a picture

  /** From one to the next: the first step changes what is seen. */
  function order() {
    const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
    return isDark ? ["auto", "light", "dark"] : ["auto", "dark", "light"];
  }

  /** What was chosen; a browser that keeps nothing is asked for nothing. */
  function chosen() {
    try {
      return order().find((name) => name === localStorage.getItem("fovea-theme")) ?? "auto";
    } catch {
      return "auto";
    }
  }

  function apply(name) {
    document.documentElement.dataset.theme = name;
    const button = document.getElementById("theme");
    if (button) {
      button.textContent = SIGNS[name];
      button.setAttribute("aria-label", `Colours: ${WORDS[name]}`);
      button.title = `Colours: ${WORDS[name]}`;
    }
  }

  function next() {
    const names = order();
    const name = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
    try {
      localStorage.setItem("fovea-theme", name);
    } catch {
      // then it holds until the page is closed
    }
    apply(name);
  }

  /** Whether the tour is known; before the first paint too, so that its offer does not come and go. */
  function tour() {
    try {
      return localStorage.getItem("fovea-tour") ?? "new";
    } catch {
      return "new";
    }
  }

  apply(chosen());
  document.documentElement.dataset.tour = tour();
  document.addEventListener("DOMContentLoaded", () => {
    apply(chosen());
    document.getElementById("theme").addEventListener("click", next);
  });
})();
