/** A field that finds layers by their names, kinds and numbers. */

import { make } from "./dom.js";
import { lesson } from "./learn.js";
import { whole } from "./numbers.js";

/** @typedef {import("./api.js").Layer} Layer */

/**
 * A search field with all layers as suggestions. Enter goes to the next match, with Shift to the one before.
 * @param {Layer[]} layers
 * @param {(layer: Layer) => void} show
 */
export function finder(layers, show) {
  const texts = layers.map((layer, at) => `${at + 1} ${lesson(layer).name} ${layer.name}`.trim());
  const field = make("input", {
    type: "search",
    placeholder: "Find a layer",
    "aria-label": "Find a layer by name, kind or number",
    autocomplete: "off",
    spellcheck: false,
  });
  field.setAttribute("list", "layer-names"); // the property is for reading
  const count = make("span", { class: "found", role: "status" });
  let at = -1;
  const go = (matches, step) => {
    if (!matches.length) return;
    at = (Math.max(at, step > 0 ? -1 : 0) + step + matches.length) % matches.length;
    count.textContent = `${whole(at + 1)} of ${whole(matches.length)}`;
    show(layers[matches[at]]);
  };
  const find = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = texts.flatMap((text, index) =>
      words.length && words.every((word) => text.toLowerCase().includes(word)) ? [index] : [],
    );
    const number = Number(words.join(" ")) - 1; // a number means that layer before others that contain it
    return matches.includes(number) ? [number, ...matches.filter((index) => index !== number)] : matches;
  };
  field.addEventListener("input", () => {
    at = -1;
    const chosen = texts.indexOf(field.value);
    const matches = chosen < 0 ? find() : [chosen];
    count.textContent = field.value.trim() ? counted(matches.length) : "";
    if (chosen >= 0) go(matches, 1); // a suggestion was chosen
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") go(find(), event.shiftKey ? -1 : 1);
  });
  return make(
    "span",
    { class: "finder" },
    field,
    make("datalist", { id: "layer-names" }, ...texts.map((value) => make("option", { value }))),
    count,
  );
}

function counted(matches) {
  return matches ? `${whole(matches)} found` : "none";
}
