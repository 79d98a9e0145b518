/** Beside the layers: the photo and the model's input with the receptive field on both, and what the layer does. */

import { byId, make, setStyles } from "./dom.js";
import { onPhoto, receptiveField } from "./field.js";
import { PhotoFrame } from "./frame.js";
import { WELCOME, lesson } from "./learn.js";
import { figure } from "./numbers.js";
import { showField } from "./stage.js";

const frame = new PhotoFrame();
const picture = make("img", { class: "pixels", alt: "", hidden: true });
const region = make("div", { class: "field", hidden: true });
const title = make("h3", {});
const words = make("p", { class: "soft" });
const told = make("p", { class: "soft told" });

byId("welcome").textContent = WELCOME;
byId("lens").append(
  make("div", { class: "glass" }, frame.element, make("div", { class: "input" }, picture, region)),
  told,
  make("div", { class: "words" }, title, words),
);

/** @type {import("./api.js").Saw | null} */
let saw = null;

/** Show another photo. @param {{url: string, name: string}} photo */
export function lookAt(photo) {
  saw = null;
  frame.show(photo);
  picture.hidden = true;
  showLesson(null);
  showReceptiveField(null);
}

/** @param {import("./api.js").Saw} known the exact input */
export function showInputPicture(known) {
  saw = known;
  picture.src = `data:image/png;base64,${saw.png}`;
  picture.hidden = false;
  frame.showSeen(saw);
}

/** Say what a layer does, or how to begin. @param {import("./api.js").Layer | null} layer */
export function showLesson(layer) {
  const { name, text } = layer ? lesson(layer) : { name: "How to read this", text: WELCOME };
  title.textContent = name;
  words.textContent = text;
}

/**
 * Mark what a pixel of a map sees, on the input and on the photo; none: take the marks away.
 * @param {import("./api.js").Layer | null} layer
 * @param {number} [row] @param {number} [column]
 * @param {number} [value] of the pixel, where it is not shown elsewhere
 */
export function showReceptiveField(layer, row, column, value) {
  const shown = layer !== null && row !== undefined && saw !== null;
  region.hidden = !shown;
  if (!shown) {
    frame.showField(null);
    showField(null);
    told.textContent = "";
    return;
  }
  const field = receptiveField(layer.field, row, column, saw);
  const { top, left, bottom, right } = field;
  const part = (value, size) => `${(100 * value) / size}%`;
  setStyles(region, {
    left: part(left, saw.width),
    top: part(top, saw.height),
    width: part(right - left, saw.width),
    height: part(bottom - top, saw.height),
  });
  const box = onPhoto(field, saw, saw.box);
  frame.showField(box);
  showField(box);
  Object.assign(region.dataset, { top, left, bottom, right });
  const own = value === undefined ? "" : ` is ${figure(value)} and`;
  told.textContent = `Pixel (${row}, ${column})${own} sees ${right - left} × ${bottom - top} of ${saw.width} × ${saw.height} pixels.`;
}
