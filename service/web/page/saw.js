/** The exact input of the model, enlarged, and the steps that led to it. */

import { byId, make } from "./dom.js";

const place = byId("saw");

const WORDS = {
  decode: "Decoded",
  orient: "Oriented",
  convert: "Converted",
  resize: "Resized",
  crop: "Cropped",
  pad: "Padded",
  scale: "Scaled",
};

/**
 * @param {import("./api.js").Saw | null} saw null: not known yet
 * @param {string} [reason] why it will not be known
 */
export function showSaw(saw, reason) {
  if (!saw) {
    const said = reason ? make("p", { class: "soft" }, reason) : make("div", { class: "input", "aria-hidden": "true" });
    place.replaceChildren(said);
    return;
  }
  const { width, height, png, steps } = saw;
  place.replaceChildren(
    make("img", {
      class: "input pixels",
      src: `data:image/png;base64,${png}`,
      alt: `The model's input, ${width} by ${height} pixels, enlarged`,
    }),
    make("p", { class: "soft" }, `${width} × ${height} pixels, and no others.`),
    make(
      "ol",
      { class: "steps" },
      ...steps.map(({ step, text }) => make("li", {}, make("strong", {}, WORDS[step] ?? step), ` ${text}`)),
    ),
  );
}
