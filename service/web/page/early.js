// Keeps what a visitor does before the modules have loaded, so that nothing is lost on a slow line: so this is no module.
"use strict";

(() => {
  /** Buttons that were clicked, and files that were dropped, pasted or chosen. */
  const clicked = new Set();
  const files = [];
  const over = new AbortController();
  const listen = (event, act) => document.addEventListener(event, act, { signal: over.signal, capture: true });

  listen("click", (event) => {
    const button = event.target.closest?.("main button");
    if (!button) return;
    // The browser opens its dialog only at once, by the click itself.
    if (button.id === "choose") document.getElementById("files").click();
    else {
      clicked.add(button);
      button.setAttribute("aria-busy", "true");
    }
  });
  listen("submit", (event) => event.preventDefault()); // its button is clicked again
  listen("dragover", (event) => event.preventDefault());
  listen("drop", (event) => {
    event.preventDefault(); // or the browser would open the file
    files.push(...event.dataTransfer.files);
  });
  listen("paste", (event) => files.push(...event.clipboardData.files));
  listen("change", ({ target }) => {
    if (target.id !== "files") return;
    files.push(...target.files);
    target.value = ""; // so that the same file can be chosen again
  });

  // `intake.js` sends this once it listens itself.
  listen("intake", ({ detail }) => {
    over.abort();
    if (files.length) detail.receive(files);
    for (const button of clicked) {
      button.removeAttribute("aria-busy");
      button.click();
    }
  });
})();
